"""Temperature, top-k, top-p, min-p and typical-p, and the draw from what they leave.

In transformers' order, each seeing the distribution that the one before it left, renormalised: temperature, top-k,
top-p, min-p, typical-p. (vLLM applies min-p before top-k and top-p.) Tokens of equal logits stay or go together.

The first four leave the tokens whose logits reach some threshold, and that is found from a few of the largest logits in
nearly every row. Only a row whose nucleus is wider is sorted, and only typical-p without top-k or top-p sorts always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmopt.runtime.sampling.blocks import Workspace, draw, draw_short, row_sums, several_largest
from llmopt.runtime.sampling.params import SamplingParams

# How many of the largest logits are looked at first, and then for rows where those do not decide. Constants, because a
# row must take the same way, with the same rounding, in any batch.
_WIDTHS = (128, 1024)


class _Rows(NamedTuple):
    """Rows `[R, V]` float32 to draw from; the best logit and the parameters of each, `[R, 1]`; `k` is V for all."""

    scores: Tensor
    best: Tensor
    temperature: Tensor
    k: Tensor
    p: Tensor
    floor: Tensor
    typical: Tensor

    @staticmethod
    def of(scores: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> _Rows:
        vocab = scores.shape[1]

        def column(numbers: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=scores.device).unsqueeze(-1)

        return _Rows(
            scores,
            best.unsqueeze(-1),
            column([p.temperature for p in params], torch.float32),
            column([min(p.num_likeliest or vocab, vocab) for p in params], torch.int64),
            column([p.top_p for p in params], torch.float64),
            column([p.min_p for p in params], torch.float32),
            column([p.typical_p for p in params], torch.float64),
        )

    def at(self, rows: Tensor) -> _Rows:
        """These rows, by number `[N]`, ascending."""
        return self if len(rows) == len(self.scores) else _Rows(*(part[rows] for part in self))

    def relative(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Probabilities relative to the best token's, for the rows' `values[R, W]`, in `out` if it is given."""
        return torch.sub(values, self.best, out=out).div_(self.temperature).exp_()

    def weights(self, values: Tensor, threshold: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The same for those that stay, and 0 for others; `values` may be in any order."""
        weights = self.relative(values, out)
        if threshold is not None:
            weights.masked_fill_(values < threshold, 0.0)
        if bool((self.floor > 0).any()):
            weights.masked_fill_(weights < self.floor, 0.0)
        if bool((self.typical < 1).any()):
            weights.masked_fill_(_untypical(weights, self.typical), 0.0)
        return weights


def choose(scores: Tensor, best: Tensor, params: Sequence[SamplingParams], uniforms: Tensor, work: Workspace) -> Tensor:
    """A token for each row, drawn from softmax(scores / temperature) as truncated by the row's parameters.

    Args:
        scores: `[R, V]` float32, no NaN or +inf, at least one of each row finite.
        best: `[R]`, the largest score of each row.
        params: one for each row, none of them greedy.
        uniforms: `[R]` float64, random numbers from 0 to 1.
        work: memory that is not in use elsewhere.

    Returns token ids `[R]` int64.
    """
    rows = _Rows.of(scores, best, params)
    vocab = scores.shape[1]
    tokens = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    limited = ((rows.k < vocab) | (rows.p < 1)).squeeze(-1)
    free = (~limited).nonzero().squeeze(-1)
    if len(free):
        part = rows.at(free)
        tokens[free] = draw(part.weights(part.scores, None, work.like(part.scores)), uniforms[free])
    left = limited.nonzero().squeeze(-1)
    for width in (*(w for w in _WIDTHS if w < vocab), vocab):
        if not len(left):
            break
        k = rows.k[left].squeeze(-1)
        fits = (k < width) | (k == vocab)
        now = left[fits]
        if len(now):
            chosen, settled = _choose_limited(rows.at(now), uniforms[now], width, work)
            tokens[now] = chosen
            left = torch.cat([left[~fits], now[~settled]]).sort().values
    return tokens


def _choose_limited(rows: _Rows, uniforms: Tensor, width: int, work: Workspace) -> tuple[Tensor, Tensor]:
    """Tokens `[R]` of rows with top-k or top-p, and for which rows the `width` largest logits sufficed, `[R]`."""
    vocab = rows.scores.shape[1]
    if width == vocab:
        threshold = _threshold(rows, _sorted(rows.scores), work)
        weights = rows.weights(rows.scores, threshold, work.like(rows.scores))
        return draw(weights, uniforms), torch.ones_like(uniforms, dtype=torch.bool)
    values, places = several_largest(rows.scores, width)
    threshold = _threshold(rows, values, work)
    index = draw_short(rows.weights(values, threshold), uniforms.unsqueeze(-1)).clamp_(max=width - 1)
    return places.gather(1, index).squeeze(-1), values[:, -1] < threshold.squeeze(-1)


def _threshold(rows: _Rows, values: Tensor, work: Workspace) -> Tensor:
    """The least logit `[R, 1]` that top-k and top-p leave, from a row's largest `values[R, W]`, largest first.

    It is right where it is larger than the last of `values`, or these are all.
    """
    vocab, width = rows.scores.shape[1], values.shape[1]
    kth = values.gather(1, (rows.k - 1).clamp(max=width - 1))
    weights = rows.relative(values).masked_fill_(values < kth, 0.0)
    upto = weights.double().cumsum(-1)
    total = upto[:, -1:]
    whole = ((rows.k == vocab) & (rows.p < 1)).squeeze(-1)
    if width < vocab and bool(whole.any()):
        sums = row_sums(rows.relative(rows.scores, work.like(rows.scores)))
        total = torch.where(whole, sums, total.squeeze(-1)).unsqueeze(-1)
    # A token stays if those before it have not filled the nucleus, so the first always stays.
    stays = torch.cat([torch.zeros_like(total), upto[:, :-1]], -1) < rows.p * total
    last = values.gather(1, stays.sum(-1, keepdim=True).clamp_(min=1) - 1)
    return torch.where(rows.p < 1, torch.maximum(last, kth), kth)


def _sorted(scores: Tensor) -> Tensor:
    """Each row, largest first. NumPy sorts floats ten times as fast as torch, which sorts places along."""
    if scores.device.type != "cpu":
        return scores.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(scores.neg().numpy(), axis=-1)).neg_()


def _untypical(weights: Tensor, mass: Tensor) -> Tensor:
    """Which tokens locally typical sampling removes, bool, for unnormalised `weights[R, W]`; `mass[R, 1]`, 1 for none.

    Those whose surprise is farthest from its expectation, beyond the nearest ones that hold `mass`.
    """
    probabilities = weights.double() / row_sums(weights).unsqueeze(-1)
    surprise = -probabilities.log()
    entropy = (probabilities * surprise.masked_fill(weights == 0, 0.0)).cumsum(-1)[:, -1:]
    distance = (surprise - entropy).abs()
    return (distance > _typical_limit(distance, probabilities, mass)) & (mass < 1)


def _typical_limit(distance: Tensor, probabilities: Tensor, mass: Tensor) -> Tensor:
    """The distance `[R, 1]` at which the nearest tokens of each row hold `mass`."""
    vocab = distance.shape[1]
    limit, left = torch.zeros_like(mass), torch.arange(len(mass), device=mass.device)
    for width in (*(w for w in _WIDTHS if w < vocab), vocab):
        near, places = several_largest(-distance[left], width)
        upto = probabilities[left].gather(1, places).cumsum(-1)
        last = (upto < mass[left]).sum(-1, keepdim=True)
        limit[left] = -near.gather(1, last.clamp(max=width - 1))
        left = left[(last >= width).squeeze(-1)]
        if not len(left):
            break
    return limit
