"""Rotary embeddings become `llmopt::rope` on the [B, S, H, D] layout, in the spellings that models use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, same_shape, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import Half, half_of, only_user, prefix_and_rest


@dataclass(frozen=True)
class _Rotation:
    """`x` turned by angles whose cosines and sines are `cos` and `sin`, as the products take them.

    interleaved: pairs are (2i, 2i + 1), else (i, i + R/2). halves: a table has one entry for each pair, else for each
    dimension.
    """

    x: Node
    cos: Node
    sin: Node
    interleaved: bool
    halves: bool


@dataclass(frozen=True)
class RaiseRope(Pass):
    """Before: `x * cos[:, None] + cat([-x[..., r:], x[..., :r]], -1) * sin[:, None]` on `[B, H, S, D]`.
    After: `transpose(llmopt.rope(transpose(x, 1, 2), cos, sin, False), 1, 2)`.

    So does the same on `[B, S, H, D]`, for interleaved pairs, and with each half computed on its own:
    `cat([a * cos - b * sin, b * cos + a * sin], -1)`. If only the first R dimensions turn and the rest is concatenated
    behind them, the whole becomes one op.
    """

    name = "raise_rope"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.add.Tensor, aten.cat.default, aten.view.default):
            match = match_rotation(node)
            if match is None:
                continue
            axis = match if isinstance(match, str) else _head_axis(match)
            if isinstance(match, str) or isinstance(axis, str):
                report.skipped[str(axis)] += 1
                continue
            last, x = _partial(node, match.x)
            if not context.burn():
                break
            with rewriter.before(last):
                cos, sin = (_table(rewriter, t, axis, match) for t in (match.cos, match.sin))
                turned = rewriter.call(aten.transpose.int, x, 1, 2) if axis == 1 else x
                new = rewriter.call(llmopt_ops.rope.default, turned, cos, sin, match.interleaved)
                if axis == 1:
                    new = rewriter.call(aten.transpose.int, new, 1, 2)
            rewriter.replace(last, new)
            report.matched += 1
        return report


def match_rotation(node: Node) -> _Rotation | str | None:
    """The rotation that ends in `node`; None when it looks like something else altogether."""
    if is_op(node, aten.add.Tensor):
        return _match_sum(node)
    parts = _joined(node)
    return _match_pair(*parts) if parts is not None else None


def _match_sum(add: Node) -> _Rotation | str | None:
    """`x * cos + rotated(x) * sin`."""
    for plain, rotated in (add.args[:2], add.args[1::-1]):
        if not is_op(plain, aten.mul.Tensor) or not is_op(rotated, aten.mul.Tensor):
            return None
        for turned, sin in (rotated.args[:2], rotated.args[1::-1]):
            found = _rotated(turned)
            if found is None:
                continue
            if add.kwargs.get("alpha", 1) != 1:
                return "the sum has a factor"
            for same, cos in (plain.args[:2], plain.args[1::-1]):
                if same is found[0]:
                    return _Rotation(found[0], cos, sin, found[1], False)
            return "the rotated half belongs to another tensor"
    return None


def _rotated(node: Any) -> tuple[Node, bool] | None:
    """(x, interleaved) of x with its halves swapped and the new first one negated."""
    parts = _joined(node) if isinstance(node, Node) else None
    if parts is None or not is_op(parts[0], aten.neg.default):
        return None
    first, second = half_of(parts[0].args[0]), half_of(parts[1])
    if first is None or second is None or not _are_halves(second, first, parts[2]):
        return None
    return first.whole, first.interleaved


def _match_pair(first: Node, second: Node, interleaved: bool) -> _Rotation | None:
    """`a * cos - b * sin` beside `b * cos + a * sin`, with a and b the halves of one tensor."""
    if not is_op(first, aten.sub.Tensor) or not is_op(second, aten.add.Tensor):
        return None
    if any(n.kwargs.get("alpha", 1) != 1 for n in (first, second)):
        return None
    products = [*first.args[:2], *second.args[:2]]
    if not all(is_op(p, aten.mul.Tensor) for p in products):
        return None
    for a, cos in (products[0].args[:2], products[0].args[1::-1]):
        for b, sin in (products[1].args[:2], products[1].args[1::-1]):
            halves = half_of(a), half_of(b)
            if halves[0] is None or halves[1] is None or not _are_halves(halves[0], halves[1], interleaved):
                continue
            wanted = [{b, cos}, {a, sin}]
            if [set(p.args[:2]) for p in products[2:]] in (wanted, wanted[::-1]):
                return _Rotation(halves[0].whole, cos, sin, interleaved, True)
    return None


def _joined(node: Node) -> tuple[Node, Node, bool] | None:
    """(first, second, interleaved) where `node` puts two halves of its last dimension together."""
    last = tensor(node).ndim - 1 if is_tensor(node) else 0
    if is_op(node, aten.cat.default):
        dim = node.args[1] if len(node.args) > 1 else 0
        if len(node.args[0]) != 2 or dim not in (-1, last):
            return None
        first, second = node.args[0]
        return (first, second, False) if same_shape(tensor(first).shape, tensor(second).shape) else None
    if not is_op(node, aten.view.default) or not is_op(node.args[0], aten.stack.default):
        return None
    stack: Any = node.args[0]
    before, after = tensor(stack).shape, tensor(node).shape
    dim = stack.args[1] if len(stack.args) > 1 else 0
    if len(stack.args[0]) != 2 or dim not in (-1, len(before) - 1):
        return None
    if len(after) != len(before) - 1 or not same_shape(before[:-2], after[:-1]):
        return None
    return (*stack.args[0], True)


def _are_halves(first: Half, second: Half, interleaved: bool) -> bool:
    return (
        first.whole is second.whole
        and (first.which, second.which) == (0, 1)
        and first.interleaved == second.interleaved == interleaved
    )


def _head_axis(match: _Rotation) -> int | str:
    """The dimension of x that the tables are shared along: 1 for `[B, H, S, R]`, 2 for `[B, S, H, R]`."""
    x = tensor(match.x)
    tables = [match.cos, match.sin]
    if x.ndim != 4 or not all(is_tensor(t) and tensor(t).ndim in (2, 3, 4) for t in tables):
        return "x is not of four dimensions, or cos or sin is none that broadcasts over heads"
    shapes = [(*(1,) * (4 - tensor(t).ndim), *tensor(t).shape) for t in tables]
    size = x.shape[-1] // (2 if match.halves else 1)
    if not same_shape(*shapes) or any(tensor(t).dtype != x.dtype for t in tables):
        return "cos and sin differ in shape, or from x in dtype"
    shape = shapes[0]
    if not same_size(shape[3], size) or not (shape[0] == 1 or same_size(shape[0], x.shape[0])):
        return "cos and sin have another size than x"
    for axis in (1, 2):
        if shape[axis] == 1 and same_size(shape[3 - axis], x.shape[3 - axis]):
            return axis
    return "cos and sin are not shared by the heads"


def _table(rewriter: Rewriter, table: Node, axis: int, match: _Rotation) -> Node:
    """The table as `[B or 1, S, R]`."""
    if is_op(table, aten.unsqueeze.default) and tensor(table).ndim == 4 and table.args[1] in (axis, axis - 4):
        table = table.args[0]
    else:
        while tensor(table).ndim < 4:
            table = rewriter.call(aten.unsqueeze.default, table, 0)
        table = rewriter.call(aten.squeeze.dim, table, axis)
    if match.halves and match.interleaved:
        return rewriter.call(aten.repeat_interleave.self_int, table, 2, -1)
    return rewriter.call(aten.cat.default, [table, table], -1) if match.halves else table


def _partial(node: Node, x: Node) -> tuple[Node, Node]:
    """Widens a match to `cat([rotated, x[..., R:]], -1)`: (what to replace, the whole x)."""
    user = only_user(node)
    if not is_op(user, aten.cat.default):
        return node, x
    pieces, dim = user.args[0], user.args[1] if len(user.args) > 1 else 0  # type: ignore[union-attr]
    if len(pieces) != 2 or pieces[0] is not node or dim not in (-1, tensor(node).ndim - 1):
        return node, x
    whole = prefix_and_rest(x, pieces[1])
    return (user, whole) if whole is not None else (node, x)
