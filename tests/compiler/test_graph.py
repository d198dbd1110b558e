"""Editing graphs: values and origins stay right, views find their memory, and the printed form is stable."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from graphs.capturing import catch
from graphs.causal_models import TinyCausal, traced
from torch import Tensor

from llmopt.compiler.errors import VerificationError
from llmopt.compiler.graph import (
    Rewriter,
    aten,
    fake_call,
    fake_mode,
    graph_text,
    is_op,
    is_tensor,
    location,
    nodes_of,
    outputs,
    placeholders,
    refresh_values,
    same_shape,
    same_size,
    tensor,
    to_expr,
    value,
    view_base,
)
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND, step_pipeline


def double_cos(x: Tensor) -> Tensor:
    return torch.cos(x) * 2


def test_call_computes_the_value_and_inherits_the_origin() -> None:
    graph = catch(double_cos, torch.randn(3, 5), dynamic=True).graph
    (cos,) = nodes_of(graph, aten.cos.default)
    rewriter = Rewriter(graph)
    with rewriter.before(cos):
        new = rewriter.call(aten.sin.default, cos.args[0])
    assert same_shape(tensor(new).shape, tensor(cos).shape)
    assert tensor(new).dtype == torch.float32
    assert location(new) == location(cos)
    assert "test_graph.py" in str(location(new)) and "torch.cos(x) * 2" in str(location(new))
    assert list(graph.nodes).index(new) == list(graph.nodes).index(cos) - 1
    with rewriter.after(cos):
        later = rewriter.call(aten._to_copy.default, cos, dtype=torch.bfloat16)
    assert tensor(later).dtype == torch.bfloat16
    assert list(graph.nodes).index(later) == list(graph.nodes).index(cos) + 1
    graph.lint()


def test_replace_erases_what_only_the_old_node_needed() -> None:
    graph = catch(lambda x, y: torch.exp(torch.cos(x) + y), torch.randn(4), torch.randn(4)).graph
    (exp,), (x, y) = nodes_of(graph, aten.exp.default), placeholders(graph)
    rewriter = Rewriter(graph)
    with rewriter.before(exp):
        new = rewriter.call(aten.sin.default, y)
    rewriter.replace(exp, new)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.sin.default]
    assert placeholders(graph) == [x, y]  # inputs stay, used or not
    rewriter.erase(new)  # still used by the output
    assert outputs(graph) == [new]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda x: x.double(), r"cos \(aten.cos.default\) would change from f32\[4\] on cpu to f64\[4\] on cpu"),
        (lambda x: x.to("meta"), r"to f32\[4\] on meta"),
        (lambda x: x[:1], r"to f32\[1\] on cpu"),
        (lambda x: x[None], r"to f32\[1, 4\] on cpu"),
    ],
)
def test_replace_refuses_a_value_of_another_type(other: Callable[[Tensor], Tensor], text: str) -> None:
    graph = catch(lambda x: (torch.cos(x), other(x)), torch.randn(4)).graph
    before, (cos, by) = graph_text(graph), outputs(graph)
    with pytest.raises(VerificationError, match=text):
        Rewriter(graph).replace(cos, by)
    assert graph_text(graph) == before


def test_replace_takes_sizes_that_are_written_otherwise() -> None:
    graph = catch(lambda x: (x.cos(), x[: x.shape[0] // 2 * 2].sin()), torch.randn(4, 3), marked=[(0, 0)]).graph
    cos, sin = outputs(graph)
    assert not same_shape(tensor(cos).shape, tensor(sin).shape)
    Rewriter(graph).replace(cos, sin)
    assert outputs(graph) == [sin, sin]


def test_view_base_walks_up_to_the_memory() -> None:
    def views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.cos(x)
        first, _ = y.chunk(2, 0)
        return y.transpose(0, 1)[1:].unsqueeze(0), first.view(-1), y.clone().view(-1)

    graph = catch(views, torch.randn(4, 6)).graph
    (cos,) = nodes_of(graph, aten.cos.default)
    turned, piece, copy = outputs(graph)
    assert view_base(turned) is cos and view_base(piece) is cos
    assert is_op(view_base(copy), aten.clone.default)
    assert view_base(placeholders(graph)[0]) is placeholders(graph)[0]


def test_a_part_of_a_computed_tuple_owns_its_memory() -> None:
    graph = catch(lambda x: torch.topk(x, 2), torch.randn(3, 5)).graph
    values, indices = outputs(graph)
    assert is_op(values, operator.getitem) and view_base(values) is values and view_base(indices) is indices


def test_sizes_are_compared_for_every_value() -> None:
    graph = catch(lambda x: (x.repeat(1, 2), x.flatten()), torch.randn(3, 4), dynamic=True).graph
    (x, *_) = [n for n in placeholders(graph) if is_tensor(n)]
    doubled, flat = map(tensor, outputs(graph))
    rows, columns = tensor(x).shape
    assert same_size(doubled.shape[1], columns * 2) and not same_size(doubled.shape[1], columns)
    assert same_size(flat.shape[0], rows * columns)
    assert not same_size(rows, 3), "a hint is not a size"
    assert not same_shape(doubled.shape, flat.shape)
    assert to_expr(columns).free_symbols and to_expr(7) == 7


def test_typed_access_says_what_is_missing() -> None:
    graph = catch(lambda x: torch.topk(x, 2), torch.randn(3, 5)).graph
    (topk,) = nodes_of(graph, aten.topk.default)
    with pytest.raises(TypeError, match="topk"):
        tensor(topk)
    del topk.meta["val"]
    with pytest.raises(KeyError):
        value(topk)
    assert fake_mode(graph) is fake_mode(graph)


def test_text_is_readable_and_independent_of_names() -> None:
    captured = catch(double_cos, torch.randn(3, 5))
    text = "arg_0: f32[3, 5]\ncos: f32[3, 5] = aten.cos.default(arg_0)\n"
    text += "mul: f32[3, 5] = aten.mul.Tensor(cos, 2)\nreturn [mul]"
    assert graph_text(captured.graph) == text
    for node in captured.graph.nodes:
        node.name = f"renamed_{node.name}"
    assert graph_text(captured.graph) == text


def test_text_shows_every_difference() -> None:
    def text(function: object, *args: Tensor) -> str:
        return graph_text(catch(function, *args).graph)  # type: ignore[arg-type]

    x = torch.randn(3, 5)
    variants = [
        text(double_cos, x),
        text(double_cos, x.bfloat16()),
        text(double_cos, x[:2]),
        text(lambda x: torch.cos(x) * 3, x),
        text(lambda x: torch.sin(x) * 2, x),
        text(lambda x: 2 * torch.cos(x.to(torch.float64)), x),
    ]
    assert len(set(variants)) == len(variants)


def test_only_values_that_read_others_than_before_are_computed_again() -> None:
    caught = catch(lambda x: ((x * 2).t() + 1).sin(), torch.randn(3, 5), dynamic=True)
    graph = caught.graph
    before = {node: node.meta["val"] for node in graph.nodes if node.op == "call_function"}
    refresh_values(graph)
    assert all(node.meta["val"] is val for node, val in before.items())
    (turned,) = [node for node in before if node.target in (aten.t.default, aten.transpose.int, aten.permute.default)]
    rewriter = Rewriter(graph)
    (user,) = turned.users
    with rewriter.before(user):
        dense = rewriter.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    user.replace_input_with(turned, dense)
    refresh_values(graph)
    assert turned.meta["val"] is before[turned]
    for node in (user, *user.users):
        if node.op == "call_function":
            assert node.meta["val"] is not before[node]
            assert str(node.meta["val"].stride()) == str(dense.meta["val"].stride())


@pytest.mark.parametrize("pipeline", ["step", "backend"])
def test_after_the_passes_every_value_is_what_its_op_gives(pipeline: str) -> None:
    if pipeline == "step":
        graph = traced(TinyCausal(layers=2)).graph
        run_pipeline(graph, step_pipeline(4), Options())
    else:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        graph = catch(layer, torch.randn(2, 5, 16), dynamic=True).graph
        run_pipeline(graph, BACKEND, Options())
    mode = fake_mode(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            fresh = fake_call(mode, node.target, node.args, node.kwargs)
            kept = node.meta["val"]
            if isinstance(kept, torch.Tensor):
                facts = [(v.dtype, list(v.shape), list(v.stride()), v.storage_offset()) for v in (kept, fresh)]
                assert str(facts[0]) == str(facts[1]), node
