"""Log probabilities of given tokens and of the likeliest ones, of generated and of prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.runtime.sampling.blocks import largest, row_sums, several_largest

# Rows that are worked on together: bounds the memory of a long prompt to a few copies of so many rows of logits.
_CHUNK = 32


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one position.

    `logprob` is that of the token that stands there, `top_logprobs` those of the likeliest tokens, likeliest first, and
    then of the token itself if it is not one of them, as in vLLM.
    """

    logprob: float
    top_logprobs: dict[int, float]


def token_logprobs(logits: Tensor, tokens: Sequence[int], counts: int | Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities under softmax(logits) in float32.

    For the logits of a prompt, which may come in chunks: row i of a chunk that begins at position s predicts token
    s + i + 1, so `tokens` are the prompt's from s + 1 on. The first token of a prompt has no probability.

    Args:
        logits: `[T, V]`, any float dtype.
        tokens: T token ids.
        counts: how many likeliest tokens to give, for all rows or one for each.
    """
    wanted = [counts] * len(tokens) if isinstance(counts, int) else list(counts)
    result: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _CHUNK):
        end = start + _CHUNK
        result += _of_chunk(logits[start:end].float().contiguous(), tokens[start:end], wanted[start:end])
    return result


def _of_chunk(scores: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    best = largest(scores)[0].unsqueeze(-1)
    normaliser = best.double() + row_sums((scores - best).exp_()).log().unsqueeze(-1)
    index = torch.tensor(tokens, dtype=torch.int64, device=scores.device).unsqueeze(-1)
    own = (scores.gather(1, index) - normaliser).squeeze(-1).tolist()
    most = min(max(counts), scores.shape[1])
    if not most:
        return [TokenLogprobs(value, {token: value}) for token, value in zip(tokens, own, strict=True)]
    values, places = several_largest(scores, most)
    tops = zip((values - normaliser).tolist(), places.tolist(), strict=True)
    result = []
    for token, value, count, (logs, ids) in zip(tokens, own, counts, tops, strict=True):
        top: dict[int, float] = {}
        # The first entry of a token counts: where logits are -inf a place may come again.
        for place, log in (*zip(ids[:count], logs[:count], strict=True), (token, value)):
            top.setdefault(place, log)
        result.append(TokenLogprobs(value, top))
    return result
