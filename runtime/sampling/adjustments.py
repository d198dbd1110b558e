"""Everything that changes logits before a token is chosen, for all rows of a batch at once.

In vLLM's order: what a grammar allows, allowed_token_ids, bad_words, min_tokens, logit_bias, then repetition, frequency
and presence penalties. Each step touches the few entries that it is about, addressed by row and token together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from llmopt.runtime.sampling.state import SamplingState
from llmopt.runtime.sampling.structured import fill_masks

NEVER = float("-inf")


def adjust(scores: Tensor, states: Sequence[SamplingState], eos_token_ids: Sequence[int]) -> None:
    """Changes `scores[R, V]` (float32, contiguous) in place. All token ids of the states must lie below V."""
    flat, vocab = scores.view(-1), scores.shape[1]

    def entries(tokens_of_rows: Iterable[tuple[int, Iterable[int]]]) -> Tensor:
        """Places in `flat` of tokens that are given row by row."""
        places = [row * vocab + token for row, tokens in tokens_of_rows for token in tokens]
        return torch.tensor(places, dtype=torch.int64, device=scores.device)

    _mask_grammars(scores, states)
    fixed = [row for row, state in enumerate(states) if state.params.allowed_token_ids is not None]
    if fixed:
        kept = entries((row, states[row].params.allowed_token_ids or ()) for row in fixed)
        values = flat[kept]
        scores[torch.tensor(fixed, device=scores.device)] = NEVER
        flat[kept] = values
    if any(state.bad_words for state in states):
        flat[entries((row, banned(state)) for row, state in enumerate(states) if state.bad_words)] = NEVER
    # A finished structure leaves nothing but the end of sequence, however early it is.
    early = [row for row, state in enumerate(states) if state.is_early and not state.is_complete]
    if early:
        ends = entries((row, (*eos_token_ids, *states[row].params.stop_token_ids)) for row in early)
        flat[ends] = NEVER
    biased = [row for row, state in enumerate(states) if state.params.logit_bias]
    if biased:
        biases = [bias for row in biased for bias in (states[row].params.logit_bias or {}).values()]
        flat[entries((row, states[row].params.logit_bias or ()) for row in biased)] += torch.tensor(
            biases, dtype=torch.float32, device=scores.device
        )
    _penalise(flat, vocab, states)


def banned(state: SamplingState) -> list[int]:
    """The tokens that would complete a bad word after what was generated."""
    given = state.generated
    return [
        word[-1]
        for word in state.bad_words
        if len(word) == 1 or (len(word) <= len(given) + 1 and tuple(given[1 - len(word) :]) == word[:-1])
    ]


def _penalise(flat: Tensor, vocab: int, states: Sequence[SamplingState]) -> None:
    rows = [(row, state.params, state.counts) for row, state in enumerate(states) if state.counts]
    if not rows:
        return

    def spread(numbers: list[float]) -> Tensor:
        """One number of each row, for each of the row's tokens."""
        lengths = [len(counts) for _, _, counts in rows]
        return torch.from_numpy(np.repeat(np.array(numbers, dtype=np.float32), lengths)).to(flat.device)

    places = torch.from_numpy(np.concatenate([row * vocab + counts.ids for row, _, counts in rows])).to(flat.device)
    times = torch.from_numpy(np.concatenate([counts.counts for _, _, counts in rows])).to(flat.device)
    repetition = spread([params.repetition_penalty for _, params, _ in rows])
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([params.frequency_penalty for _, params, _ in rows]) * times
    values -= spread([params.presence_penalty for _, params, _ in rows]) * (times > 0)
    flat[places] = values


def _mask_grammars(scores: Tensor, states: Sequence[SamplingState]) -> None:
    rows = [row for row, state in enumerate(states) if state.grammar is not None]
    if rows:
        allowed = fill_masks([state.grammar for state in states if state.grammar is not None], scores.shape[1])
        index = torch.tensor(rows, device=scores.device)
        scores[index] = scores[index].masked_fill_(torch.from_numpy(allowed).to(scores.device) == 0, NEVER)
