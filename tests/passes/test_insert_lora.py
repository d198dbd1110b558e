"""Products of a step get a place for adapters; what has no module of its own is left alone, with reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs.causal_models import HIDDEN, VOCABULARY, TinyCausal, traced
from graphs.rewriting import Rewritten, assert_golden
from graphs.step_passes import assert_idempotent, evaluate, graph_before, run_pass
from torch import fx, nn

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import nodes_of, placeholders, tensor
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassReport, copy_graph, run_pipeline
from llmopt.compiler.step import LORA_INPUTS, STEP_INPUTS, LoraSpec
from llmopt.compiler.verify import sample_inputs
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.insert_lora import InsertLora
from llmopt.passes.pipeline import step_pipeline

LORA = InsertLora(max_loras=2, max_rank=3)


def before(model: nn.Module, **options: Any) -> fx.Graph:
    return graph_before(LORA, model, lora=LORA, **options)


def run(graph: fx.Graph, fuel: int = -1) -> PassReport:
    return run_pass(LORA, graph, fuel)


def spec_of(graph: fx.Graph) -> LoraSpec:
    return next(node.meta["lora"] for node in placeholders(graph) if "lora" in node.meta)


class Projections(TinyCausal):
    """Query, key and value apart, so that they are merged."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, p: x + m.a(x) * m.b(x))
        self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)


def test_golden() -> None:
    graph = before(TinyCausal())
    original = copy_graph(graph)
    report = run(graph)
    assert report.matched == 3 and report.notes == ["3 projections, 2 adapters of rank 3 or less"]
    assert_golden(
        Rewritten(original, graph, report),
        """\
arg_0: i64[s27]
arg_1: i64[s27]
arg_2: i64[s27]
arg_3: i32[s45 + 1]
arg_4: i32[s45]
arg_5: i32[s45, s66]
arg_6: i64[s54]
arg_7: f32[s83, 2, 4, 8]
arg_8: f32[s83, 2, 4, 8]
arg_9: f32[23, 16]
arg_10: f32[64, 16]
arg_11: f32[16]
arg_12: f32[16]
arg_13: f32[48, 16]
arg_14: f32[48]
arg_15: f32[16, 16]
arg_16: f32[16]
arg_17: f32[23, 16]
unsqueeze: i64[1, s27] = aten.unsqueeze.default(arg_0, 0)
embedding: f32[1, s27, 16] = aten.embedding.default(arg_9, unsqueeze)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_10, arg_1)
add: f32[1, s27, 16] = aten.add.Tensor(embedding, embedding_1)
layer_norm: f32[1, s27, 16] = llmopt.layer_norm.default(add, arg_11, arg_12, 1e-05)
linear: f32[1, s27, 48] = llmopt.linear.default(layer_norm, [arg_13], [arg_14])
view: f32[1, s27, 3, 2, 8] = aten.view.default(linear, [1, -1, 3, 2, 8])
permute: f32[3, 1, 2, s27, 8] = aten.permute.default(view, [2, 0, 3, 1, 4])
select: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 0)
select_1: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 1)
select_2: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 2)
transpose: f32[1, s27, 2, 8] = aten.transpose.int(select, 1, 2)
transpose_1: f32[1, s27, 2, 8] = aten.transpose.int(select_1, 1, 2)
transpose_2: f32[1, s27, 2, 8] = aten.transpose.int(select_2, 1, 2)
paged_attention: f32[1, s27, 2, 8] = llmopt.paged_attention.default(transpose, transpose_1, transpose_2, arg_7, arg_8, arg_2, arg_5, arg_3, arg_4, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(paged_attention, [1, -1, 16])
linear_1: f32[1, s27, 16] = llmopt.linear.default(view_1, [arg_15], [arg_16])
add_1: f32[1, s27, 16] = aten.add.Tensor(add, linear_1)
index_select: f32[1, s54, 16] = aten.index_select.default(add_1, 1, arg_6)
layer_norm_1: f32[1, s54, 16] = llmopt.layer_norm.default(index_select, arg_11, arg_12, 1e-05)
linear_2: f32[1, s54, 23] = llmopt.linear.default(layer_norm_1, [arg_17], [None])
squeeze: f32[s54, 23] = aten.squeeze.dim(linear_2, 0)
return [squeeze]
---
arg_0: i64[s27]
arg_1: i64[s27]
arg_2: i64[s27]
arg_3: i32[s45 + 1]
arg_4: i32[s45]
arg_5: i32[s45, s66]
arg_6: i64[s54]
arg_7: f32[s83, 2, 4, 8]
arg_8: f32[s83, 2, 4, 8]
arg_9: i32[s27]
arg_10: f32[2, 405]
arg_11: i32[3, 2]
arg_12: f32[3, 2]
arg_13: f32[23, 16]
arg_14: f32[64, 16]
arg_15: f32[16]
arg_16: f32[16]
arg_17: f32[48, 16]
arg_18: f32[48]
arg_19: f32[16, 16]
arg_20: f32[16]
arg_21: f32[23, 16]
unsqueeze: i64[1, s27] = aten.unsqueeze.default(arg_0, 0)
embedding: f32[1, s27, 16] = aten.embedding.default(arg_13, unsqueeze)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_14, arg_1)
add: f32[1, s27, 16] = aten.add.Tensor(embedding, embedding_1)
layer_norm: f32[1, s27, 16] = llmopt.layer_norm.default(add, arg_15, arg_16, 1e-05)
linear: f32[1, s27, 48] = llmopt.linear.default(layer_norm, [arg_17], [arg_18])
lora: f32[1, s27, 48] = llmopt.lora.default(linear, layer_norm, arg_10, arg_11, arg_12, arg_9, 3, [0], [0], [48], [0])
view: f32[1, s27, 3, 2, 8] = aten.view.default(lora, [1, -1, 3, 2, 8])
permute: f32[3, 1, 2, s27, 8] = aten.permute.default(view, [2, 0, 3, 1, 4])
select: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 0)
select_1: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 1)
select_2: f32[1, 2, s27, 8] = aten.select.int(permute, 0, 2)
transpose: f32[1, s27, 2, 8] = aten.transpose.int(select, 1, 2)
transpose_1: f32[1, s27, 2, 8] = aten.transpose.int(select_1, 1, 2)
transpose_2: f32[1, s27, 2, 8] = aten.transpose.int(select_2, 1, 2)
paged_attention: f32[1, s27, 2, 8] = llmopt.paged_attention.default(transpose, transpose_1, transpose_2, arg_7, arg_8, arg_2, arg_5, arg_3, arg_4, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(paged_attention, [1, -1, 16])
linear_1: f32[1, s27, 16] = llmopt.linear.default(view_1, [arg_19], [arg_20])
lora_1: f32[1, s27, 16] = llmopt.lora.default(linear_1, view_1, arg_10, arg_11, arg_12, arg_9, 3, [1], [0], [16], [192])
add_1: f32[1, s27, 16] = aten.add.Tensor(add, lora_1)
index_select: f32[1, s54, 16] = aten.index_select.default(add_1, 1, arg_6)
layer_norm_1: f32[1, s54, 16] = llmopt.layer_norm.default(index_select, arg_15, arg_16, 1e-05)
index_select_1: i32[s54] = aten.index_select.default(arg_9, 0, arg_6)
linear_2: f32[1, s54, 23] = llmopt.linear.default(layer_norm_1, [arg_21], [None])
lora_2: f32[1, s54, 23] = llmopt.lora.default(linear_2, layer_norm_1, arg_10, arg_11, arg_12, index_select_1, 3, [2], [0], [23], [288])
squeeze: f32[s54, 23] = aten.squeeze.dim(lora_2, 0)
return [squeeze]""",  # noqa: E501
    )


def test_merged_products_have_one_place_for_each_part() -> None:
    graph = before(Projections())
    assert run(graph).matched == 4
    names = [target.name for target in spec_of(graph).targets]
    assert sorted(names) == ["a", "b", "head", "out.0", "qkv.0"]
    merged = next(node for node in nodes_of(graph, llmopt_ops.lora.default) if len(node.args[7]) == 2)
    assert merged.args[8:10] == ([0, HIDDEN], [HIDDEN, HIDDEN]), "columns and sizes"
    sizes = {target.name: (target.in_features, target.out_features) for target in spec_of(graph).targets}
    assert sizes["qkv.0"] == (HIDDEN, 3 * HIDDEN) and sizes["head"] == (HIDDEN, VOCABULARY)
    assert all(len(node.users) == 1 for node in nodes_of(graph, llmopt_ops.linear.default)), "all read the sum"


def test_inputs() -> None:
    graph = before(TinyCausal())
    run(graph)
    nodes = placeholders(graph)
    own = [node.name for node in nodes if not node.meta.get("weight")]
    assert own == [*STEP_INPUTS, "k_cache_0", "v_cache_0", *LORA_INPUTS], "behind the caches, before the weights"
    spec, shapes = spec_of(graph), {node.name: tuple(tensor(node).shape) for node in nodes}
    assert shapes["lora_pool"] == (2, spec.slot_elements)
    assert shapes["lora_ranks"] == shapes["lora_scales"] == (3, 2)
    assert spec.offsets == (0, 3 * 4 * HIDDEN, 3 * 6 * HIDDEN, 3 * (7 * HIDDEN + VOCABULARY))


def test_a_second_run_finds_nothing() -> None:
    assert_idempotent(LORA, before(TinyCausal()))


def test_results() -> None:
    """On one graph: with all ranks zero as before; with adapters as weights with B @ A added, row by row."""
    graph = before(TinyCausal())
    original, _ = copy_graph(graph), run(graph)
    nodes = placeholders(graph)
    arguments = dict(zip([n.name for n in nodes], sample_inputs(graph, 3), strict=True))
    spec = spec_of(graph)

    plain = evaluate(original, arguments)
    arguments["lora_ranks"].zero_()
    assert torch.equal(evaluate(graph, arguments), plain)
    arguments["lora_ranks"].fill_(2)
    arguments["adapter_index"].fill_(-1)
    assert torch.equal(evaluate(graph, arguments), plain)
    arguments["adapter_index"].fill_(1)
    changed = dict(arguments)
    for number, target in enumerate(spec.targets):
        begin, behind = spec.places(number)
        a = arguments["lora_pool"][1, begin : begin + 2 * target.in_features].view(2, -1)
        b = arguments["lora_pool"][1, behind : behind + 2 * target.out_features].view(2, -1)
        (weight,) = [n.name for n in nodes if n.meta.get("weight") == f"{target.name}.weight"]
        changed[weight] = arguments[weight] + arguments["lora_scales"][number, 1] * (b.T @ a)
    expected = evaluate(original, changed)
    assert float((expected - plain).abs().max()) > 1e-2
    torch.testing.assert_close(evaluate(graph, arguments), expected, rtol=1e-4, atol=1e-4)


class Computed(TinyCausal):
    """A product with a weight that is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, p: torch.nn.functional.linear(x, m.table * 2))
        self.table = nn.Parameter(torch.randn(HIDDEN, HIDDEN))


class Twice(TinyCausal):
    """One module, called twice."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, p: m.shared(m.shared(x).tanh()))
        self.shared = nn.Linear(HIDDEN, HIDDEN)


class Heads(TinyCausal):
    """A product of every head of every token: its rows are not the tokens."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, p: m.small(x.view(1, -1, 2, HIDDEN // 2)).view(1, -1, HIDDEN))
        self.small = nn.Linear(HIDDEN // 2, HIDDEN // 2)


LEFT_ALONE = [
    (Computed, "a weight is computed, or not named after a module"),
    (Twice, "one weight serves several products"),
    (Heads, "its rows are not the tokens of the step"),
]


@pytest.mark.parametrize(("kind", "reason"), LEFT_ALONE, ids=[kind.__name__ for kind, _ in LEFT_ALONE])
def test_must_not_fire(kind: type[TinyCausal], reason: str) -> None:
    graph = before(kind())
    report = run(graph)
    assert report.skipped[reason] > 0
    assert sorted(target.name for target in spec_of(graph).targets) == ["head", "out.0", "qkv.0"]


def test_no_product_at_all() -> None:
    graph = before(TinyCausal(), disabled_passes=("raise_linear",))
    with pytest.raises(UnsupportedError, match="no product can have an adapter"):
        run(graph)


def test_fuel() -> None:
    graph = before(TinyCausal())
    assert run(graph, fuel=1).matched == 1
    assert len(spec_of(graph).targets) == 1


def test_only_with_the_option() -> None:
    assert LORA.name not in [item.name for item in step_pipeline(4)]


def test_the_rest_of_the_pipeline_in_verify_mode() -> None:
    graph = traced(Projections()).graph
    reports = run_pipeline(graph, step_pipeline(4, lora=LORA), Options(verify=True))
    assert sum(report.matched for report in reports if report.name == LORA.name) == 4
