"""Ops whose index is read from memory: gather, index_select, indexing by tensors, embedding, scatters of a few values.

The place is checked before anything is addressed by it. What is gathered from must lie in memory: `SOURCES` tells the
planner which operand that is.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from llmopt.codegen.loops.emit import Args, Emit, operand, result_register
from llmopt.codegen.loops.symbolic import Expr, Indices, Unlowerable, same
from llmopt.codegen.loops.views import bound_arguments, shape, tensor_of, transform_of

aten = torch.ops.aten

# Which argument of each op is read at computed places.
SOURCES: dict[Any, str] = {
    aten.gather.default: "self",
    aten.index_select.default: "self",
    aten.index.Tensor: "self",
    aten.embedding.default: "weight",
}

MAX_SCATTERED = 16  # values along the dimension of a scatter: each element is compared with as many places


def gathered_source(node: Node) -> Node | None:
    """The operand of `node` that must lie in memory, None for an op that addresses by arithmetic alone."""
    if node.target not in SOURCES or transform_of(node) is not None:
        return None
    source = bound_arguments(node)[SOURCES[node.target]]
    return source if isinstance(source, Node) else None


def _place(emit: Emit, indices: Any, index: Indices, size: Expr, wraps: bool) -> Expr:
    if not isinstance(indices, Node) or tensor_of(indices).dtype not in (torch.int64, torch.int32):
        raise Unlowerable("an index that is no tensor of integers has no loop form")
    return emit.position(operand(emit, indices, index, "int64"), size, wraps)


def gather(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """out[i, j] = self[index[i, j], j], for `dim` 0."""
    source = a["self"]
    if not index:
        raise Unlowerable("gather of a number has no loop form")
    d = a["dim"] % len(index)
    place = _place(emit, a["index"], index, shape(source)[d], False)
    return emit.load(source, (*index[:d], place, *index[d + 1 :]))


def index_select(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """out[i, j] = self[index[i], j], for `dim` 0."""
    source = a["self"]
    if not index:
        raise Unlowerable("index_select of a number has no loop form")
    d = a["dim"] % len(index)
    place = _place(emit, a["index"], (index[d],), shape(source)[d], False)
    return emit.load(source, (*index[:d], place, *index[d + 1 :]))


def embedding(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """out[i, j] = weight[indices[i], j]."""
    place = _place(emit, a["indices"], index[:-1], shape(a["weight"])[0], False)
    return emit.load(a["weight"], (place, index[-1]))


def index_tensor(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """Indexing as NumPy does: the indices broadcast, and stand where they are neighbours, else in front."""
    source = a["self"]
    given = [*a["indices"], *[None] * (len(shape(source)) - len(a["indices"]))]
    used = [d for d, item in enumerate(given) if item is not None]
    rank = max((len(shape(given[d])) for d in used), default=0)
    first = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    chosen, rest = index[first : first + rank], iter((*index[:first], *index[first + rank :]))
    return emit.load(
        source,
        tuple(
            next(rest) if item is None else _place(emit, item, chosen, size, True)
            for item, size in zip(given, shape(source), strict=True)
        ),
    )


def scatter(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """out = self, then out[index[k, j], j] = src[k, j] for every k in order, for `dim` 0.

    Nothing is addressed by the places: each element asks whether one of them is its own. One outside is nobody's.
    """
    if not index:
        raise Unlowerable("scatter into a number has no loop form")
    d, places = a["dim"] % len(index), a["index"]
    count = shape(places)[d]
    if not count.is_Integer or count > MAX_SCATTERED:
        raise Unlowerable(f"a scatter of {count} values has no loop form, of up to {MAX_SCATTERED} it has")
    if any(not same(m, n) for i, (m, n) in enumerate(zip(shape(places), shape(node), strict=True)) if i != d):
        raise Unlowerable("a scatter into a part of the other dimensions has no loop form")
    dtype = result_register(node)
    result, here = operand(emit, a["self"], index, dtype), emit.index_value(index[d])
    for k in range(int(count)):
        at = (*index[:d], sympy.Integer(k), *index[d + 1 :])
        value = emit.value(a["src"], at) if "src" in a else operand(emit, a["value"], index, dtype)
        hit = emit.call("eq", operand(emit, places, at, "int64"), here)
        result = emit.call("where", hit, emit.cast(value, dtype), result)
    return result
