"""Everything that changes logits before a token is chosen, for all rows of a batch at once.

In vLLM's order: what a grammar allows, allowed_token_ids, bad_words, min_tokens, logit_bias, then repetition, frequency
and presence penalties. Each step touches the few entries that it is about, addressed by row and token together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmopt.runtime.sampling.state import SamplingState
from llmopt.runtime.sampling.structured import fill_masks

NEVER = float("-inf")


def adjust(scores: Tensor, states: Sequence[SamplingState], eos_token_ids: Sequence[int]) -> None:
    """Changes `scores[R, V]` (float32, contiguous) in place. All token ids of the states must lie below V."""
    flat, vocab = scores.view(-1), scores.shape[1]

    def entries(ids: Sequence[np.ndarray], rows: Sequence[int]) -> Tensor:
        """Places in `flat` of token ids that are given row by row."""
        places = np.concatenate([row * vocab + tokens for row, tokens in zip(rows, ids, strict=True)])
        return torch.from_numpy(places).to(scores.device)

    _mask_grammars(scores, states)
    if fixed := [row for row, state in enumerate(states) if len(state.allowed_ids)]:
        kept = entries([states[row].allowed_ids for row in fixed], fixed)
        values = flat[kept]
        scores[torch.tensor(fixed, device=scores.device)] = NEVER
        flat[kept] = values
    if wary := [row for row, state in enumerate(states) if state.bad_words]:
        banned = [np.array(states[row].bad_words.banned(states[row].generated), dtype=np.int64) for row in wary]
        flat[entries(banned, wary)] = NEVER
    # A finished structure leaves nothing but the end of sequence, however early it is.
    if early := [row for row, state in enumerate(states) if state.is_early and not state.is_complete]:
        eos = np.array(eos_token_ids, dtype=np.int64)
        flat[entries([np.concatenate([eos, states[row].stop_ids]) for row in early], early)] = NEVER
    if biased := [row for row, state in enumerate(states) if len(state.biased_ids)]:
        biases = torch.from_numpy(np.concatenate([states[row].biases for row in biased])).to(scores.device)
        flat[entries([states[row].biased_ids for row in biased], biased)] += biases
    if penalised := [row for row, state in enumerate(states) if state.counts]:
        places = entries([counts.ids for row in penalised if (counts := states[row].counts)], penalised)
        _penalise(flat, places, [states[row] for row in penalised])


def _penalise(flat: Tensor, places: Tensor, states: Sequence[SamplingState]) -> None:
    counts = [state.counts.counts for state in states if state.counts]

    def spread(numbers: list[float]) -> Tensor:
        """One number of each row, for each of the row's tokens."""
        repeated = np.repeat(np.array(numbers, dtype=np.float32), [len(times) for times in counts])
        return torch.from_numpy(repeated).to(flat.device)

    times = torch.from_numpy(np.concatenate(counts)).to(flat.device)
    repetition = spread([state.params.repetition_penalty for state in states])
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([state.params.frequency_penalty for state in states]) * times
    values -= spread([state.params.presence_penalty for state in states]) * (times > 0)
    flat[places] = values


def _mask_grammars(scores: Tensor, states: Sequence[SamplingState]) -> None:
    rows = [row for row, state in enumerate(states) if state.grammar is not None]
    if rows:
        allowed = fill_masks([state.grammar for state in states if state.grammar is not None], scores.shape[1])
        index = torch.tensor(rows, device=scores.device)
        scores[index] = scores[index].masked_fill_(torch.from_numpy(allowed).to(scores.device) == 0, NEVER)
