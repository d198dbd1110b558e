"""The verifier: what each level of the graph allows, and that a pass which changes results is found and named."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs.capturing import catch
from torch import Tensor, fx, nn

from llmopt.codegen.select import Selection, select_kernels
from llmopt.compiler.errors import UnsupportedError, VerificationError
from llmopt.compiler.graph import Rewriter, aten, nodes_of, outputs, placeholders
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport, run_pipeline
from llmopt.compiler.verify import (
    Binding,
    Level,
    check_bindings,
    check_graph,
    compare_graphs,
    find_violation,
    sample_inputs,
)
from llmopt.compiler.vocabulary import llmopt_ops


def simple() -> fx.Graph:
    return catch(lambda x: torch.cos(x) * x.shape[0] + 1, torch.randn(4, 6), dynamic=True).graph


def test_a_captured_graph_is_legal_at_every_level() -> None:
    for level in Level:
        assert find_violation(simple(), level) is None


def test_vocabulary_only_from_the_raised_level_on() -> None:
    graph = simple()
    (cos,) = nodes_of(graph, aten.cos.default)
    rewriter = Rewriter(graph)
    with rewriter.after(cos):
        norm = rewriter.call(llmopt_ops.rms_norm.default, cos, None, 1e-5, 0.0, True)
    check_graph(graph, Level.RAISED, "test")
    with pytest.raises(VerificationError, match=r"after raise_test: .*rms_norm.*before any pass has raised"):
        check_graph(graph, Level.CAPTURED, "raise_test")
    assert find_violation(graph, Level.CAPTURED).node is norm  # type: ignore[union-attr]


def test_nodes_without_a_value() -> None:
    for op in ("placeholder", "call_function"):
        graph = simple()
        del next(n for n in graph.nodes if n.op == op).meta["val"]
        with pytest.raises(VerificationError, match=r"after some_pass: .* no value"):
            check_graph(graph, Level.RAISED, "some_pass")


def test_attributes_modules_and_methods() -> None:
    for op, target in (("get_attr", "weight"), ("call_module", "layer"), ("call_method", "cos")):
        graph = simple()
        first = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_before(first):
            node = graph.create_node(op, target, () if op == "get_attr" else (placeholders(graph)[0],))
        node.meta["val"] = first.meta["val"]
        with pytest.raises(VerificationError, match=op):
            check_graph(graph, Level.BOUND, "some_pass")


def test_ops_that_write() -> None:
    graph = simple()
    (cos,) = nodes_of(graph, aten.cos.default)
    rewriter = Rewriter(graph)
    with rewriter.after(cos):
        rewriter.call(aten.mul_.Tensor, cos, 2)
    with pytest.raises(VerificationError, match=r"mul_.*must be functional"):
        check_graph(graph, Level.RAISED, "some_pass")


def test_python_functions_of_tensors() -> None:
    graph = simple()
    (cos,) = nodes_of(graph, aten.cos.default)
    with graph.inserting_after(cos):
        node = graph.call_function(torch.sin, (cos,))
    node.meta["val"] = cos.meta["val"]
    with pytest.raises(VerificationError, match="neither an op of PyTorch's dispatcher nor arithmetic"):
        check_graph(graph, Level.RAISED, "some_pass")
    with graph.inserting_before(node):  # arithmetic on sizes is legal
        size = graph.call_function(operator.mul, (3, 5))
    size.meta["val"] = 15
    assert find_violation(graph, Level.RAISED).node is node  # type: ignore[union-attr]


def test_a_model_that_calls_the_vocabulary_itself_is_refused_with_its_line() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.ops.llmopt.rms_norm(x, None, 1e-5, 0.0, True)

    graph = catch(model, torch.randn(3, 8)).graph
    with pytest.raises(UnsupportedError) as caught:
        run_pipeline(graph, (), Options())
    assert caught.value.operation == "llmopt.rms_norm.default"
    assert "test_verify.py" in str(caught.value.location)


# ---- bindings ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cos(self.proj(torch.softmax(x, -1)) + 1)
        return y, torch.linalg.det(y)


def selected() -> tuple[fx.Graph, Selection]:
    graph = catch(Block(), torch.randn(8, 8)).graph
    return graph, select_kernels(graph)


def test_a_selection_binds_every_value_once() -> None:
    graph, selection = selected()
    bindings = selection.bindings()
    check_bindings(graph, selection.constants, bindings)
    makers = {node: b.maker for b in bindings for node in b.writes}
    assert "softmax" in makers[next(nodes_of(graph, aten.softmax.int))]
    cos, det = outputs(graph)
    assert "loop" in makers[cos] and makers[det] == "ATen"
    assert all(b.reason for b in bindings if b.maker == "ATen")


def test_a_missing_binding_is_found() -> None:
    graph, selection = selected()
    bindings = selection.bindings()
    for missing in bindings:
        with pytest.raises(VerificationError, match="nothing computes"):
            check_bindings(graph, selection.constants, [b for b in bindings if b is not missing])


def test_a_second_binding_is_found() -> None:
    graph, selection = selected()
    bindings = selection.bindings()
    for again in bindings:
        with pytest.raises(VerificationError, match="and again by the test"):
            check_bindings(graph, selection.constants, [*bindings, Binding("the test", again.writes, ())])
    with pytest.raises(VerificationError, match="constant and again"):
        check_bindings(graph, {*selection.constants, bindings[0].writes[0]}, bindings)


def test_a_fallback_needs_a_reason() -> None:
    graph, selection = selected()
    selection.fallbacks = dict.fromkeys(selection.fallbacks, " ")
    with pytest.raises(VerificationError, match="without a reason"):
        check_bindings(graph, selection.constants, selection.bindings())


# ---- comparing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the first output: what a wrong pass does."""

    name = "scale_for_test"
    factor: float = 1.0

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        (last,) = outputs(graph)
        rewriter = Rewriter(graph)
        with rewriter.after(last):
            new = rewriter.call(aten.mul.Tensor, last, self.factor)
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return PassReport(self.name, matched=1)


@dataclass(frozen=True)
class TolerantScale(Scale):
    """The same with a budget of its own, as a quantizing pass has."""

    name = "tolerant_scale_for_test"
    budget = 1e4


def test_verify_mode_names_the_pass_that_changed_results() -> None:
    harmless = run_pipeline(simple(), (Scale(), Scale(factor=1 + 1e-7)), Options(verify=True))
    assert [report.max_error is not None and report.max_error < 1 for report in harmless] == [True, True]
    with pytest.raises(VerificationError, match=r"scale_for_test changed output 0 by .* its budget is 1.0"):
        run_pipeline(simple(), (Scale(), Scale(factor=1.01)), Options(verify=True))
    assert run_pipeline(simple(), (Scale(factor=1.01),), Options())[0].max_error is None
    (report,) = run_pipeline(simple(), (TolerantScale(factor=1.01),), Options(verify=True))
    assert report.max_error is not None and report.max_error > 1


def _identity(extra: Any = None) -> fx.Graph:
    return catch(lambda x: extra(x) if extra else x * 1, torch.randn(3, 4)).graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.bfloat16(), "to torch.bfloat16"),
        (lambda x: x[:2] * 1, r"to torch.float32\[2, 4\]"),
        (lambda x: torch.where(x > 0, x, torch.nan), "by inf"),
        (lambda x: torch.where(x > 0, x, torch.inf), "by inf"),
        (lambda x: x + 1e-3, "times the tolerance"),
    ],
)
def test_compare_graphs_sees(change: Any, message: str) -> None:
    inputs = [torch.randn(3, 4)]
    with pytest.raises(VerificationError, match=message):
        compare_graphs(_identity(), _identity(change), inputs, "some_pass", 1.0)


def test_compare_graphs_accepts_equal_infinities_and_rounding() -> None:
    inputs = [torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]] * 3)]
    assert compare_graphs(_identity(), _identity(), inputs, "p", 1.0) == 0.0
    assert 0 < compare_graphs(_identity(), _identity(lambda x: x * (1 + 1e-6)), [torch.randn(3, 4)], "p", 1.0) < 1


def test_compare_graphs_draws_the_same_random_numbers_for_both() -> None:
    x = torch.randn(3, 4)
    graph = catch(lambda x: x + torch.rand_like(x), x).graph
    state = torch.get_rng_state()
    assert compare_graphs(graph, graph, [x], "itself", 0.0) == 0.0
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator goes on where it was"


def test_compare_graphs_sees_imaginary_parts() -> None:
    graphs = [catch(lambda x, s=sign: torch.complex(x, s * x), torch.randn(3, 4)).graph for sign in (1.0, -1.0)]
    with pytest.raises(VerificationError, match="times the tolerance"):
        compare_graphs(*graphs, [torch.randn(3, 4)], "some_pass", 1.0)


def test_compare_graphs_holds_float64_to_its_own_precision() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    graphs = [catch(f, x).graph for f in (lambda x: x * 2, lambda x: (x.float() * 2).double())]
    with pytest.raises(VerificationError, match="times the tolerance"):
        compare_graphs(*graphs, [x], "some_pass", 1.0)


def test_sampled_masks_hide_some_places() -> None:
    graph = catch(lambda x, m: x * m, torch.randn(5, 9), torch.ones(5, 9, dtype=torch.bool)).graph
    mask = sample_inputs(graph)[1]
    assert not mask.all() and (mask[:, 1:] | mask[:, :-1]).all() and mask[:, 0].all()


def test_sampled_inputs_fit_their_placeholders() -> None:
    def model(table: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return table[ids].masked_fill(~mask[..., None], 0.0)

    args = (torch.randn(7, 4).bfloat16(), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))
    graph = catch(model, *args, dynamic=True).graph
    first, again, other = sample_inputs(graph), sample_inputs(graph), sample_inputs(graph, seed=1)
    tensors = [t for t in first if isinstance(t, torch.Tensor)]
    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in args]
    pairs = list(zip(first, again, other, strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs if isinstance(a, torch.Tensor))
    assert any(not torch.equal(a, c) for a, _, c in pairs if isinstance(a, torch.Tensor))
    assert compare_graphs(graph, graph, first, "itself", 0.0) == 0.0
