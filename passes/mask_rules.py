"""Finds the rule behind an attention mask by looking at its entries.

Models write masks in endless ways; what they mean is one of a few rules. The mask's own subgraph is evaluated for a
long sequence, and a rule is proposed. It is accepted only if it explains every sample there (along the whole of its
borders, around every constant that the mask holds, and all over), and for shorter sequences and other sizes as well:
neither the length nor the batch may take part in a rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx.node import Node

from llmopt.compiler.graph import is_tensor, tensor, to_expr
from llmopt.passes.matching import ancestors, is_number
from llmopt.passes.point_values import NotEvaluable, PointValues

# An additive mask hides a key by a number so low that softmax gives exactly zero.
_HIDDEN = -1e4

# The lengths that are looked at beside those that follow from a mask's constants. The first is the largest prime that
# float16 holds: no block, stride or window below it is in step with it.
_LENGTHS = (65_497, 8_191, 64, 17)
_WITH_BIAS = 8_191  # the longest at which a bias of distance times 1 hides no key by itself

# What other sizes are, in turn, as lengths go down.
_SIZES = (2, 3, 67)

_DENSE = 64  # the longest sequence of which every entry is looked at
_PAIRS = 4096  # of a query and a key anywhere in a longer one
_ROUNDINGS = 4  # in a bias that is linear but for the rounding of its type

# A table may end before a length that is tried.
_UNKNOWN = (NotEvaluable, IndexError, RuntimeError)


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
    nodes = {n for mask in masks for n in ancestors(mask.node)}
    tensors = [tensor(n) for n in nodes if is_tensor(n)]
    numbers = [abs(a) for n in nodes for a in (*n.args, *n.kwargs.values()) if is_number(a)]
    constants = {n for a in numbers if 1 < a < 1 << 24 for n in (math.floor(a), math.ceil(a))}
    eps = max((torch.finfo(t.dtype).eps for t in tensors if t.dtype.is_floating_point), default=0.0)
    sizes = [size for mask in masks for size in tensor(mask.node).shape[-2:] if size != 1]
    lengths = {to_expr(size) for size in sizes}
    symbols = sorted({s for t in tensors for size in t.shape for s in to_expr(size).free_symbols}, key=str)
    free = {length for length in lengths if isinstance(length, sympy.Symbol)}
    if len(free) == 1 and all(free == length.free_symbols for length in lengths):
        tried = sorted({_beyond(constants), *_LENGTHS, *constants}, reverse=True)
    elif len(lengths) > 1:
        return "queries and keys differ in number"
    elif all(length.is_Integer for length in lengths):
        tried = [int(next(iter(lengths), 1))] * (len(_SIZES) if symbols else 1)
    else:
        return f"the mask has {lengths.pop()} rows"
    samples = []
    for turn, length in enumerate(tried):
        other = _SIZES[turn % len(_SIZES)]
        values = PointValues({s: length if s in free else other + i for i, s in enumerate(symbols)})
        if all(values.size(size) == length for size in sizes):
            samples.append(_Samples(masks, values, heads, length, constants, eps))
    try:
        return _common_rule(samples, enough=min(2, len(tried)))
    except _Differs:
        return "the mask differs within the batch"


def _common_rule(candidates: Sequence[_Samples], enough: int) -> MaskRule | str:
    """The rule that explains all of `candidates` that can be evaluated, if these are `enough`, or why there is none."""
    reason = "queries and keys differ in number"
    usable: list[tuple[bool, _Samples]] = []
    for samples in candidates:
        try:
            usable.append((samples.is_biased() and samples.length > _WITH_BIAS, samples))
        except _UNKNOWN as error:
            reason = f"the mask cannot be evaluated: {error}"
            if isinstance(error, NotEvaluable) and samples.length <= _beyond(samples.constants):
                return reason
    rule: MaskRule | str | None = None
    explained = 0
    for _, samples in sorted(usable, key=lambda pair: pair[0]):
        try:
            rule = _propose(samples) if rule is None else rule
            why = rule if isinstance(rule, str) else _contradiction(rule, samples)
        except _UNKNOWN as error:
            reason = f"the mask cannot be evaluated: {error}"
            rule = rule if explained else None
            continue
        if why is not None:
            return why
        explained += 1
    return rule if rule is not None and explained >= enough else reason


def _beyond(constants: set[int]) -> int:
    """A length that shows both sides of every constant."""
    return 2 * max(constants, default=0) + 5


class _Samples:
    """Entries of the combined mask at one length: whether a key is seen, and the bias on its score.

    eps: of the least exact type that the masks are computed in.
    """

    def __init__(
        self, masks: Sequence[Mask], values: PointValues, heads: int, length: int, constants: set[int], eps: float
    ) -> None:
        self._masks, self._values, self.heads = masks, values, heads
        self.length, self.constants, self.eps = length, constants, eps
        shapes = [values.shape(mask.node) for mask in masks]
        self.batch = max((shape[-4] for shape in shapes if len(shape) >= 4), default=1)
        # Few masks tell heads apart: then one is enough.
        self.kinds = heads if any(len(shape) >= 3 and shape[-3] != 1 for shape in shapes) else 1

    def __call__(self, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(visible, bias) at heads h, queries q and keys k, each `[P]`. Raises _Differs if rows of the batch do."""
        first = self._entries(torch.zeros_like(q), h, q, k)
        if self.batch > 1:
            last = self._entries(torch.full_like(q, self.batch - 1), h, q, k)
            if not all(torch.equal(a, b) for a, b in zip(first, last, strict=True)):
                raise _Differs
        return first

    def last_row(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(visible, bias), each `[kinds, P]`, of the last query and the keys k `[P]`."""
        h, k = torch.meshgrid(torch.arange(self.kinds), k, indexing="ij")
        seen, bias = self(h.flatten(), torch.full_like(k, self.length - 1).flatten(), k.flatten())
        return seen.view(k.shape), bias.view(k.shape)

    def is_biased(self) -> bool:
        """Whether scores of the last few keys get anything added."""
        return bool(self.last_row(torch.arange(max(0, self.length - 9), self.length))[1].any())

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


class _Differs(Exception):
    """The rows of a batch have different masks."""


def _propose(samples: _Samples) -> MaskRule | str:
    """The rule that the first and the last query follow, or why they follow none."""
    length = samples.length
    row = torch.arange(length)
    # One row in full tells how far back the last query sees, whatever constant that comes from.
    seen, _ = samples(torch.zeros_like(row), torch.full_like(row, length - 1), row)
    if not bool(seen[-1]):
        return "a query does not see its own position"
    first = int(seen.nonzero()[0])
    ahead, _ = samples(torch.zeros_like(row), torch.zeros_like(row), row)
    causal = length == 1 or not bool(ahead[1:].any())
    window = 0 if first == 0 else length - first
    return MaskRule(causal, window, _slopes(samples, first))


def _slopes(samples: _Samples, first: int) -> tuple[float, ...] | None:
    """Slopes of a bias that is linear in the key's position, from the last query and its keys from `first` on."""
    keys = torch.linspace(first, samples.length - 1, 129).long().unique()
    _, bias = samples.last_row(keys)
    # Least squares: what each entry was rounded by evens out.
    k = keys.double() - keys.double().mean()
    slopes = ((bias - bias[:, :1]) * k).sum(1) / k.square().sum().clamp(min=1)
    if not bool(slopes.any()):
        return None
    return tuple(slopes.expand(samples.heads).tolist())


def _contradiction(rule: MaskRule, samples: _Samples) -> str | None:
    """Which kind of samples the rule does not explain, None if it explains all."""
    h, q, k = _points(rule, samples)
    visible, bias = samples(h, q, k)
    slope = torch.tensor(rule.alibi_slopes or [0.0] * samples.heads, dtype=torch.float64)[h]
    expected = (k <= q) if rule.causal else torch.ones_like(visible)
    if rule.window:
        expected = expected & (k > q - rule.window)
    # A bias may be so low that it hides a key itself.
    if bool((visible & ~expected).any()) or bool((expected & ~visible & (slope * (q - k) < -0.9 * _HIDDEN)).any()):
        return "no rule (causal, window, full) explains all sampled entries"
    if rule.alibi_slopes is None and not bool(bias.any()):
        return None
    # Softmax ignores what is constant along a row: entries are compared with that of the query's own position.
    own_visible, own = samples(h, q, q)
    error = (bias - own - slope * (k - q)).abs()
    size = bias.abs() + own.abs() + slope.abs() * (k - q).abs()
    if not bool(own_visible.all()):
        return "a query does not see its own position"
    if bool((visible & ~(error <= _ROUNDINGS * samples.eps * size)).any()):
        return "the bias is not linear in the key's position"
    return None


def _points(rule: MaskRule, samples: _Samples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(heads, queries, keys), each `[P]`, at which a rule is to explain the mask."""
    length = samples.length
    if length <= _DENSE:
        axis = torch.arange(length)
    else:
        near = {*samples.constants, rule.window, *(1 << i for i in range(length.bit_length()))}
        points = {0, 1, 2, 3, length // 2, length - 2, length - 1}
        for c in near:
            points |= {c - 2, c - 1, c, c + 1, 2 * c, 2 * c + 1, length - c}
        axis = torch.tensor(sorted(p for p in points if 0 <= p < length))
    grid = torch.meshgrid(torch.arange(samples.kinds), axis, axis, indexing="ij")
    parts = [tuple(t.flatten() for t in grid)]
    if length > _DENSE:
        every = torch.arange(length)
        anywhere = torch.randint(length, (2, _PAIRS), generator=torch.Generator().manual_seed(0))
        lines = [(every, every + d) for d in {0, 1, 1 - rule.window, -rule.window}]
        lines += [(every, 0 * every), (0 * every, every), (0 * every + length - 1, every), (anywhere[0], anywhere[1])]
        for q, k in lines:
            inside = (k >= 0) & (k < length)
            parts.append((torch.arange(len(q))[inside] % samples.kinds, q[inside], k[inside]))
    h, q, k = (torch.cat(part) for part in zip(*parts, strict=True))
    return h, q, k
