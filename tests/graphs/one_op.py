"""A graph of a single op of the vocabulary, lowered and run as every compiled graph is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llmopt.codegen.lower import Lowered, lower
from llmopt.compiler.graph import fake_call
from llmopt.compiler.opspec import OpSpec
from llmopt.runtime.compiled import CompiledGraph


def one_op_graph(spec: OpSpec, sample: tuple[Any, ...]) -> tuple[fx.Graph, list[torch.Tensor]]:
    """The graph `outputs = op(*sample)` with every tensor of the sample as a placeholder, and those tensors."""
    graph, mode = fx.Graph(), FakeTensorMode()
    tensors: list[torch.Tensor] = []

    def lift(arg: Any) -> Any:
        if isinstance(arg, list):
            return [lift(item) for item in arg]
        if not isinstance(arg, torch.Tensor):
            return arg
        node = graph.placeholder(f"arg_{len(tensors)}")
        node.meta["val"] = mode.from_tensor(arg)
        tensors.append(arg)
        return node

    args = tuple(lift(arg) for arg in sample)
    node = graph.call_function(spec.overload, args)
    node.meta["val"] = fake_call(mode, spec.overload, args, {})
    if isinstance(node.meta["val"], torch.Tensor):
        graph.output([node])
        return graph, tensors
    parts = []
    for index, val in enumerate(node.meta["val"]):
        part = graph.call_function(operator.getitem, (node, index))
        part.meta["val"] = val
        parts.append(part)
    graph.output(parts)
    return graph, tensors


def run_compiled(spec: OpSpec, sample: tuple[Any, ...], threads: int = 2) -> tuple[list[torch.Tensor], Lowered]:
    """What the compiled op returns on `sample` (writing to what it mutates), and how it was lowered."""
    graph, tensors = one_op_graph(spec, sample)
    lowered = lower(graph)
    return list(CompiledGraph(graph, lowered, (), threads)(tensors)), lowered
