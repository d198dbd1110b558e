"""Finds the rule behind an attention mask by looking at its entries.

Models write masks in endless ways; what they mean is one of a few rules. The mask's own subgraph is evaluated at index
pairs around every constant that it holds, a rule is proposed, and it is accepted only if it explains every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx.node import Node

from llmopt.compiler.graph import is_tensor, tensor, to_expr
from llmopt.passes.matching import ancestors
from llmopt.passes.point_values import NotEvaluable, PointValues

# An additive mask hides a key by a number so low that softmax gives exactly zero.
_HIDDEN = -1e4


@dataclass(frozen=True)
class Mask:
    """One term on the scores: additive, or boolean where true may attend, or where true `hides` a key.

    flat: the scores that it broadcasts to are `[B * H, S, L]`, not `[B, H, S, L]`.
    finite: hidden keys get a low number, not -inf, so that a query which sees none gives the mean of all values.
    """

    node: Node
    hides: bool = False
    flat: bool = False
    finite: bool = False


@dataclass(frozen=True)
class MaskRule:
    """Query i sees key j if (not causal or j <= i) and (window == 0 or j > i - window); scores get slope[h] * j."""

    causal: bool
    window: int = 0
    alibi_slopes: tuple[float, ...] | None = None


def infer_rule(masks: Sequence[Mask], heads: int) -> MaskRule | str:
    """The rule of one attention, from several of its mask terms together, or why there is none.

    `masks` broadcast to `[B, H, S, S]` and must not depend on data.
    """
    constants: set[int] = set()
    symbols: set[sympy.Symbol] = set()
    lengths: set[sympy.Expr] = set()
    for mask in (m.node for m in masks):
        lengths |= {to_expr(size) for size in tensor(mask).shape[-2:] if size != 1}
        for node in ancestors(mask):
            if is_tensor(node):
                symbols |= {s for size in tensor(node).shape for s in to_expr(size).free_symbols}
            constants |= {abs(a) for a in node.args if isinstance(a, int) and 1 < abs(a) < 1 << 24}
    free = {length for length in lengths if isinstance(length, sympy.Symbol)}
    if len(free) == 1 and all(free == length.free_symbols for length in lengths):
        (length,) = free
        # Long enough to see both sides of every constant, or as long as a table in which a bias is looked up allows.
        # Other sizes (the batch) matter by whether they are one.
        for number in sorted({64, 2 * max(constants, default=0) + 5, *constants}, reverse=True):
            values = PointValues({symbol: number if symbol == length else 2 for symbol in symbols})
            if all(other.xreplace({length: sympy.Integer(number)}) == number for other in lengths):
                break
        else:
            return "queries and keys differ in number"
    elif len(lengths) > 1:
        return "queries and keys differ in number"
    elif all(length.is_Integer for length in lengths):
        number = int(next(iter(lengths), 1))
        values = PointValues(dict.fromkeys(symbols, 2))
    else:
        return f"the mask has {lengths.pop()} rows"
    try:
        return _fit(_Samples(masks, values, heads), constants, number)
    except NotEvaluable as error:
        return f"the mask cannot be evaluated: {error}"


class _Samples:
    """Entries of the combined mask: whether a key is seen, and the bias on its score."""

    def __init__(self, masks: Sequence[Mask], values: PointValues, heads: int) -> None:
        self._masks, self._values, self.heads = masks, values, heads
        shapes = [values.shape(mask.node) for mask in masks]
        self.batch = max((shape[-4] for shape in shapes if len(shape) >= 4), default=1)

    def __call__(self, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | str:
        """(visible, bias) at heads h, queries q and keys k, each `[P]`; or why rows of the batch differ."""
        first = self._entries(torch.zeros_like(q), h, q, k)
        if self.batch > 1:
            last = self._entries(torch.full_like(q, self.batch - 1), h, q, k)
            if not all(torch.equal(a, b) for a, b in zip(first, last, strict=True)):
                return "the mask differs within the batch"
        return first

    def _entries(
        self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = torch.ones(q.shape, dtype=torch.bool)
        bias = torch.zeros(q.shape, dtype=torch.float64)
        for mask in self._masks:
            shape = self._values.shape(mask.node)
            # A mask [B * H, S, S] counts heads within the batch.
            lead = (b * self.heads + h,) if len(shape) == 3 and shape[0] == self.batch * self.heads else (b, h)
            index = (*lead, q, k)[-len(shape) :]
            index = tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(index, shape, strict=True))
            entry = self._values.at(mask.node, index)
            if entry.dtype == torch.bool:
                visible &= entry ^ mask.hides
            else:
                visible &= entry > _HIDDEN
                bias += entry.double()
        return visible, torch.where(visible, bias, torch.zeros(()))


def _fit(samples: _Samples, constants: set[int], length: int) -> MaskRule | str:
    points = {0, 1, 2, 3, length // 2, length - 2, length - 1}
    for c in constants:
        points |= {c - 2, c - 1, c, c + 1, 2 * c, 2 * c + 1}
    axis = torch.tensor(sorted(p for p in points if 0 <= p < length))
    heads = torch.arange(samples.heads)
    h, q, k = (t.flatten() for t in torch.meshgrid(heads, axis, axis, indexing="ij"))
    entries = samples(h, q, k)
    if isinstance(entries, str):
        return entries
    visible, bias = entries

    # One row in full tells how far back the last query sees, whatever constant that comes from.
    row = torch.arange(length)
    last_row = samples(torch.zeros_like(row), torch.full_like(row, length - 1), row)
    if isinstance(last_row, str):
        return last_row
    seen, _ = last_row
    if not bool(seen[-1]):
        return "a query does not see its own position"
    first = int(seen.nonzero()[0])
    window = 0 if first == 0 else length - first
    for causal in (True, False):
        rule = (k <= q) if causal else torch.ones_like(visible)
        if window:
            rule = rule & (k > q - window)
        if bool((rule == visible).all()):
            slopes = _slopes(bias, visible, h, q, k, samples.heads)
            if isinstance(slopes, str):
                return slopes
            return MaskRule(causal, window, slopes)
    return "no rule (causal, window, full) explains all sampled entries"


def _slopes(
    bias: torch.Tensor, visible: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor, heads: int
) -> tuple[float, ...] | str | None:
    """Slopes of a bias that is linear in the key's position; softmax ignores what is constant along a row."""
    if not bool(bias.any()):
        return None
    slopes = []
    for head in range(heads):
        mine = visible & (h == head)
        widest = int(q[mine].max())
        row = mine & (q == widest)
        keys, entries = k[row].double(), bias[row]
        if len(keys) < 2:
            return "too few entries to find the slope of the bias"
        slope = float((entries[-1] - entries[0]) / (keys[-1] - keys[0]))
        slopes.append(slope)
        for position in q[mine].unique():
            part = mine & (q == position)
            rest = bias[part] - slope * k[part].double()
            if float((rest - rest[0]).abs().max()) > 1e-3 * max(1.0, abs(slope) * float(k[part].max())):
                return "the bias is not linear in the key's position"
    return tuple(slopes)
