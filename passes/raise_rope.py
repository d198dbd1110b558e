"""Rotary embeddings become `llmopt::rope` on the [B, S, H, D] layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import only_user, slice_range


@dataclass(frozen=True)
class _RopeMatch:
    x: Node  # [B, H, S, R]
    cos: Node  # [B, S, R]
    sin: Node


@dataclass(frozen=True)
class RaiseRope(Pass):
    """Before: `x * cos[:, None] + cat([-x[..., r:], x[..., :r]], -1) * sin[:, None]` on `[B, H, S, D]`.
    After: `transpose(llmopt.rope(transpose(x, 1, 2), cos, sin, False), 1, 2)`.

    If only the first R dimensions turn and the rest is concatenated behind them, the whole becomes one op.
    """

    name = "raise_rope"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.add.Tensor):
            match = match_half_split(node)
            if match is None:
                continue
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            last, x = _partial(node, match.x)
            if not context.burn():
                break
            with rewriter.before(last):
                turned = rewriter.call(aten.transpose.int, x, 1, 2)
                new = rewriter.call(llmopt_ops.rope.default, turned, match.cos, match.sin, False)
                new = rewriter.call(aten.transpose.int, new, 1, 2)
            rewriter.replace(last, new)
            report.matched += 1
        return report


def match_half_split(add: Node) -> _RopeMatch | str | None:
    """The half-split rotation that ends in `add`; None when it looks like something else altogether."""
    for plain, rotated in (add.args[:2], add.args[1::-1]):
        if not is_op(plain, aten.mul.Tensor) or not is_op(rotated, aten.mul.Tensor):
            return None
        for turned, sin in (rotated.args[:2], rotated.args[1::-1]):
            x = _rotate_half(turned)
            if x is None:
                continue
            if add.kwargs.get("alpha", 1) != 1:
                return "the sum has a factor"
            for same, cos in (plain.args[:2], plain.args[1::-1]):
                if same is x:
                    return _checked(x, cos, sin)
            return "the rotated half belongs to another tensor"
    return None


def _rotate_half(node: Any) -> Node | None:
    """x of `cat([-x[..., r:], x[..., :r]], -1)` with r half of the last dimension."""
    if not is_op(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    dim = node.args[1] if len(node.args) > 1 else 0
    negated, first = node.args[0]
    if not is_op(negated, aten.neg.default) or dim not in (-1, tensor(node).ndim - 1):
        return None
    upper, lower = slice_range(negated.args[0]), slice_range(first)
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x, last = upper[0], tensor(upper[0]).ndim - 1
    size = tensor(x).shape[-1]
    right = upper[1:] == (last, size // 2, size) and lower[1:] == (last, 0, size // 2) and size % 2 == 0
    return x if right else None


def _checked(x: Node, cos: Any, sin: Any) -> _RopeMatch | str:
    tables = []
    for table in (cos, sin):
        if not is_op(table, aten.unsqueeze.default) or not is_tensor(table.args[0]):
            return "cos or sin is not [B, 1, S, R]"
        base = table.args[0]
        if tensor(base).ndim != 3 or table.args[1] not in (1, -3) or tensor(x).ndim != 4:
            return "cos or sin is not [B, 1, S, R]"
        sizes = zip(tensor(base).shape[1:], tensor(x).shape[2:], strict=True)
        if not all(same_size(a, b) for a, b in sizes) or tensor(base).dtype != tensor(x).dtype:
            return "cos or sin has another size or dtype than x"
        tables.append(base)
    return _RopeMatch(x, *tables)


def _partial(node: Node, x: Node) -> tuple[Node, Node]:
    """Widens a match to `cat([rotated, x[..., R:]], -1)`: (what to replace, the whole x)."""
    part, user = slice_range(x), only_user(node)
    if part is None or not is_op(user, aten.cat.default):
        return node, x
    whole, dim, start, end = part
    pieces = user.args[0]  # type: ignore[union-attr]
    rest = slice_range(pieces[1]) if len(pieces) == 2 and pieces[0] is node else None
    last = tensor(whole).ndim - 1
    if rest == (whole, last, end, tensor(whole).shape[-1]) and (dim, start) == (last, 0):
        return user, whole
    return node, x
