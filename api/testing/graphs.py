"""Graphs to test on: of a call as the backend would capture it, and of a single op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llmopt.compiler.capture import Captured, capture
from llmopt.compiler.graph import fake_call, placeholders
from llmopt.compiler.opspec import OpSpec


@dataclass
class CapturedCall:
    """A captured graph and the arguments, in the order of its placeholders, that it was captured on."""

    captured: Captured
    arguments: list[Any]

    @property
    def graph(self) -> fx.Graph:
        """What passes rewrite."""
        return self.captured.graph

    def run(self) -> list[Any]:
        """Runs the graph node by node in PyTorch."""
        with torch.no_grad():
            return list(fx.Interpreter(fx.GraphModule({}, self.graph)).run(*self.arguments))


def capture_call(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> CapturedCall:
    """Captures `function(*args)`, a module or a function, as the backend would; it must be one graph."""
    caught: list[CapturedCall] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        captured = capture(gm, example_inputs)
        for index, node in enumerate(placeholders(captured.graph)):
            if index not in captured.mutations:
                node.meta["weight"] = captured.weights[index]
        caught.append(CapturedCall(captured, [*example_inputs, *captured.constants]))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return caught[-1]


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
