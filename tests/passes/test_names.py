"""Passes look at computations only: other names of modules, weights and nodes, and no origins, change nothing."""

from __future__ import annotations

import random
import re
import string
from typing import Any

import pytest
import torch
from graphs.causal_models import TinyCausal, traced
from models.zoo import build, cases
from torch import fx, nn

from llmopt.compiler.graph import graph_text
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import copy_graph, run_pipeline
from llmopt.passes.pipeline import step_pipeline

MORE = ("llama-tied-rope3", "gemma2", "gemma3", "gpt-neox", "opt", "bloom", "phi3", "qwen3-moe")


def anonymous(graph: fx.Graph, seed: int) -> fx.Graph:
    """A copy whose nodes and weights have random names, and know nothing of the model's code."""
    source, copy = random.Random(seed), copy_graph(graph)
    word = lambda: "".join(source.choices(string.ascii_lowercase, k=8))  # noqa: E731
    for node in copy.nodes:
        if node.op != "output":
            node.name = word()
        node.meta = {key: node.meta[key] for key in ("val", "weight") if key in node.meta}
        if node.meta.get("weight"):
            node.meta["weight"] = f"{word()}.{word()}"
    return copy


def outcome(graph: fx.Graph) -> tuple[list[Any], list[str]]:
    """Reports of the step pipeline, which holds every pass, and the graph with symbols numbered as they come."""
    reports = run_pipeline(graph, step_pipeline(16), Options())
    numbers: dict[str, str] = {}
    text = re.sub(r"\bs\d+\b", lambda m: numbers.setdefault(m[0], f"n{len(numbers)}"), graph_text(graph))
    return [(r.name, r.matched, dict(r.skipped), r.notes) for r in reports], text.splitlines()


@pytest.mark.parametrize("name", cases(("gpt2", "qwen3", "mixtral", *MORE), "gpt2", "qwen3"))
def test_names_in_the_graph_do_not_matter(name: str) -> None:
    model = build(name)
    graph = traced(lambda ids: model(input_ids=ids, use_cache=False).logits, 40).graph
    scrambled, plain = outcome(anonymous(graph, seed=4)), outcome(graph)
    assert scrambled == plain
    assert sum(matched for _, matched, _, _ in plain[0]) > 30


def rename_modules(model: nn.Module, seed: int) -> dict[str, str]:
    """Moves every submodule to a random name; the attribute that `forward` uses stays, outside of `_modules`."""
    source, names = random.Random(seed), dict[str, str]()
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            continue
        for name in list(module._modules):
            child = module._modules.pop(name)
            new = "".join(source.choices(string.ascii_lowercase, k=8))
            module._modules[new] = child
            module.__dict__[name] = child
            names[name] = new
    return names


def test_names_of_modules_do_not_matter() -> None:
    model, ids = TinyCausal(layers=2), torch.zeros(1, 4, dtype=torch.int64)
    plain, logits = outcome(traced(model).graph), model(ids)
    names = rename_modules(model, seed=5)
    assert {"embed", "qkv", "head", "norm"} <= names.keys()
    assert not {name.split(".")[0] for name, _ in model.named_parameters()} & names.keys()
    assert torch.equal(model(ids), logits)
    assert outcome(traced(model).graph) == plain
