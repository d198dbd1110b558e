"""Binds weights to a program and notices when they have changed.

A program reads the user's own parameters in place, so an in-place edit needs nothing. What is computed from weights (a
transposed copy, `1 + weight`) is kept under the identity and version of its sources and made again when they changed.
An address is no identity: once a source is gone, the next may get the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node, map_aggregate, map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from llmopt.compiler.errors import VerificationError
from llmopt.compiler.graph import placeholders
from llmopt.runtime.mapped_pages import MappedPages

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
        # One at a time, so that what a weight is computed from can be let go before the next one is computed.
        self._recipes = [_Recipe(graph, node, index) for node in weights if node not in index]
        self.sources = sorted({i for recipe in self._recipes for i in recipe.sources})
        self._key: tuple[tuple[int, int, int], ...] | None = None
        # Of the sources that the key is about. A storage that something points to, be it weakly, shares its number with
        # no later one.
        self._storages: list[StorageWeakRef] = []
        self._made: list[Tensor] = []
        self._consumed = False

    def resolve(self, arguments: Sequence[Any], *, consume: bool = False) -> list[Tensor]:
        """The weights in slot order, given the graph's arguments; derived ones are made only when a source changed.

        With `consume`, arguments that only derived weights are made of give up their memory as soon as they can, and
        hold NaN from then on: for arguments that nobody else needs. Derived weights are never made again then.
        """
        if self._recipes and not self._consumed:
            inputs = [arguments[i] for i in self.sources]
            key = tuple((t.untyped_storage()._cdata, t.data_ptr(), _version(t)) for t in inputs)
            if key != self._key or -1 in (version for *_, version in key) or not self._made:
                storages = [StorageWeakRef(t.untyped_storage()) for t in inputs]
                self._made = self._make(arguments, consume)
                self._key, self._storages, self._consumed = key, storages, consume
        made = iter(self._made)
        return [next(made) if i is None else arguments[i].detach() for i in self.direct]

    def _make(self, arguments: Sequence[Any], consume: bool) -> list[Tensor]:
        pages = MappedPages()
        last = {i: recipe for recipe in self._recipes for i in recipe.sources}
        kept = set(self.direct)
        made = []
        for recipe in self._recipes:
            with torch.no_grad():
                inputs = [arguments[i] for i in recipe.sources]
                result = recipe(*inputs)
                # A view keeps all of its source's memory, which is none the less.
                bases = {tensor.untyped_storage().data_ptr() for tensor in inputs}
                if consume and result.untyped_storage().data_ptr() not in bases:
                    for i, tensor in zip(recipe.sources, inputs, strict=True):
                        if last[i] is recipe and i not in kept:
                            pages.release(tensor)
                            _let_go(tensor)
            made.append(result)
        return made

    def refresh(self) -> None:
        """Forgets what was derived, for writes that no version counts (through `.data` or another process)."""
        self._key = None


def _let_go(tensor: Tensor) -> None:
    """Frees the memory of a tensor in place; its shape stays, and whoever reads it sees NaN."""
    value = float("nan") if tensor.is_floating_point() else 0
    tensor.data = torch.full((1,), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


@dataclass(frozen=True)
class _Place:
    """Stands for a value that is computed before, in the arguments of a call."""

    index: int


class _Recipe:
    """How one weight is computed from placeholders; `sources` are their places. Holds no node of the graph."""

    def __init__(self, graph: fx.Graph, wanted: Node, index: Mapping[Node, int]) -> None:
        needed: set[Node] = set()
        stack = [wanted]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        order = [node for node in graph.nodes if node in needed]
        inputs = [node for node in order if node.op == "placeholder"]
        calls = [node for node in order if node.op != "placeholder"]
        place = {node: _Place(i) for i, node in enumerate([*inputs, *calls])}
        self.sources = [index[node] for node in inputs]
        self._calls: list[tuple[Callable[..., Any], Any, Any]] = []
        for node in calls:
            if not callable(node.target):
                raise VerificationError(f"a weight is computed by {node.op} {node.target}")
            arguments = map_arg((node.args, node.kwargs), lambda n: place[n])
            self._calls.append((node.target, *arguments))

    def __call__(self, *inputs: Tensor) -> Tensor:
        values: list[Any] = list(inputs)
        for function, args, kwargs in self._calls:
            args, kwargs = map_aggregate((args, kwargs), lambda a: values[a.index] if isinstance(a, _Place) else a)
            values.append(function(*args, **kwargs))
        result: Tensor = values[-1]
        return result
