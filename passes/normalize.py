"""One spelling for each thing: drops what does nothing and rewrites synonyms, so that later passes match once."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.aliasing import escapes
from llmopt.compiler.capture import ASSERTIONS
from llmopt.compiler.decompose import expand_op
from llmopt.compiler.graph import (
    Rewriter,
    aten,
    is_op,
    is_tensor,
    nodes_of,
    placeholders,
    refresh_values,
    same_shape,
    tensor,
)
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.passes.matching import CAST, MAX_INDEX, is_number, permutation, same_layout

_SYNONYMS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten._unsafe_view.default: aten.view.default,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}

_EXTREMES: dict[Any, Any] = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}

# What eager mode computes into new memory, even where nothing changes.
_FRESH = (
    *(aten.clone.default, aten.repeat.default, aten.lift_fresh_copy.default, CAST),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
)


def _identity(node: Node) -> Node | None:
    """The input that a node merely passes on, and may share its memory with; or None."""
    x = _same_value(node)
    return None if x is None or (is_op(node, *_FRESH) and escapes(node)) else x


def _same_value(node: Node) -> Node | None:
    x = node.args[0] if node.args else None
    if not isinstance(x, Node) or not is_tensor(x) or not is_tensor(node):
        return None
    before, after = tensor(x), tensor(node)
    if not same_layout(before, after):
        return None
    if is_op(node, aten.alias.default, aten.detach.default):
        return x
    if is_op(node, aten.dropout.default) and (node.args[1] == 0 or node.args[2] is False):
        return x
    if is_op(node, CAST, aten.to.dtype, aten.type_as.default) and set(node.kwargs) <= {"dtype", "device", "layout"}:
        return x
    if is_op(node, aten.contiguous.default):
        return x if before.is_contiguous() else None
    if is_op(node, aten.lift_fresh_copy.default):
        return x
    if is_op(node, aten.clone.default):
        return x if before.is_contiguous() and after.is_contiguous() else None
    if is_op(node, aten.slice.Tensor):
        _, _, start, end, step = (*node.args, *(None,) * 5)[:5]
        return (
            x
            if start in (None, 0) and (end is None or end == MAX_INDEX or _whole(node)) and step in (None, 1)
            else None
        )
    if is_op(node, aten.view.default, aten.expand.default, aten.reshape.default):
        return x
    if is_op(node, aten.squeeze.dim, aten.squeeze.default):
        return x
    if is_op(node, aten.repeat.default):
        return x if all(count == 1 for count in node.args[1]) else None
    if is_op(node, aten.mul.Tensor, aten.div.Tensor):
        return x if is_number(node.args[1]) and node.args[1] == 1 else None
    if is_op(node, aten.add.Tensor, aten.sub.Tensor):
        return x if _adds_nothing(node) else None
    return None


def _adds_nothing(node: Node) -> bool:
    """Of floats, only `x - 0.0` and `x + -0.0` are x: `-0.0 + 0.0` is 0.0."""
    x, number = node.args[:2]
    if not is_number(number) or number != 0 or node.kwargs:
        return False
    signed = tensor(x).is_floating_point() or tensor(x).is_complex()
    return not signed or is_op(node, aten.add.Tensor) == (math.copysign(1, number) < 0)


def _compute_weights_first(graph: fx.Graph) -> int:
    """Moves what is computed from weights behind the inputs, so that it is there wherever a pass may want it."""
    inputs = placeholders(graph)
    early = {n for n in inputs if n.meta.get("weight")}
    moved, last, in_place = 0, inputs[-1] if inputs else None, True
    for node in list(graph.nodes):
        sources = node.all_input_nodes
        if last is None or node.op != "call_function" or not sources or not early.issuperset(sources):
            in_place = in_place and node.op == "placeholder"
            continue
        if not in_place:
            last.append(node)
            moved += 1
        early.add(node)
        last = node
    return moved


def _whole(node: Node) -> bool:
    x, dim, _, end = node.args[:4]
    size = tensor(x).shape[dim]
    return isinstance(size, int) and isinstance(end, int) and end >= size


@dataclass(frozen=True)
class Normalize(Pass):
    """Removes no-ops (assertions, dropout at inference, conversions to the same type, full slices, `* 1`) and synonyms.

    Before: `y = dropout(x, 0.1, False); z = type_as(y, x); w = _unsafe_view(z, s)`. After: `w = view(x, s)`.
    """

    name = "normalize"
    produces = None
    required = True

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            if node.target in ASSERTIONS:
                graph.erase_node(node)
                report.matched += 1
                continue
            if node.target in _SYNONYMS:
                _respell(node)
                report.matched += 1
            if (x := _identity(node)) is not None:
                rewriter.replace(node, x)
                report.matched += 1
            elif (new := self._canonical(node, rewriter)) is not None:
                rewriter.replace(node, new)
                report.matched += 1
        graph.eliminate_dead_code()
        report.matched += _compute_weights_first(graph)
        return report

    def _canonical(self, node: Node, rewriter: Rewriter) -> Node | None:
        with rewriter.before(node):
            if is_op(node, aten.type_as.default, aten.to.dtype):
                device = {"device": tensor(node).device} if _moves(node) else {}
                return rewriter.call(CAST, node.args[0], dtype=tensor(node).dtype, **device)
            if is_op(node, aten.contiguous.default):
                return rewriter.call(aten.clone.default, node.args[0], memory_format=torch.contiguous_format)
            if is_op(node, aten.reshape.default):
                return _reshape(rewriter, node)
            if is_op(node, aten.copy.default) and not escapes(node):
                return _copied(rewriter, node)
            if is_op(node, aten.cat.default):
                return _without_empty_pieces(rewriter, node)
            if is_op(node, operator.getitem) and is_op(node.args[0], *_EXTREMES) and node.args[1] == 0:
                return _extreme(rewriter, node.args[0])
            if is_op(node, aten.einsum.default):
                return expand_op(rewriter, node)
            if is_op(node, CAST) and set(node.kwargs) > {"dtype"} and node.kwargs.get("memory_format") is None:
                return None if _moves(node) else rewriter.call(CAST, node.args[0], dtype=tensor(node).dtype)
        return None


def _moves(node: Node) -> bool:
    """Whether a conversion goes to another device."""
    return tensor(node).device != tensor(node.args[0]).device


def _respell(node: Node) -> None:
    """Gives a node the op's usual name; a factor that has a place of its own there is given by name."""
    node.target = _SYNONYMS[node.target]
    if len(node.args) > 2:
        node.args, node.kwargs = node.args[:2], {"alpha": node.args[2]}


def _extreme(rewriter: Rewriter, node: Node) -> Node | None:
    """The values of `max(x, dim)` or `min(x, dim)` alone, where nobody asks for their places."""
    if any(user.args[1] != 0 for user in node.users):
        return None
    x, dim, keep = (*node.args, False)[:3]
    return rewriter.call(_EXTREMES[node.target], x, [dim], node.kwargs.get("keepdim", keep))


def _without_empty_pieces(rewriter: Rewriter, node: Node) -> Node | None:
    """A concatenation without its pieces of size zero (partial rotary embeddings of the whole head leave one)."""
    pieces, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if any(tensor(piece).dtype != tensor(node).dtype for piece in pieces):
        return None  # an empty piece, too, has a say in the dtype
    # torch.cat also takes an empty tensor of one dimension, whatever the others have: a new DynamicCache starts so.
    full = [piece for piece in pieces if tensor(piece).shape != (0,) and tensor(piece).shape[dim] != 0]
    if len(full) in (0, len(pieces)):
        return None
    if len(full) > 1:
        return rewriter.call(aten.cat.default, full, dim)
    (only,) = full
    return rewriter.call(aten.clone.default, only, memory_format=torch.contiguous_format) if escapes(node) else only


def _copied(rewriter: Rewriter, node: Node) -> Node:
    """What `copy(x, y)` returns does not depend on the values of x."""
    like, source = node.args[:2]
    if tensor(source).dtype != tensor(like).dtype:
        source = rewriter.call(CAST, source, dtype=tensor(like).dtype)
    if not same_shape(tensor(source).shape, tensor(like).shape):
        source = rewriter.call(aten.expand_as.default, source, like)
    return rewriter.call(aten.clone.default, source, memory_format=torch.contiguous_format)


def _reshape(rewriter: Rewriter, node: Node) -> Node:
    x, shape = node.args
    try:
        return rewriter.call(aten.view.default, x, shape)
    except (RuntimeError, ValueError):
        flat = rewriter.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        return rewriter.call(aten.view.default, flat, shape)


@dataclass(frozen=True)
class SimplifyViews(Pass):
    """Cancels views that undo each other and recomputes every value, so that strides tell how memory really lies.

    Before: `transpose(transpose(x, 1, 2), 1, 2)`, `view(view(x, a), b)`. After: `x`, `view(x, b)`.
    A view that its input's new strides do not allow gets a copy in front.
    """

    name = "simplify_views"
    produces = None
    required = True

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            new = self._simplified(node, rewriter)
            if new is not None:
                rewriter.replace(node, new)
                report.matched += 1
        graph.eliminate_dead_code()
        refresh_values(graph)
        for node in nodes_of(graph, aten.clone.default):
            if (x := _identity(node)) is not None:
                rewriter.replace(node, x)
                report.matched += 1
        refresh_values(graph)
        return report

    def _simplified(self, node: Node, rewriter: Rewriter) -> Node | None:
        x = node.args[0] if node.args else None
        if not isinstance(x, Node) or not is_tensor(node) or not is_tensor(x):
            return None
        if is_op(node, aten.view.default):
            if same_shape(tensor(x).shape, tensor(node).shape):
                return x
            if is_op(x, aten.view.default):
                if same_shape(tensor(x.args[0]).shape, tensor(node).shape):
                    return x.args[0]
                with rewriter.before(node):
                    return rewriter.call(aten.view.default, x.args[0], node.args[1])
        if is_op(node, aten.transpose.int, aten.permute.default) and is_op(x, aten.transpose.int, aten.permute.default):
            first, second = permutation(x), permutation(node)
            both = [first[d] for d in second]
            if both == list(range(len(both))):
                return x.args[0]
        return None
