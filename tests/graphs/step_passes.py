"""What every test of a pass over step graphs does: run the passes before it, then it, and evaluate both graphs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from graphs.causal_models import HIDDEN, TinyCausal, traced
from torch import Tensor, fx, nn

from llmopt.compiler.graph import graph_text, placeholders
from llmopt.compiler.input_embeddings import marked
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport, run_pipeline
from llmopt.compiler.verify import Level, check_graph
from llmopt.passes.pipeline import step_pipeline

BLOCK = 4


class AttentionOnly(TinyCausal):
    """One layer without products: embeddings of tokens and positions, attention, a norm and the head."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        q = x.view(1, -1, 2, HIDDEN // 2).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.head(self.norm(y.transpose(1, 2).reshape(1, -1, HIDDEN)))


def graph_before(item: Pass, model: nn.Module, embedding: nn.Module | None = None, **options: Any) -> fx.Graph:
    """The step graph as `item` finds it; where `embedding` is given, its results are marked.

    `options` are those of the pipeline (`lora`, `prompt_embeds`), and what is left of them `Options`.
    """
    with marked(embedding) if embedding is not None else nullcontext():
        graph = traced(model).graph
    chosen = {name: options.pop(name) for name in ("lora", "prompt_embeds") if name in options}
    passes = step_pipeline(BLOCK, **chosen)
    run_pipeline(graph, passes[: [p.name for p in passes].index(item.name)], Options(**options))
    return graph


def run_pass(item: Pass, graph: fx.Graph, fuel: int = -1) -> PassReport:
    """Runs `item`; the graph stays legal."""
    report = item.run(graph, PassContext(Options(), fuel))
    graph.lint()
    check_graph(graph, Level.RAISED, item.name)
    return report


def assert_idempotent(item: Pass, graph: fx.Graph) -> None:
    """A second run of `item` finds nothing and changes nothing."""
    run_pass(item, graph)
    text = graph_text(graph)
    assert run_pass(item, graph).matched == 0
    assert graph_text(graph) == text


def evaluate(graph: fx.Graph, arguments: Mapping[str, Tensor]) -> Tensor:
    """The logits for arguments by name, of which copies are given: the caches are written."""
    copies = [arguments[node.name].clone() for node in placeholders(graph)]
    result: Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*copies)[0]
    return result
