"""Attention in any spelling becomes `llmopt::attention`: the SDPA call, and softmax(QK^T)V written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, same_shape, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.mask_rules import Mask, MaskRule, infer_rule
from llmopt.passes.matching import (
    CAST,
    before_widening,
    depends_only_on,
    is_as_precise,
    is_number,
    only_user,
    times_number,
    transposed,
)

_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHAIN = 32  # nodes from a softmax up to its product: a few masks, factors, views and conversions
_SELECTIONS = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class AttentionMatch:
    """One attention: q `[B, H, S, D]`, k `[B, G, L, D]`, v `[B, G, L, E]`, and what is done to the scores.

    scores: all nodes from the product up to the probabilities that the values are multiplied by.
    """

    last: Node
    q: Node
    k: Node
    v: Node
    scale: float
    softcap: float = 0.0
    causal: bool = False
    masks: list[Mask] = field(default_factory=list)
    scores: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class SubstituteAttention(Pass):
    """Before: `sdpa(q, repeat_kv(k), repeat_kv(v), mask)` or `softmax(q @ k^T * s + mask) @ v`, on `[B, H, S, D]`.
    After: `llmopt.attention(q, k, v, None, causal, scale, softcap, window, slopes, None)` on `[B, S, H, D]`.

    Masks that are formulas of positions become a rule (causal, window, ALiBi); those that depend on data stay, as one
    operand. Repeated key and value heads are taken from before the repetition, operands from before a conversion to a
    wider type. A rule hides keys as -inf does; a mask that stays hides them by the model's own number, which matters to
    queries that see no key at all.
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
            match = match if isinstance(match, str) else _with_operands(match)
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
        dtype = tensor(match.last).dtype
        mixed = any(tensor(t).dtype != dtype for t in (match.q, match.k, match.v))
        with rewriter.before(match.last):
            mask = _operand(rewriter, kept, int(tensor(match.q).shape[1]))
            q, k, v = (rewriter.call(aten.transpose.int, t, 1, 2) for t in (match.q, match.k, match.v))
            if mixed:
                q, k, v = (_converted(rewriter, t, torch.float32) for t in (q, k, v))
            slopes = None
            if rule.alibi_slopes is not None:
                device = tensor(q).device
                where = {} if device.type == "cpu" else {"device": device}
                slopes = rewriter.call(llmopt_ops.constant.default, list(rule.alibi_slopes), **where)
            new = rewriter.call(
                llmopt_ops.attention.default,
                *(q, k, v, mask, rule.causal, match.scale, match.softcap, rule.window, slopes, None),
            )
            new = _converted(rewriter, rewriter.call(aten.transpose.int, new, 1, 2), dtype)
            if tensor(match.last).ndim == 3:
                new = rewriter.reshape(new, [-1, *(_size(rewriter, new, d) for d in (2, 3))])
        rewriter.replace(match.last, new)
        report.matched += 1


def _converted(rewriter: Rewriter, node: Node, dtype: torch.dtype) -> Node:
    return node if tensor(node).dtype == dtype else rewriter.call(CAST, node, dtype=dtype)


def _operand(rewriter: Rewriter, masks: list[Mask], heads: int) -> Node | None:
    """All of `masks` as one that broadcasts to `[B, H, S, L]`: boolean (true may attend) or additive."""
    seen: dict[bool, Node] = {}  # by whether what is hidden gets a finite number
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
        if mask.finite in seen:
            node = rewriter.call(aten.bitwise_and.Tensor, seen[mask.finite], node)
        seen[mask.finite] = node
    if True in seen:
        # So low that no score changes it: where none is seen, all keys weigh the same. float16 has no such number.
        if added is None:
            added = rewriter.call(aten.where.Scalar, seen[True], 0.0, torch.finfo(torch.float32).min)
        else:
            added = _converted(rewriter, added, torch.float32)
            added = rewriter.call(aten.where.ScalarOther, seen[True], added, torch.finfo(torch.float32).min)
    if False in seen and added is not None:
        return rewriter.call(aten.where.ScalarOther, seen[False], added, -torch.inf)
    return seen.get(False, added)


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
    match = _match_scores(softmax.args[0])
    if isinstance(match, str):
        return match
    probabilities: Node | None = softmax
    user = only_user(softmax)
    match.scores.append(softmax)
    while user is not None and is_op(user, CAST, aten.view.default, aten.expand.default):
        match.scores.append(user)
        probabilities, user = user, only_user(user)
    if user is None or not is_op(user, aten.matmul.default, aten.bmm.default) or user.args[0] is not probabilities:
        return "softmax is not multiplied by values"
    q, k, v = (_four_dimensional(t) for t in (match.q, match.k, user.args[1]))
    if q is None or k is None or v is None:
        return "q, k, v are not [B, H, S, D]"
    return replace(match, last=user, q=q, k=k, v=v)


def _with_operands(match: AttentionMatch) -> AttentionMatch | str:
    """The match with its operands as the op takes them, or why they do not fit: the op broadcasts none but the mask."""
    dtype = tensor(match.last).dtype
    q, k, v = (before_widening(t) for t in (match.q, match.k, match.v))
    if any(t not in _DTYPES for t in (dtype, *(tensor(t).dtype for t in (q, k, v)))):
        return "the op computes in float32"
    if not all(is_as_precise(node, dtype) for node in match.scores):
        return "scores are rounded more coarsely than the result"
    groups = [before_widening(strip_repeat(t)) for t in (k, v)]
    if same_size(*(tensor(t).shape[1] for t in groups)):
        k, v = groups
    batch, heads, queries, width = tensor(q).shape
    _, shared, keys, value_width = tensor(v).shape
    evenly = same_size(heads, shared) or (isinstance(heads, int) and isinstance(shared, int) and heads % shared == 0)
    if not evenly or not _agree(tensor(v).shape[:1], (batch,)):
        return "queries, keys and values broadcast"
    if not _agree(tensor(k).shape, (batch, shared, keys, width)):
        return "queries, keys and values broadcast"
    if not all(_has_sizes(node, batch, heads, queries, keys) for node in match.scores):
        return "scores are not [B, H, S, L]"
    if not _has_sizes(match.last, batch, heads, queries, value_width):
        return "the result is not [B, H, S, E]"
    lead = {False: (batch, heads), True: (batch * heads,)}
    if not all(_broadcasts(tensor(m.node).shape, (*lead[m.flat], queries, keys)) for m in match.masks):
        return "a mask does not broadcast to the scores"
    return replace(match, q=q, k=k, v=v)


def _agree(shape: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether two shapes are equal, or may be assumed to be, which becomes a guard of the compiled code.

    Eager would raise where two symbols differ, not broadcast: PyTorch makes no symbol of a size of 1.
    """

    def assume(a: Any, b: Any) -> bool:
        both = isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)
        return both and a.node.hint is not None and a.node.hint == b.node.hint and bool(a == b)

    return len(shape) == len(expected) and all(
        same_size(a, b) or assume(a, b) for a, b in zip(shape, expected, strict=True)
    )


def _has_sizes(node: Node, batch: Any, heads: Any, *rest: Any) -> bool:
    """Whether a node is `[B, H, ...]`, or the same with flattened heads."""
    shape = tensor(node).shape
    return _agree(shape, (batch, heads, *rest)) or _agree(shape, (batch * heads, *rest))


def _broadcasts(shape: Sequence[Any], to: Sequence[Any]) -> bool:
    """Whether a mask of this shape broadcasts to another."""
    if len(shape) > len(to):
        return False
    pairs = zip(shape, to[len(to) - len(shape) :], strict=True)
    return all(same_size(size, 1) or _agree((size,), (wide,)) for size, wide in pairs)


def _match_scores(node: Node) -> AttentionMatch | str:
    """The match of a chain of scale, cap and mask over `q @ k^T`, so far without the values and what ends it."""
    scale, softcap, masks, scores = 1.0, 0.0, list[Mask](), list[Node]()
    while True:
        scores.append(node)
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
    k = transposed(before_widening(keys), -1, -2)
    if k is None:
        return "the second factor is not k^T"
    return AttentionMatch(node, q, k, k, scale, softcap, False, masks, scores)


def _masked(node: Any) -> tuple[Node, Mask] | None:
    """(scores, mask) of scores plus a tensor, or with a low number where a mask says so."""
    flat = is_tensor(node) and tensor(node).ndim == 3
    if is_op(node, aten.add.Tensor) and all(isinstance(a, Node) for a in node.args[:2]):
        a, b = node.args[:2]
        has_product = [_leads_to_product(x) for x in (a, b)]
        if has_product[0] == has_product[1] or node.kwargs.get("alpha", 1) != 1:
            return None
        scores, mask = (a, b) if has_product[0] else (b, a)
        # A boolean addend counts as 0 or 1, and as an operand of the op it would say what is seen.
        return None if tensor(mask).dtype == torch.bool else (scores, Mask(mask, flat=flat))
    if is_op(node, *_FILLS) and (fill := _fill(node.args[2])) is not None:
        return node.args[0], Mask(node.args[1], True, flat, fill > -torch.inf)
    if is_op(node, *_SELECTIONS):
        mask, chosen, other = node.args
        for hides, scores, low in ((False, chosen, other), (True, other, chosen)):
            if isinstance(scores, Node) and (fill := _fill(low)) is not None:
                return scores, Mask(mask, hides, flat, fill > -torch.inf)
    return None


def _softcap(node: Any) -> tuple[Node, float] | None:
    """(x, c) of `c * tanh(x / c)`."""
    outer = times_number(node)
    if outer is None or not is_op(outer[0], aten.tanh.default):
        return None
    inner = times_number(outer[0].args[0])
    if inner is None or abs(inner[1] * outer[1] - 1) > 1e-6:
        return None
    return inner[0], abs(outer[1])


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


def _fill(arg: Any) -> float | None:
    """The number in the other branch of a mask, if it is so low that softmax gives zero."""
    number = arg.args[-1] if is_op(arg, aten.full.default, aten.scalar_tensor.default) else arg
    return float(number) if is_number(number) and float(number) < -1e4 else None


def _four_dimensional(node: Any) -> Node | None:
    """`[B, H, S, D]` of a factor that may have been flattened to `[B * H, S, D]`."""
    node = before_widening(node)
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
    batch, groups, *rest = tensor(x).shape
    repeats = tensor(wide).shape[2]
    spread = same_shape(tensor(wide).shape, (batch, groups, repeats, *rest))
    return x if spread and same_shape(tensor(flat).shape, (batch, groups * repeats, *rest)) else node
