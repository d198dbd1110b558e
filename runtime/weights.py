"""Binds weights to a program and notices when they have changed.

A program reads the user's own parameters in place, so an in-place edit needs nothing. What is computed from weights (a
transposed copy, `1 + weight`) is kept under the identity and version of its sources and made again when they changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import placeholders

Tensor = torch.Tensor


def _version(tensor: Tensor) -> int:
    """Counts in-place writes; inference tensors do not count, so they always look changed."""
    return -1 if tensor.is_inference() else tensor._version


class WeightBinder:
    """Turns the arguments of a graph into the weights of its program.

    Args:
        graph: the lowered graph.
        weights: for each weight slot of the program, a placeholder of `graph` or a node computed from such.
    """

    def __init__(self, graph: fx.Graph, weights: Sequence[Node]) -> None:
        index = {node: i for i, node in enumerate(placeholders(graph))}
        self.direct: list[int | None] = [index.get(node) for node in weights]
        derived = [node for node in weights if node not in index]
        self._recipe, sources = _subgraph(graph, derived)
        self.sources = [index[node] for node in sources]
        self._key: tuple[tuple[int, int], ...] | None = None
        self._made: list[Tensor] = []

    def resolve(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The weights in slot order, given the graph's arguments; derived ones are made only when a source changed."""
        if len(self._made) or self._recipe is not None:
            inputs = [arguments[i] for i in self.sources]
            key = tuple((t.data_ptr(), _version(t)) for t in inputs)
            if key != self._key or -1 in (version for _, version in key) or not self._made:
                with torch.no_grad():
                    self._made = list(self._recipe(*inputs)) if self._recipe is not None else []
                self._key = key
        made = iter(self._made)
        return [next(made) if i is None else arguments[i].detach() for i in self.direct]

    def refresh(self) -> None:
        """Forgets what was derived, for writes that no version counts (through `.data` or another process)."""
        self._key = None


def _subgraph(graph: fx.Graph, wanted: Sequence[Node]) -> tuple[fx.GraphModule | None, list[Node]]:
    """A module that computes `wanted` from the placeholders it returns beside it."""
    if not wanted:
        return None, []
    needed: set[Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copy, mapping, sources = fx.Graph(), dict[Node, Node](), []
    for node in graph.nodes:
        if node in needed:
            mapping[node] = copy.node_copy(node, lambda n: mapping[n])
            if node.op == "placeholder":
                sources.append(node)
    copy.output([mapping[node] for node in wanted])
    return fx.GraphModule({}, copy), sources
