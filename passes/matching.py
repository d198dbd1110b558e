"""Small predicates that the passes share. Each returns None when its pattern is not there."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, reachable, same_shape, tensor, to_expr

CAST = aten._to_copy.default
MAX_INDEX = torch.iinfo(torch.int64).max


# Ops that fill a tensor with one number.
CONSTANTS: dict[Any, Any] = {
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.new_full.default), None),  # an argument
}

_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def is_grouped_product(node: Any) -> bool:
    """Whether a node is a grouped matrix product, under any of its names (compared as text: transformers registers)."""
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) in _GROUPED


def is_number(arg: Any) -> bool:
    """Whether an argument is a plain Python number."""
    return isinstance(arg, int | float) and not isinstance(arg, bool)


def constant_entry(node: Node) -> bool | int | float | None:
    """The number that an op of `CONSTANTS` writes everywhere, None if that is computed."""
    number = CONSTANTS[node.target]
    if number is None:
        number = node.args[-1]
    return None if isinstance(number, Node) else number


def before_widening(node: Node) -> Node:
    """Walks up dtype conversions that lose nothing: from a floating type to a wider one, on one device."""
    while is_op(node, CAST):
        wide, narrow = tensor(node), tensor(node.args[0])
        floating = wide.is_floating_point() and narrow.is_floating_point()
        if not floating or narrow.itemsize >= wide.itemsize or narrow.device != wide.device:
            break
        node = node.args[0]
    return node


def is_as_precise(node: Node, dtype: torch.dtype) -> bool:
    """Whether a value is of a floating type that rounds no more coarsely than `dtype`.

    Where results are rounded to `dtype` anyway, an op may keep such a value in float32.
    """
    own = tensor(node).dtype
    return own.is_floating_point and torch.finfo(own).eps <= torch.finfo(dtype).eps


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def through_casts(node: Node, dtype: torch.dtype) -> Node:
    """Walks down while the only user is a conversion to a type at least as precise as `dtype`."""
    while (user := only_user(node)) is not None and is_op(user, CAST) and is_as_precise(user, dtype):
        node = user
    return node


def other(node: Node, one: Node) -> Any:
    """The other operand of a binary op, given one of them; None if `one` is no operand or is both."""
    a, b = node.args[:2]
    if a is one and b is not one:
        return b
    if b is one and a is not one:
        return a
    return None


def times_number(node: Any) -> tuple[Node, float] | None:
    """(x, c) of `x * c` or `x / c` with a plain number c; division gives 1 / c."""
    if is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        a, b = node.args[:2]
        if is_number(b):
            return a, float(b)
        if is_number(a):
            return b, float(a)
    if is_op(node, aten.div.Tensor, aten.div.Scalar) and is_number(node.args[1]) and node.args[1] != 0:
        return node.args[0], 1.0 / float(node.args[1])
    return None


def slice_range(node: Any) -> tuple[Node, int, Any, Any] | None:
    """(x, dim, start, end) of a slice with step 1 along a dimension of fixed size; dim and bounds non-negative."""
    if not is_op(node, aten.slice.Tensor):
        return None
    x, dim, start, end, step = (*node.args, *(None,) * 5)[:5]
    if not is_tensor(x) or step not in (None, 1):
        return None
    dim = (dim or 0) % tensor(x).ndim
    size = tensor(x).shape[dim]
    if not isinstance(size, int) or not isinstance(start, int | None) or not isinstance(end, int | None):
        return None
    start, end, _ = slice(start, end).indices(size)
    return x, dim, start, end


class Half(NamedTuple):
    """One half of the last dimension of `whole`: the first or second (which), or every other entry (interleaved)."""

    whole: Node
    which: int
    interleaved: bool


def half_of(node: Any) -> Half | None:
    """What a node is half of: a slice, a piece of a split, or one of the pairs that a view makes of the dimension."""
    if (piece := slice_range(node)) is not None:
        whole, dim, start, end = piece
        size = tensor(whole).shape[-1]
        if dim == tensor(whole).ndim - 1 and size % 2 == 0 and (start, end) in ((0, size // 2), (size // 2, size)):
            return Half(whole, int(start > 0), False)
        return None
    if is_op(node, aten.slice.Tensor):
        whole, dim, start, end, step = (*node.args, *(None,) * 5)[:5]
        size = tensor(whole).shape[dim or 0]
        is_last = (dim or 0) % tensor(whole).ndim == tensor(whole).ndim - 1
        if is_last and step == 2 and isinstance(size, int) and size % 2 == 0 and start in (None, 0, 1):
            return Half(whole, start or 0, True) if end is None or end >= size else None
        return None
    split = element(node)
    if split is not None and is_op(split[0], aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        whole, pieces = split[0].args[0], split[0].meta["val"]
        dim = split[0].args[2] if len(split[0].args) > 2 else split[0].kwargs.get("dim", 0)
        even = len(pieces) == 2 and same_shape(pieces[0].shape, pieces[1].shape)
        return Half(whole, split[1], False) if even and dim in (-1, tensor(whole).ndim - 1) else None
    pairs, index = None, 0
    if split is not None and is_op(split[0], aten.unbind.int):
        pairs, index = split[0].args[0], split[1]
        dim = split[0].args[1] if len(split[0].args) > 1 else 0
    elif is_op(node, aten.select.int):
        pairs, dim, index = node.args
    if pairs is None or not is_op(pairs, aten.view.default) or dim not in (-1, tensor(pairs).ndim - 1):
        return None
    whole, shape = pairs.args[0], tensor(pairs).shape
    if shape[-1] != 2 or tensor(whole).ndim != len(shape) - 1 or not same_shape(tensor(whole).shape[:-1], shape[:-2]):
        return None
    return Half(whole, index, True) if index in (0, 1) else None


def prefix_and_rest(prefix: Any, rest: Any) -> Node | None:
    """The tensor of which `prefix` and `rest` are the first and the second part of the last dimension."""
    first, second = slice_range(prefix), slice_range(rest)
    if first is not None and second is not None:
        whole, last = first[0], tensor(first[0]).ndim - 1
        joined = first[1:3] == (last, 0) and second == (whole, last, first[3], tensor(whole).shape[-1])
        return whole if joined else None
    parts = element(prefix), element(rest)
    if parts[0] is None or parts[1] is None or parts[0][0] is not parts[1][0] or (parts[0][1], parts[1][1]) != (0, 1):
        return None
    split = parts[0][0]
    if not is_op(split, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return None
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    whole = split.args[0]
    return whole if len(split.meta["val"]) == 2 and dim in (-1, tensor(whole).ndim - 1) else None


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, device and shape, for every value of the symbols."""
    return a.dtype == b.dtype and a.device == b.device and same_shape(a.shape, b.shape)


def depends_only_on(graph_nodes: Iterable[Node], allowed: set[Node]) -> set[Node]:
    """The nodes all of whose inputs, transitively, are in `allowed` (constants count); `allowed` included."""
    found = set(allowed)
    for node in graph_nodes:
        if node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(node: Node) -> set[Node]:
    """A node and everything it is computed from."""
    return reachable([node], lambda n: n.all_input_nodes)


def transposed(node: Any, a: int, b: int) -> Node | None:
    """x of `transpose(x, a, b)` or the equal permutation, dims in any order and sign."""
    if not is_op(node, aten.transpose.int, aten.permute.default, aten.t.default):
        return None
    x = node.args[0]
    ndim = tensor(x).ndim
    want = list(range(ndim))
    a, b = a % ndim, b % ndim
    want[a], want[b] = want[b], want[a]
    return x if permutation(node) == want else None


def inner_last(rewriter: Rewriter, weights: Node) -> Node:
    """The second factor `[..., K, N]` of a product as a dense `[..., N, K]`: what it is the transpose of, or a copy.

    A copy of a parameter is made once, when weights are bound.
    """
    turned = transposed(weights, -1, -2) or rewriter.call(aten.transpose.int, weights, -1, -2)
    if tensor(turned).is_contiguous():
        return turned
    return rewriter.call(aten.clone.default, turned, memory_format=torch.contiguous_format)


def permutation(node: Node) -> list[int]:
    """The permutation of dimensions that a transpose, permute or t performs."""
    ndim = tensor(node.args[0]).ndim
    dims = list(range(ndim))
    if is_op(node, aten.permute.default):
        return [d % ndim for d in node.args[1]]
    if is_op(node, aten.t.default):
        return dims[::-1]
    a, b = (d % ndim for d in node.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def element(node: Any) -> tuple[Node, int] | None:
    """(sequence, index) of a `getitem`."""
    if is_op(node, operator.getitem) and isinstance(node.args[1], int):
        return node.args[0], node.args[1]
    return None


def size_is(size: Any, expected: Any) -> bool:
    """Whether a size equals another for every value of the symbols."""
    return bool(to_expr(size) == to_expr(expected))
