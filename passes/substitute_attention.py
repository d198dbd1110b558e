"""Attention in any spelling becomes `llmopt::attention`: the SDPA call, and softmax(QK^T)V written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.mask_rules import Mask, MaskRule, infer_rule
from llmopt.passes.matching import (
    CAST,
    depends_only_on,
    is_number,
    only_user,
    strip_casts,
    times_number,
    transposed,
)

_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHAIN = 32  # nodes from a softmax up to its product: a few masks, factors, views and conversions
_SELECTIONS = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass
class AttentionMatch:
    """One attention: q, k, v as `[B, H, S, D]`, and what is done to the scores."""

    last: Node
    q: Node
    k: Node
    v: Node
    scale: float
    softcap: float = 0.0
    causal: bool = False
    masks: list[Mask] = field(default_factory=list)


@dataclass(frozen=True)
class SubstituteAttention(Pass):
    """Before: `sdpa(q, repeat_kv(k), repeat_kv(v), mask)` or `softmax(q @ k^T * s + mask) @ v`, on `[B, H, S, D]`.
    After: `llmopt.attention(q, k, v, None, causal, scale, softcap, window, slopes, None)` on `[B, S, H, D]`.

    Masks that are formulas of positions become a rule (causal, window, ALiBi); those that depend on data stay, as one
    operand. Repeated key and value heads are taken from before the repetition.
    """

    name = "substitute_attention"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        sizes = {n for n in graph.nodes if n.op == "placeholder" and not is_tensor(n)}
        formulas = depends_only_on(graph.nodes, sizes)
        rules: dict[tuple[Mask, ...], MaskRule | str] = {}
        for node in nodes_of(graph, aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default):
            match = match_sdpa(node) if is_op(node, aten.scaled_dot_product_attention.default) else match_softmax(node)
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            self._replace(match, rewriter, formulas, rules, report, context)
        return report

    def _replace(
        self,
        match: AttentionMatch,
        rewriter: Rewriter,
        formulas: set[Node],
        rules: dict[tuple[Mask, ...], MaskRule | str],
        report: PassReport,
        context: PassContext,
    ) -> None:
        rule, kept = MaskRule(match.causal), [m for m in match.masks if m.node not in formulas]
        if kept:
            report.notes.append("mask kept as an operand: the mask depends on data")
        if computed := tuple(m for m in match.masks if m.node in formulas):
            if computed not in rules:
                rules[computed] = infer_rule(computed, int(tensor(match.q).shape[1]))
            found = rules[computed]
            if isinstance(found, str):
                report.notes.append(f"mask kept as an operand: {found}")
                kept = match.masks
            else:
                rule = MaskRule(match.causal or found.causal, found.window, found.alibi_slopes)
        if not context.burn():
            return
        k, v = strip_repeat(match.k), strip_repeat(match.v)
        if tensor(k).shape[1] != tensor(v).shape[1]:
            k, v = match.k, match.v
        with rewriter.before(match.last):
            mask = _operand(rewriter, kept, int(tensor(match.q).shape[1]))
            q, k, v = (rewriter.call(aten.transpose.int, t, 1, 2) for t in (match.q, k, v))
            slopes = None
            if rule.alibi_slopes is not None:
                device = tensor(q).device
                where = {} if device.type == "cpu" else {"device": device}
                slopes = rewriter.call(llmopt_ops.constant.default, list(rule.alibi_slopes), **where)
            new = rewriter.call(
                llmopt_ops.attention.default,
                *(q, k, v, mask, rule.causal, match.scale, match.softcap, rule.window, slopes, None),
            )
            new = rewriter.call(aten.transpose.int, new, 1, 2)
            if tensor(match.last).ndim == 3:
                new = rewriter.reshape(new, [-1, *(_size(rewriter, new, d) for d in (2, 3))])
        rewriter.replace(match.last, new)
        report.matched += 1


def _operand(rewriter: Rewriter, masks: list[Mask], heads: int) -> Node | None:
    """All of `masks` as one that broadcasts to `[B, H, S, L]`: boolean (true may attend) or additive."""
    seen: Node | None = None
    added: Node | None = None
    for mask in masks:
        node = mask.node
        if mask.flat and tensor(node).ndim == 3 and tensor(node).shape[0] != 1:
            node = rewriter.reshape(node, [-1, heads, *(_size(rewriter, node, d) for d in (1, 2))])
        if tensor(node).dtype != torch.bool:
            added = node if added is None else rewriter.call(aten.add.Tensor, added, node)
            continue
        if mask.hides:
            node = rewriter.call(aten.logical_not.default, node)
        seen = node if seen is None else rewriter.call(aten.bitwise_and.Tensor, seen, node)
    if seen is None or added is None:
        return seen if added is None else added
    return rewriter.call(aten.where.ScalarOther, seen, added, torch.finfo(tensor(added).dtype).min)


def _size(rewriter: Rewriter, node: Node, dim: int) -> Any:
    """One size of a node, as a view's argument."""
    size = tensor(node).shape[dim]
    return size if isinstance(size, int) else rewriter.call(aten.sym_size.int, node, dim)


def match_sdpa(node: Node) -> AttentionMatch | str:
    """A call of scaled_dot_product_attention, or why it cannot be taken."""
    args: Any = (*node.args, *(None,) * 6)[:6]
    q, k, v, mask, dropout, causal = args
    if dropout:
        return "attention with dropout"
    if any(tensor(t).ndim != 4 for t in (q, k, v)):
        return "q, k, v are not [B, H, S, D]"
    scale = node.kwargs.get("scale")
    scale = float(scale) if scale is not None else float(tensor(q).shape[-1]) ** -0.5
    masks = [Mask(mask)] if mask is not None else []
    return AttentionMatch(node, q, k, v, scale, causal=bool(causal), masks=masks)


def match_softmax(softmax: Node) -> AttentionMatch | str:
    """`softmax(scores) @ v` with scores built from `q @ k^T`, or why this softmax is no attention."""
    if softmax.args[1] not in (-1, tensor(softmax).ndim - 1):
        return "softmax over another dimension than the last"
    scores = _match_scores(softmax.args[0])
    if isinstance(scores, str):
        return scores
    q, k, scale, softcap, masks = scores
    probabilities: Node | None = softmax
    user = only_user(softmax)
    while user is not None and is_op(user, CAST, aten.view.default, aten.expand.default):
        probabilities, user = user, only_user(user)
    if user is None or not is_op(user, aten.matmul.default, aten.bmm.default) or user.args[0] is not probabilities:
        return "softmax is not multiplied by values"
    q4, k4, v4 = (_four_dimensional(t) for t in (q, k, user.args[1]))
    if q4 is None or k4 is None or v4 is None:
        return "q, k, v are not [B, H, S, D]"
    return AttentionMatch(user, q4, k4, v4, scale, softcap, False, masks)


def _match_scores(node: Node) -> tuple[Node, Node, float, float, list[Mask]] | str:
    """(q, k, scale, softcap, masks) of a chain of scale, cap and mask over `q @ k^T`."""
    scale, softcap, masks = 1.0, 0.0, list[Mask]()
    while True:
        if is_op(node, CAST, aten.view.default):
            node = node.args[0]
        elif (masked := _masked(node)) is not None:
            if scale != 1.0 or softcap:
                return "a mask inside a scale or a softcap"
            node, mask = masked
            masks.append(mask)
        elif (capped := _softcap(node)) is not None:
            if scale != 1.0 or softcap:
                return "softcap inside a scale"
            node, softcap = capped
        elif (scaled := times_number(node)) is not None:
            node, scale = scaled[0], scale * scaled[1]
        else:
            break
    if is_op(node, aten.matmul.default, aten.bmm.default):
        q, keys = node.args[:2]
    elif is_op(node, aten.baddbmm.default):
        bias, q, keys = node.args[:3]
        if node.kwargs.get("beta", 1) != 1 or scale != 1.0 or softcap:
            return "baddbmm with beta"
        scale = float(node.kwargs.get("alpha", 1))
        masks.append(Mask(bias, flat=True))
    else:
        return "softmax of something that is not q @ k^T"
    k = transposed(keys, -1, -2)
    if k is None:
        return "the second factor is not k^T"
    return q, k, scale, softcap, masks


def _masked(node: Any) -> tuple[Node, Mask] | None:
    """(scores, mask) of scores plus a tensor, or with a low number where a mask says so."""
    flat = is_tensor(node) and tensor(node).ndim == 3
    if is_op(node, aten.add.Tensor) and all(isinstance(a, Node) for a in node.args[:2]):
        a, b = node.args[:2]
        has_product = [_leads_to_product(x) for x in (a, b)]
        if has_product[0] == has_product[1] or node.kwargs.get("alpha", 1) != 1:
            return None
        scores, mask = (a, b) if has_product[0] else (b, a)
        return scores, Mask(mask, flat=flat)
    if is_op(node, *_FILLS) and _is_hidden(node.args[2]):
        return node.args[0], Mask(node.args[1], True, flat)
    if is_op(node, *_SELECTIONS):
        mask, chosen, other = node.args
        if _is_hidden(other) and isinstance(chosen, Node):
            return chosen, Mask(mask, False, flat)
        if _is_hidden(chosen) and isinstance(other, Node):
            return other, Mask(mask, True, flat)
    return None


def _softcap(node: Any) -> tuple[Node, float] | None:
    """(x, c) of `c * tanh(x / c)`."""
    outer = times_number(node)
    if outer is None or not is_op(outer[0], aten.tanh.default):
        return None
    inner = times_number(outer[0].args[0])
    if inner is None or abs(inner[1] * outer[1] - 1) > 1e-6:
        return None
    return inner[0], outer[1]


def _leads_to_product(node: Node) -> bool:
    """Whether a score chain starts here, seen through what `_match_scores` walks through. Looks at a few nodes only."""
    seen, rest = set[Node](), [node]
    while rest and len(seen) < _CHAIN:
        node = rest.pop()
        if is_op(node, aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
            return True
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_op(node, aten.add.Tensor):
            rest += [a for a in node.args[:2] if isinstance(a, Node) and is_tensor(a)]
        elif (masked := _masked(node)) is not None:
            rest.append(masked[0])
        elif node.args and isinstance(node.args[0], Node):
            rest.append(node.args[0])
    return False


def _is_hidden(arg: Any) -> bool:
    """Whether the other branch of a mask is so low that softmax gives zero."""
    if is_number(arg):
        return float(arg) < -1e4
    if is_op(arg, aten.full.default, aten.scalar_tensor.default):
        number = arg.args[-1]
        return is_number(number) and float(number) < -1e4
    return False


def _four_dimensional(node: Any) -> Node | None:
    """`[B, H, S, D]` of a factor that may have been flattened to `[B * H, S, D]`."""
    node = strip_casts(node) if is_op(node, CAST) and tensor(node).dtype == tensor(node.args[0]).dtype else node
    if tensor(node).ndim == 4:
        return node
    if tensor(node).ndim == 3 and is_op(node, aten.view.default) and tensor(node.args[0]).ndim == 4:
        before, after = tensor(node.args[0]).shape, tensor(node).shape
        if same_size(before[2], after[1]) and same_size(before[3], after[2]):
            return node.args[0]
    return None


def strip_repeat(node: Node) -> Node:
    """x of `repeat_kv(x)`: `view(clone(expand(unsqueeze(x, 2))))` or `repeat_interleave(x, n, 1)`, else the node."""
    if is_op(node, aten.repeat_interleave.self_int) and node.args[2:3] in ((1,), (-3,)):
        return node.args[0]
    flat: Any = node
    if not is_op(flat, aten.view.default) or tensor(flat).ndim != 4:
        return node
    wide = flat.args[0]
    while is_op(wide, aten.clone.default):
        wide = wide.args[0]
    if not is_op(wide, aten.expand.default) or tensor(wide).ndim != 5:
        return node
    column = wide.args[0]
    if not is_op(column, aten.unsqueeze.default) or column.args[1] != 2:
        return node
    x = column.args[0]
    groups, repeats = tensor(x).shape[1], tensor(wide).shape[2]
    return x if tensor(flat).shape[1] == groups * repeats else node
