"""Small predicates that the passes share. Each returns None when its pattern is not there."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx.node import Node

from llmopt.compiler.graph import VIEW_OPS, Rewriter, aten, is_op, is_tensor, reachable, same_shape, tensor, to_expr

CAST = aten._to_copy.default
MAX_INDEX = torch.iinfo(torch.int64).max


_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def is_grouped_product(node: Any) -> bool:
    """Whether a node is a grouped matrix product, under any of its names (compared as text: transformers registers)."""
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) in _GROUPED


def is_number(arg: Any) -> bool:
    """Whether an argument is a plain Python number."""
    return isinstance(arg, int | float) and not isinstance(arg, bool)


def strip_casts(node: Node) -> Node:
    """Walks up dtype conversions."""
    while is_op(node, CAST):
        node = node.args[0]
    return node


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def through_casts(node: Node) -> Node:
    """Walks down while the only user is a dtype conversion."""
    while (user := only_user(node)) is not None and is_op(user, CAST):
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


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype and shape, for every value of the symbols."""
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def escapes(node: Node) -> bool:
    """Whether the caller gets to see a node's memory.

    Such a value may not become an alias of another where it is none in eager mode: the caller may write to it.
    """
    seen = lambda n: [u for u in n.users if is_op(u, operator.getitem, *VIEW_OPS)]  # noqa: E731
    return any(user.op == "output" for n in reachable([node], seen) for user in n.users)


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
