"""How a program's weights are computed from a graph's arguments, as data.

Most weights are arguments as they are. What passes folded into a weight of its own is a short list of op calls over
arguments and constants. Nothing in the data is evaluated: ops are looked up by name among PyTorch's and llmopt's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.program_json import dtype_name, read_dtype
from llmopt.compiler.errors import ProgramFileError, UnsupportedError
from llmopt.compiler.graph import placeholders

_OP = re.compile(r"(aten|prims|llmopt)\.([a-z_][a-z0-9_]*)\.([A-Za-z0-9_]+)", re.ASCII)


def to_json(graph: fx.Graph, weights: Sequence[Node]) -> dict[str, Any]:
    """The recipe for `weights`, which are placeholders of `graph` or computed from such.

    Raises UnsupportedError for a computation that cannot be written down.
    """
    numbers: dict[Node, int] = {node: index for index, node in enumerate(placeholders(graph))}
    count = len(numbers)
    needed: set[Node] = set()
    stack = [node for node in weights if node not in numbers]
    while stack:
        node = stack.pop()
        if node not in needed and node not in numbers:
            needed.add(node)
            stack += node.all_input_nodes
    calls = []
    for node in graph.nodes:
        if node in needed:
            if not isinstance(node.target, torch._ops.OpOverload) or not _OP.fullmatch(str(node.target)):
                raise UnsupportedError("a weight is computed in a way that has no name", operation=str(node.target))
            arguments = [_argument(item, numbers) for item in node.args]
            named = {name: _argument(item, numbers) for name, item in node.kwargs.items()}
            calls.append([str(node.target), arguments, named])
            numbers[node] = len(numbers)
    return {"arguments": count, "calls": calls, "weights": [numbers[node] for node in weights]}


def from_json(data: Any) -> tuple[fx.Graph, list[Node]]:
    """A graph and its nodes for the weights, as `WeightBinder` takes them. Raises ProgramFileError for foreign data."""
    graph = fx.Graph()
    try:
        nodes = [graph.placeholder(f"argument_{i}") for i in range(data["arguments"])]
        for name, arguments, named in data["calls"]:
            args = tuple(_read(item, nodes) for item in arguments)
            nodes.append(graph.call_function(_op(name), args, {key: _read(item, nodes) for key, item in named.items()}))
        weights = [nodes[number] for number in data["weights"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ProgramFileError(f"malformed recipe of a weight: {error}") from error
    graph.output(tuple(weights))
    return graph, weights


def _op(name: str) -> Any:
    found = _OP.fullmatch(name)
    if found is None:
        raise ProgramFileError(f"unknown op {name[:40]!r}")
    namespace, packet, overload = found.groups()
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _argument(item: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(item, Node):
        return {"node": numbers[item]}
    if isinstance(item, list | tuple):
        return [_argument(inner, numbers) for inner in item]
    if isinstance(item, torch.dtype):
        return {"dtype": dtype_name(item)}
    if isinstance(item, torch.device):
        return {"device": str(item)}
    if item is torch.strided or item is torch.contiguous_format:
        return {"layout": str(item).removeprefix("torch.")}
    if item is None or type(item) in (bool, int, float, str):
        return item
    raise UnsupportedError(f"a weight is computed with {item!r:.80}, which cannot be written down")


def _read(item: Any, nodes: Sequence[Node]) -> Any:
    if isinstance(item, list):
        return [_read(inner, nodes) for inner in item]
    if not isinstance(item, dict):
        return item
    ((kind, inner),) = item.items()
    if kind == "node":
        return nodes[inner]
    if kind == "dtype":
        return read_dtype(inner)
    if kind == "device":
        return torch.device(inner)
    if kind == "layout":
        return {"strided": torch.strided, "contiguous_format": torch.contiguous_format}[inner]
    raise ProgramFileError(f"unknown kind of argument {str(kind)[:40]!r}")
