"""One spelling for each thing: what does nothing goes, what the caller could notice stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import catch
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.compiler.graph import aten, graph_text, nodes_of, outputs, placeholders, tensor
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassContext, run_pipeline
from llmopt.passes.eliminate_common import EliminateCommon
from llmopt.passes.normalize import Normalize, SimplifyViews
from llmopt.passes.pipeline import BACKEND

X = torch.randn(3, 4)


def test_golden() -> None:
    def model(x: Tensor) -> Tensor:
        y = F.dropout(torch.cos(x), 0.1, False).contiguous()
        return torch.sin(y[:, :][0:3] * 1).transpose(0, 1).reshape(-1) + 2.0

    assert_golden(
        rewrite(Normalize(), model, X),
        """\
arg_0: f32[3, 4]
cos: f32[3, 4] = aten.cos.default(arg_0)
alias: f32[3, 4] = aten.alias.default(cos)
slice: f32[3, 4] = aten.slice.Tensor(alias, 0, 0, 3)
mul: f32[3, 4] = aten.mul.Tensor(slice, 1)
sin: f32[3, 4] = aten.sin.default(mul)
transpose: f32[4, 3] = aten.transpose.int(sin, 0, 1)
clone: f32[4, 3] = aten.clone.default(transpose, memory_format=torch.contiguous_format)
_unsafe_view: f32[12] = aten._unsafe_view.default(clone, [12])
add: f32[12] = aten.add.Tensor(_unsafe_view, 2.0)
return [add]
---
arg_0: f32[3, 4]
cos: f32[3, 4] = aten.cos.default(arg_0)
sin: f32[3, 4] = aten.sin.default(cos)
transpose: f32[4, 3] = aten.transpose.int(sin, 0, 1)
clone: f32[4, 3] = aten.clone.default(transpose, memory_format=torch.contiguous_format)
view: f32[12] = aten.view.default(clone, [12])
add: f32[12] = aten.add.Tensor(view, 2.0)
return [add]""",
    )


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout at inference": lambda x: F.dropout(x, 0.5, False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, True),
    "conversion": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "full slice": lambda x: x[:, :],
    "slice to the size": lambda x: x[0:3],
    "times one": lambda x: x * 1,
    "over one": lambda x: x / 1.0,
    "plus minus zero": lambda x: x + -0.0,
    "minus zero": lambda x: x - 0.0,
    "same view": lambda x: x.view(3, 4),
    "same reshape": lambda x: x.reshape(3, 4),
    "same expansion": lambda x: x.expand(3, 4),
    "repeated once": lambda x: x.repeat(1, 1),
    "nothing to squeeze": lambda x: x.squeeze(1),
    "an empty piece": lambda x: torch.cat([x, x[:, 4:]], 1),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_does_nothing_goes(name: str) -> None:
    result = rewrite(Normalize(), lambda x: torch.cos(NO_OPS[name](torch.sin(x))), X)
    assert result.targets() == ["aten.sin", "aten.cos"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:2],
        lambda x: x[::2],
        lambda x: x.repeat(1, 2),
        lambda x: x * 2,
        lambda x: x + 1,
        lambda x: x.view(4, 3),
        lambda x: x.unsqueeze(0).squeeze(0).view(12),
        lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format),
        lambda x: x.flip(0),
        lambda x: torch.cat([x, x[:, 3:]], 1),
    ],
)
def test_what_does_something_stays(function: Callable[[Tensor], Tensor]) -> None:
    must_not_fire(Normalize(), None, lambda x: torch.cos(function(torch.sin(x))), X)


def test_integers_keep_their_type() -> None:
    """`i * 1.0` and `i / 1` are floats."""
    must_not_fire(Normalize(), None, lambda i: torch.cos((i * 1.0) + (i / 1)), torch.arange(5))


def test_a_slice_of_a_symbolic_size_is_full_only_without_bounds() -> None:
    result = rewrite(Normalize(), lambda x: torch.cos(torch.sin(x)[:]), X, dynamic=True)
    assert result.targets() == ["aten.sin", "aten.cos"]
    result = rewrite(Normalize(), lambda x: torch.cos(torch.sin(x)[:3]), torch.randn(5, 4), dynamic=True)
    assert "aten.slice.Tensor" in result.targets()


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: (x > 0) & (x < 1), "aten.bitwise_and.Tensor"),
        (lambda x: (x > 0) | (x < 1), "aten.bitwise_or.Tensor"),
        (lambda x: torch.ops.aten.mul.Scalar(x, 3), "aten.mul.Tensor"),
        (lambda x: torch.ops.aten.div.Scalar(x, 3), "aten.div.Tensor"),
        (lambda x: torch.ops.aten.add.Scalar(x, 3), "aten.add.Tensor"),
        (lambda x: torch.ops.aten.sub.Scalar(x, 3), "aten.sub.Tensor"),
        (lambda x: torch.ops.aten._unsafe_view(x, [4, 3]), "aten.view"),
        (lambda x: x.double().type_as(x), "aten._to_copy"),
    ],
)
def test_synonyms(function: Callable[[Tensor], Tensor], wanted: str) -> None:
    result = rewrite(Normalize(), lambda x: torch.logical_not(function(torch.sin(x))), X)
    assert wanted in result.targets()


def test_assertions_and_dead_code_go() -> None:
    def model(x: Tensor) -> Tensor:
        torch.sin(x)  # nobody looks at it
        return torch.cos(x.to(torch.bfloat16).to(torch.float32))

    assert rewrite(Normalize(), model, X).targets() == ["aten._to_copy", "aten._to_copy", "aten.cos"]


FRESH: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda x: x.clone(),
    "times one": lambda x: x * 1,
    "a view of a clone": lambda x: x.clone().view(-1),
    "two equal results": lambda x: (torch.cos(x), torch.cos(x)),
    "a clone beside its source": lambda x: ((y := torch.cos(x)), y.clone()),
    "a copying conversion": lambda x: x.to(torch.float32, copy=True),
    "a diagonal of a clone": lambda x: x.clone().diagonal(),
    "windows of a clone": lambda x: (x * 1).unfold(0, 2, 1),
    "a clone as it lies": lambda x: x.clone().as_strided((2, 2), (1, 1)),
    "a clone's bits": lambda x: x.clone().view(torch.int32),
    "a clone through an op that promises a copy": lambda x: torch.einsum("ij->ji", x.clone()),
    "an empty piece": lambda x: torch.cat([x, x[:, :0]], 1),
    "diagonals of equal results": lambda x: (torch.cos(x).diagonal(), torch.cos(x).diagonal()),
}


@pytest.mark.parametrize("name", FRESH)
def test_results_alias_as_in_eager_mode(name: str) -> None:
    """The caller may write to a result: it must not hit the argument, or another result."""
    caught = catch(FRESH[name], X)
    run_pipeline(caught.graph, BACKEND, Options())
    pointers = [t.data_ptr() for t in (*caught.run(), *caught.arguments)]
    assert len(set(pointers)) == len(pointers)


def test_an_empty_piece_has_a_say_in_the_dtype() -> None:
    result = rewrite(Normalize(), lambda x, y: torch.cat([x[:, :0], y], 1) * 2, X, X.bfloat16())
    assert result.count("aten.cat") == 1


def test_a_summand_of_zero_that_changes_the_sign_of_zero() -> None:
    for function in (lambda x: x + 0, lambda x: x + 0.0, lambda x: x - -0.0):
        must_not_fire(Normalize(), None, lambda x, f=function: torch.cos(f(torch.sin(x))), X)
    integers = rewrite(Normalize(), lambda i: torch.cos((i * 2 + 0) * 3), torch.arange(5))
    assert integers.targets() == ["aten.mul.Tensor", "aten.mul.Tensor", "aten.cos"]


def test_a_factor_given_by_place() -> None:
    caught = catch(lambda x: torch.ops.aten.add.Scalar(x, 2, 3), X)
    run_pipeline(caught.graph, BACKEND, Options())
    torch.testing.assert_close(caught.run(), [X + 6])


def test_a_conversion_to_another_device_stays() -> None:
    for function in (lambda x: x.to("meta"), lambda x: x.to("meta", torch.float64), lambda x: x.type_as(x.to("meta"))):
        caught = catch(function, X)
        run_pipeline(caught.graph, (Normalize(),), Options())
        assert tensor(outputs(caught.graph)[0]).device.type == "meta"


def test_an_old_value_survives_a_write() -> None:
    def model(x: Tensor) -> Tensor:
        old = x.clone()
        x.add_(1)
        return old

    (x, compiled) = torch.zeros(4), torch.compile(model, backend="llmopt")
    assert compiled(x).tolist() == [0.0] * 4 and x.tolist() == [1.0] * 4


def test_normalize_cannot_be_disabled() -> None:
    caught = catch(lambda x: torch.cos(x.type_as(x) * 1), X)
    reports = run_pipeline(caught.graph, BACKEND, Options(disabled_passes=("normalize", "simplify_views")))
    assert not any(report.disabled for report in reports)
    assert [str(n.target) for n in caught.graph.nodes if n.op == "call_function"] == ["aten.cos.default"]


# ---- simplify_views ------------------------------------------------------------------------------------------------


def test_views_golden() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(x.transpose(0, 1).transpose(0, 1)), torch.cos(x.view(2, 6).view(12))

    assert_golden(
        rewrite(SimplifyViews(), model, X),
        """\
arg_0: f32[3, 4]
transpose: f32[4, 3] = aten.transpose.int(arg_0, 0, 1)
transpose_1: f32[3, 4] = aten.transpose.int(transpose, 0, 1)
cos: f32[3, 4] = aten.cos.default(transpose_1)
view: f32[2, 6] = aten.view.default(arg_0, [2, 6])
view_1: f32[12] = aten.view.default(view, [12])
cos_1: f32[12] = aten.cos.default(view_1)
return [cos, cos_1]
---
arg_0: f32[3, 4]
cos: f32[3, 4] = aten.cos.default(arg_0)
view: f32[12] = aten.view.default(arg_0, [12])
cos_1: f32[12] = aten.cos.default(view)
return [cos, cos_1]""",
    )


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), []),
        (lambda x: x.transpose(0, 2).transpose(0, 2), []),
        (lambda x: x.view(6, 4).view(2, 12).view(24), ["aten.view"]),
        (lambda x: x.view(24).view(2, 3, 4), []),
        (lambda x: x.transpose(0, 1).transpose(1, 2), ["aten.transpose.int", "aten.transpose.int"]),
        (lambda x: x.transpose(0, 1).reshape(3, 8), ["aten.transpose.int", "aten.clone", "aten.view"]),
    ],
)
def test_views_cancel(function: Callable[[Tensor], Tensor], left: list[str]) -> None:
    result = rewrite(SimplifyViews(), lambda x: torch.cos(function(torch.sin(x))), torch.randn(2, 3, 4))
    assert result.targets() == ["aten.sin", *left, "aten.cos"]


def test_a_view_that_new_strides_forbid_gets_a_copy() -> None:
    caught = catch(lambda x: torch.cos(x).view(12), X)
    (cos,) = nodes_of(caught.graph, aten.cos.default)
    cos.replace_input_with(placeholders(caught.graph)[0], _transposed(caught.graph, cos))
    SimplifyViews().run(caught.graph, PassContext(Options()))
    assert "aten.clone.default" in graph_text(caught.graph)
    (result,) = outputs(caught.graph)
    assert tensor(result).is_contiguous()
    torch.testing.assert_close(caught.run([X.view(4, 3)]), [torch.cos(X.view(4, 3).t()).reshape(12)])


def _transposed(graph: Any, cos: Any) -> Any:
    from llmopt.compiler.graph import Rewriter

    rewriter = Rewriter(graph)
    with rewriter.before(cos):
        return rewriter.call(aten.transpose.int, placeholders(graph)[0], 0, 1)


# ---- eliminate_common ----------------------------------------------------------------------------------------------


def test_common_golden() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cos(x) * 2 + torch.cos(x) * 2

    assert_golden(
        rewrite(EliminateCommon(), model, X),
        """\
arg_0: f32[3, 4]
cos: f32[3, 4] = aten.cos.default(arg_0)
mul: f32[3, 4] = aten.mul.Tensor(cos, 2)
cos_1: f32[3, 4] = aten.cos.default(arg_0)
mul_1: f32[3, 4] = aten.mul.Tensor(cos_1, 2)
add: f32[3, 4] = aten.add.Tensor(mul, mul_1)
return [add]
---
arg_0: f32[3, 4]
cos: f32[3, 4] = aten.cos.default(arg_0)
mul: f32[3, 4] = aten.mul.Tensor(cos, 2)
add: f32[3, 4] = aten.add.Tensor(mul, mul)
return [add]""",
    )


def test_equal_calls_are_computed_once_and_not_when_disabled() -> None:
    model = lambda x: torch.sin(torch.cos(x) + torch.cos(x))  # noqa: E731
    assert rewrite(EliminateCommon(), model, X).targets() == ["aten.cos", "aten.add.Tensor", "aten.sin"]
    assert ops_when_disabled(EliminateCommon(), model, X).count("aten.cos") == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cos(x) + torch.sin(x),
        lambda x: (x + 1).double() + (x + 1.5),
        lambda x: x.sum(0, keepdim=True) + x.sum(0).unsqueeze(0) + x.sum(1, keepdim=True),
        lambda x: torch.full((3,), 1) + torch.full((3,), True) + torch.full((3,), 1.0),
    ],
)
def test_unlike_calls_stay(function: Callable[[Tensor], Tensor]) -> None:
    must_not_fire(EliminateCommon(), None, lambda x: function(x) * 2, X)


def test_random_numbers_are_drawn_as_often_as_asked() -> None:
    caught = catch(lambda x: torch.rand_like(x) - torch.rand_like(x), X)
    EliminateCommon().run(caught.graph, PassContext(Options()))
    assert float(caught.run()[0].abs().max()) > 0


def test_two_results_are_not_merged() -> None:
    must_not_fire(EliminateCommon(), "the caller sees both", lambda x: (torch.cos(x), torch.cos(x)), X)


def test_an_extreme_whose_place_nobody_asks_for() -> None:
    x = torch.randn(3, 4)
    values = rewrite(Normalize(), lambda x: x.max(1).values.sum() + x.min(0, keepdim=True).values, x)
    assert values.count("aten.amax") == 1 and values.count("aten.amin") == 1
    places = rewrite(Normalize(), lambda x: torch.mul(*x.max(1)), x)
    assert not places.count("aten.amax")
