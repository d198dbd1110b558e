"""Views as index transforms: where the element at an index of a view lies in the tensor that it views.

A *view op* moves elements without computing: reshape, permute, slice, expand, and the copies clone, contiguous and
repeat. In a fused loop all of them are index arithmetic. An *alias* is a view op whose result shares memory with its
source; it is never materialised, and who needs it addresses the source's buffer with the alias' own strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from llmopt.codegen.loops.symbolic import (
    ONE,
    ZERO,
    Expr,
    Indices,
    Unlowerable,
    divide,
    expand,
    is_nonnegative,
    reshape,
    shape_of,
    size_expression,
)
from llmopt.compiler.graph import aten, is_view


def bound_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in; none for `getitem`, which has no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = [a.name for a in schema.arguments]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**bound, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def tensor_of(node: Node) -> torch.Tensor:
    """The fake tensor of a node.

    Raises:
        Unlowerable: the node has none.
    """
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value
    raise Unlowerable(f"{node.name} is not a tensor")


def shape(node: Node) -> Indices:
    """The sizes of a tensor node; remembered in the node's meta, because sympy is slow."""
    value = tensor_of(node)
    cached = node.meta.get("llmopt_shape")
    if cached is None or cached[0] is not value:
        cached = node.meta["llmopt_shape"] = (value, shape_of(value))
    return cached[1]


def integer(argument: Any) -> Expr:
    """The expression of an int, SymInt or SymInt node."""
    return size_expression(argument.meta.get("val") if isinstance(argument, Node) else argument)


@dataclass(frozen=True)
class Context:
    """What a transform may use: sizes of the loop variables, and whether it may ask for finer loops."""

    sizes: Mapping[sympy.Symbol, Expr]
    refine: bool = True


Transform = Callable[[Node, dict[str, Any], Indices, Context], tuple[Node, Indices]]


def _same(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    return _first(node), index


def _reshape(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    return source, reshape(index, shape(node), shape(source), context.sizes, context.refine)


def _permute(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    rank = len(index)
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    else:
        order = list(range(rank))
        first, second = a.get("dim0", a.get("axis0", -2)), a.get("dim1", a.get("axis1", -1))
        if rank >= 2:
            order[first], order[second] = order[second], order[first]
    result = [ZERO] * rank
    for position, d in enumerate(order):
        result[d] = index[position]
    return source, tuple(result)


def _expand(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    return source, broadcast(index, shape(source))


def broadcast(index: Indices, source: Indices) -> Indices:
    """The index into a tensor of shape `source` that broadcasts to where `index` points."""
    kept = index[len(index) - len(source) :]
    return tuple(ZERO if size == 1 else i for i, size in zip(kept, source, strict=True))


def _start(value: Any, size: Expr, context: Context) -> Expr:
    start = ZERO if value is None else integer(value)
    if is_nonnegative(start, {}):
        return start
    if not is_nonnegative(-start - 1, {}):
        raise Unlowerable(f"a slice starts at {start}, whose sign is unknown")
    from_end = expand(size + start)
    return from_end if is_nonnegative(from_end, {}) else sympy.Max(ZERO, from_end)


def _slice(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    d = a["dim"] % len(index)
    start = _start(a["start"], shape(source)[d], context)
    if "length" in a:  # narrow
        step = ONE
    else:
        step = integer(a["step"])
    return source, (*index[:d], start + index[d] * step, *index[d + 1 :])


def _select(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    d = a["dim"] % (len(index) + 1)
    return source, (*index[:d], _start(a["index"], shape(source)[d], context), *index[d:])


def _getitem(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    """One piece of split, split_with_sizes, chunk or unbind."""
    pieces, number = node.args
    if not isinstance(pieces, Node) or not isinstance(number, int):
        raise Unlowerable(f"{node.name} is no piece of a split")
    source, split = _first(pieces), bound_arguments(pieces)
    values = pieces.meta["val"]
    number %= len(values)
    if pieces.target is aten.unbind.int:
        d = split["dim"] % (len(index) + 1)
        return source, (*index[:d], sympy.Integer(number), *index[d:])
    d = split["dim"] % len(index)
    offset = sum((size_expression(v.shape[d]) for v in values[:number]), ZERO)
    return source, (*index[:d], index[d] + offset, *index[d + 1 :])


def _flip(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    dims = {d % len(index) for d in a["dims"]}
    return source, tuple(
        n - 1 - i if d in dims else i for d, (i, n) in enumerate(zip(index, shape(source), strict=True))
    )


def _repeat(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    kept = index[len(index) - len(shape(source)) :]
    return source, tuple(
        divide(i, n, context.sizes, context.refine)[1] for i, n in zip(kept, shape(source), strict=True)
    )


def _repeat_interleave(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    source = _first(node)
    if a["dim"] is None:
        if len(shape(source)) != 1:
            raise Unlowerable("repeat_interleave of a flattened tensor")
        d = 0
    else:
        d = a["dim"] % len(index)
    quotient, _ = divide(index[d], integer(a["repeats"]), context.sizes, context.refine)
    return source, (*index[:d], quotient, *index[d + 1 :])


# Index tensors that are made of ranges: `mask[batch_index, key_index]` over `arange`s reads by arithmetic alone.
_RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_SUMS = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}


def index_expression(value: Any, index: Indices, context: Context) -> Expr | None:
    """The entry at `index` of an integer tensor (or a number), None where it depends on memory."""
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None if isinstance(value, float | bool) else integer(value)
    dtype = tensor_of(value).dtype
    if value.op != "call_function" or dtype not in (torch.int64, torch.int32):
        return None
    transform = transform_of(value)
    if transform is not None:
        source, inner = transform(value, bound_arguments(value), index, context)
        return index_expression(source, inner, context)
    arguments = bound_arguments(value)
    if value.target in _RANGES:
        start, step = arguments.get("start", 0), arguments.get("step", 1)
        if isinstance(start, float) or isinstance(step, float):
            return None
        return expand(integer(start) + index[0] * integer(step))
    if value.target in _CASTS:
        return _entry(value.args[0], index, context)
    if value.target in _SUMS and arguments.get("alpha", 1) == 1:
        left, right = (_entry(operand, index, context) for operand in value.args[:2])
        return None if left is None or right is None else expand(left + _SUMS[value.target] * right)
    return None


def _entry(operand: Any, index: Indices, context: Context) -> Expr | None:
    if isinstance(operand, Node) and isinstance(operand.meta.get("val"), torch.Tensor):
        index = broadcast(index, shape(operand))
    return index_expression(operand, index, context)


def _index(node: Node, a: dict[str, Any], index: Indices, context: Context) -> tuple[Node, Indices]:
    """aten.index.Tensor whose leading dimensions are all indexed."""
    source, tensors = node.args[0], a["indices"]
    if not isinstance(source, Node) or not all(isinstance(t, Node) for t in tensors):
        raise Unlowerable("an index that leaves out a dimension has no loop form")
    rank = max(len(shape(t)) for t in tensors)
    positions = []
    for tensor, size in zip(tensors, shape(source), strict=False):
        position = _entry(tensor, index[:rank], context)
        if position is None:
            raise Unlowerable("an index that is read from memory has no loop form")
        inside = is_nonnegative(position, context.sizes) and is_nonnegative(size - 1 - position, context.sizes)
        if not inside:
            raise Unlowerable(f"the index {position} may lie outside {size}")
        positions.append(position)
    return source, (*positions, *index[rank:])


def _by_arithmetic(node: Node) -> bool:
    """Whether aten.index.Tensor reads where index arithmetic says, without looking into memory; remembered in meta."""
    value = tensor_of(node)
    cached = node.meta.get("llmopt_arithmetic")
    if cached is None or cached[0] is not value:
        index = tuple(sympy.Symbol(f"d{d}", integer=True, nonnegative=True) for d in range(len(shape(node))))
        try:
            _index(node, bound_arguments(node), index, Context(dict(zip(index, shape(node), strict=True)), False))
        except Unlowerable:
            cached = value, False
        else:
            cached = value, True
        node.meta["llmopt_arithmetic"] = cached
    return bool(cached[1])


def _first(node: Node) -> Node:
    source = node.args[0]
    if not isinstance(source, Node):
        raise Unlowerable(f"{node.name} has no tensor to view")
    return source


# Views (`graph.VIEW_OPS`), and what is one or not, as its operands have it.
_VIEWS: dict[Any, Transform] = {
    aten.alias.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.flatten.using_ints: _reshape,
    aten.mT.default: _permute,
    aten.narrow.default: _slice,
    aten.numpy_T.default: _permute,
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    aten.reshape_as.default: _reshape,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.swapaxes.default: _permute,
    aten.t.default: _permute,
    aten.transpose.int: _permute,
    aten.unflatten.int: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.view.default: _reshape,
    aten.view_as.default: _reshape,
    aten._unsafe_view.default: _reshape,
}
_COPIES: dict[Any, Transform] = {
    aten.clone.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.index.Tensor: _index,
}
_CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
    aten.to.other,
}
SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}


def transform_of(node: Node) -> Transform | None:
    """The index transform of a view op, None for any other node."""
    if node.op != "call_function":
        return None
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return _getitem if isinstance(source, Node) and source.target in SPLITS else None
    if target in (aten.t.default, aten.numpy_T.default) and len(shape(node)) > 2:
        return None
    if target is aten.dropout.default:
        return None if bound_arguments(node)["train"] and bound_arguments(node)["p"] else _same
    if target in _CASTS:
        return _same if tensor_of(node).dtype == tensor_of(_first(node)).dtype else None
    if target is aten.index.Tensor and not _by_arithmetic(node):
        return None
    return _VIEWS.get(target) or _COPIES.get(target)


def is_alias(node: Node) -> bool:
    """Whether `node` is a view op whose result shares memory with its source."""
    if transform_of(node) is None:
        return False
    if is_view(node):
        return True
    if node.target in _COPIES or node.target is aten._to_copy.default:
        return False
    mine, source = tensor_of(node), tensor_of(_first(node))
    return mine is source or mine.untyped_storage()._cdata == source.untyped_storage()._cdata


def view_source(node: Node) -> Node:
    """The tensor node that a view op reads (through the split, for a piece of one)."""
    source = _first(node)
    return _first(source) if node.target is operator.getitem else source


def base_of(node: Node) -> Node:
    """The node whose buffer holds the elements of `node`: `node` itself, or what the aliases under it view."""
    while is_alias(node):
        node = view_source(node)
    return node
