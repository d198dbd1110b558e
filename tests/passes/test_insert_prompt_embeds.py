"""Tokens of a step may be given as embeddings, where the model takes those of its tokens and nothing else of them."""

from __future__ import annotations

import pytest
import torch
from graphs.causal_models import HIDDEN, TinyCausal, traced
from graphs.rewriting import Rewritten, assert_golden
from graphs.step_passes import AttentionOnly, assert_idempotent, evaluate, graph_before, run_pass
from torch import Tensor, fx, nn

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import nodes_of, placeholders, tensor
from llmopt.compiler.input_embeddings import INPUT_EMBEDDINGS, marked
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassReport, copy_graph, run_pipeline
from llmopt.compiler.step import EMBEDS_INPUTS, LORA_INPUTS, STEP_INPUTS
from llmopt.compiler.verify import sample_inputs
from llmopt.passes.insert_lora import InsertLora
from llmopt.passes.insert_prompt_embeds import InsertPromptEmbeds
from llmopt.passes.pipeline import step_pipeline

PASS = InsertPromptEmbeds()


def before(model: TinyCausal, embedding: nn.Module | None = None) -> fx.Graph:
    return graph_before(PASS, model, embedding or model.embed, prompt_embeds=True)


def run(graph: fx.Graph) -> PassReport:
    return run_pass(PASS, graph)


def test_golden() -> None:
    graph = before(AttentionOnly())
    original = copy_graph(graph)
    report = run(graph)
    assert report.matched == 1
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
arg_13: f32[23, 16]
unsqueeze: i64[1, s27] = aten.unsqueeze.default(arg_0, 0)
embedding: f32[1, s27, 16] = aten.embedding.default(arg_9, unsqueeze)
input_embeddings: f32[1, s27, 16] = llmopt_mark.input_embeddings.default(embedding)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_10, arg_1)
add: f32[1, s27, 16] = aten.add.Tensor(input_embeddings, embedding_1)
view: f32[1, s27, 2, 8] = aten.view.default(add, [1, -1, 2, 8])
paged_attention: f32[1, s27, 2, 8] = llmopt.paged_attention.default(view, view, view, arg_7, arg_8, arg_2, arg_5, arg_3, arg_4, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(paged_attention, [1, -1, 16])
index_select: f32[1, s54, 16] = aten.index_select.default(view_1, 1, arg_6)
layer_norm: f32[1, s54, 16] = llmopt.layer_norm.default(index_select, arg_11, arg_12, 1e-05)
linear: f32[1, s54, 23] = llmopt.linear.default(layer_norm, [arg_13], [None])
squeeze: f32[s54, 23] = aten.squeeze.dim(linear, 0)
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
arg_9: i64[s27]
arg_10: f32[s22, 16]
arg_11: f32[23, 16]
arg_12: f32[64, 16]
arg_13: f32[16]
arg_14: f32[16]
arg_15: f32[23, 16]
unsqueeze: i64[1, s27] = aten.unsqueeze.default(arg_0, 0)
embedding: f32[1, s27, 16] = aten.embedding.default(arg_11, unsqueeze)
ge: b8[s27] = aten.ge.Scalar(arg_9, 0)
clamp_min: i64[s27] = aten.clamp_min.default(arg_9, 0)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_10, clamp_min)
unsqueeze_1: b8[s27, 1] = aten.unsqueeze.default(ge, -1)
unsqueeze_2: f32[1, s27, 16] = aten.unsqueeze.default(embedding_1, 0)
where: f32[1, s27, 16] = aten.where.self(unsqueeze_1, unsqueeze_2, embedding)
embedding_2: f32[s27, 16] = aten.embedding.default(arg_12, arg_1)
add: f32[1, s27, 16] = aten.add.Tensor(where, embedding_2)
view: f32[1, s27, 2, 8] = aten.view.default(add, [1, -1, 2, 8])
paged_attention: f32[1, s27, 2, 8] = llmopt.paged_attention.default(view, view, view, arg_7, arg_8, arg_2, arg_5, arg_3, arg_4, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(paged_attention, [1, -1, 16])
index_select: f32[1, s54, 16] = aten.index_select.default(view_1, 1, arg_6)
layer_norm: f32[1, s54, 16] = llmopt.layer_norm.default(index_select, arg_13, arg_14, 1e-05)
linear: f32[1, s54, 23] = llmopt.linear.default(layer_norm, [arg_15], [None])
squeeze: f32[s54, 23] = aten.squeeze.dim(linear, 0)
return [squeeze]""",  # noqa: E501
    )


def test_inputs() -> None:
    graph = before(TinyCausal())
    run(graph)
    own = [node for node in placeholders(graph) if not node.meta.get("weight")]
    assert [node.name for node in own] == [*STEP_INPUTS, "k_cache_0", "v_cache_0", *EMBEDS_INPUTS]
    index, rows = (tensor(node) for node in own[-2:])
    assert str(index.shape[0]) == str(tensor(own[0]).shape[0]) != str(rows.shape[0])
    assert rows.shape[1] == HIDDEN and (index.dtype, rows.dtype) == (torch.int64, torch.float32)


def test_a_second_run_finds_nothing() -> None:
    assert_idempotent(PASS, before(TinyCausal()))


def test_results() -> None:
    """Without embeddings as before, to the bit; with those of other tokens as with these tokens."""
    model = TinyCausal()
    graph = before(model)
    original, _ = copy_graph(graph), run(graph)
    arguments = dict(zip([n.name for n in placeholders(graph)], sample_inputs(graph, 3), strict=True))

    def logits(of: fx.Graph, **changed: Tensor) -> Tensor:
        return evaluate(of, {**arguments, **changed})

    ids = arguments["input_ids"]
    none = torch.full(ids.shape, -1)
    assert torch.equal(logits(graph, prompt_embeds_index=none), logits(original))
    (table,) = (n.name for n in placeholders(graph) if n.meta.get("weight") == "embed.weight")
    index = torch.tensor([-1, 2, 0, -1, 1, 1, -1, 2])
    tokens = torch.tensor([7, 11, 3])
    rows = arguments[table][tokens]
    changed = torch.where(index >= 0, tokens[index.clamp(0)], ids)
    expected = logits(original, input_ids=changed)
    assert torch.equal(logits(graph, prompt_embeds_index=index, prompt_embeds=rows), expected)
    assert float((expected - logits(original)).abs().max()) > 1e-2


def test_the_whole_pipeline_in_verify_mode_and_with_adapters() -> None:
    model = TinyCausal()
    with marked(model.embed):
        graph = traced(model).graph
    lora = InsertLora(max_loras=2, max_rank=3)
    run_pipeline(graph, step_pipeline(4, lora=lora, prompt_embeds=True), Options(verify=True))
    own = [node.name for node in placeholders(graph) if not node.meta.get("weight")]
    assert own[-6:] == [*LORA_INPUTS, *EMBEDS_INPUTS]
    assert not list(nodes_of(graph, INPUT_EMBEDDINGS))


def test_marks_change_nothing_and_go() -> None:
    model, ids = TinyCausal(), torch.tensor([[1, 2, 3]])
    plain = model(ids)
    with marked(model.embed):
        assert torch.equal(model(ids), plain)
    assert not model.embed._forward_hooks


class Twice(TinyCausal):
    """One embedding, called twice."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, p: x + m.embed(p % 7))


class Reads(TinyCausal):
    """Ids are used besides their embeddings."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + ids[..., None]


@pytest.mark.parametrize(
    ("model", "embedding", "reason"),
    [
        (Twice(), "embed", "in 2 places"),
        (Reads(), "embed", "besides their embeddings"),
        (TinyCausal(), "places", "not that of its tokens"),
        (TinyCausal(), "norm", "in 2 places"),
        (AttentionOnly(), "norm", "besides their embeddings"),
        (TinyCausal(), "conv", "in 0 places"),
    ],
    ids=["twice", "ids", "of positions", "several", "behind a layer", "never called"],
)
def test_must_not_fire(model: TinyCausal, embedding: str, reason: str) -> None:
    graph = before(model, getattr(model, embedding))
    with pytest.raises(UnsupportedError, match=reason):
        run(graph)


def test_only_with_the_option_and_for_step_programs() -> None:
    assert InsertPromptEmbeds.name not in [item.name for item in step_pipeline(4)]
    with pytest.raises(UnsupportedError, match="step programs"):
        run(traced(TinyCausal()).graph)
