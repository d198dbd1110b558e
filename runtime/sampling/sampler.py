"""The choice of the next token for a whole batch of sequences, each with parameters of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.compiler.errors import SamplingError
from llmopt.runtime.sampling.adjustments import adjust
from llmopt.runtime.sampling.blocks import Workspace, largest, largest_numbers
from llmopt.runtime.sampling.logprobs import TokenLogprobs, token_logprobs
from llmopt.runtime.sampling.state import SamplingState
from llmopt.runtime.sampling.truncation import choose

_LOWEST, _HIGHEST = -math.inf, math.inf


class Sampled(NamedTuple):
    """A chosen token; with its log probability where the request asks for it, and those of the likeliest tokens.

    `top_logprobs` is as in `TokenLogprobs`; None without `SamplingParams.logprobs`.
    """

    token: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


class Sampler:
    """Chooses the next token of each sequence of a batch.

    The order of operations for each row:

    1. log probabilities are those of the model's own logits (vLLM's "raw_logprobs");
    2. logits in float32 are changed by grammar, allowed tokens, bad words, min_tokens, bias, penalties (vLLM's order);
    3. a greedy row takes the largest, the first one of equals;
    4. other rows divide by the temperature, truncate by top-k, top-p, min-p, typical-p (transformers' order), and draw.

    What a row gets depends on its own logits and state alone, to the last bit.

    Args:
        vocab_size: V; logits may be wider (padded), what is beyond V is not looked at.
        eos_token_ids: not chosen before `min_tokens`.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self._scores, self._work = Workspace(), Workspace()
        self.eos_token_ids = tuple(token for token in dict.fromkeys(eos_token_ids) if 0 <= token < vocab_size)

    def __call__(
        self,
        logits: Tensor,
        states: Sequence[SamplingState],
        found: tuple[Sequence[float], Sequence[int]] | None = None,
    ) -> list[Sampled | SamplingError]:
        """The next tokens for `logits[R, V]` of R sequences, which accept them.

        `found`: value and place of the first largest of each row's first `vocab_size` logits, where they are known.

        A row that cannot be sampled (NaN or infinite logits, nothing that may follow, a grammar that failed) gets an
        error and accepts nothing; the others are not affected. Logits of another shape raise SamplingError. Whatever
        else is raised, no row has accepted a token then, and may be tried again.
        """
        shape = logits.shape
        if len(shape) != 2 or shape[0] != len(states) or shape[1] < self.vocab_size:
            raise SamplingError(
                f"logits of shape {list(shape)} for {len(states)} sequences over {self.vocab_size} token ids"
            )
        if not states:
            return []
        if all(state.is_plain for state in states):
            found = found or largest_numbers(logits, self.vocab_size)
            if found is not None:
                return [self._take_largest(*row) for row in zip(*found, states, strict=True)]
        return self._choose(logits, states)

    @staticmethod
    def _take_largest(value: float, token: int, state: SamplingState) -> Sampled | SamplingError:
        if not _LOWEST < value < _HIGHEST:
            return SamplingError(_failure(value))
        state.generated.append(token)
        return Sampled(token)

    @torch.no_grad()
    def _choose(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled | SamplingError]:
        raw = logits[:, : self.vocab_size]
        adjusted = any(state.is_adjusted for state in states)
        plain = not adjusted and (raw.dtype == torch.float32 or _is_greedy_bfloat16(raw, states))
        scores = raw if plain else self._scores.like(raw).copy_(raw)
        if adjusted:
            return self._choose_adjusted(raw, scores, states)
        best, places = largest(scores)
        return self._finish(raw, scores, states, best, places, {})

    def _choose_adjusted(
        self, raw: Tensor, scores: Tensor, states: Sequence[SamplingState]
    ) -> list[Sampled | SamplingError]:
        # A NaN must be seen before a mask can cover it.
        failed: dict[int, str] = {
            row: _failure(value) for row, value in enumerate(largest(scores)[0].tolist()) if not math.isfinite(value)
        }
        for row, state in enumerate(states):
            if state.highest_id >= raw.shape[1]:
                failed[row] = f"token id {state.highest_id} of the parameters is not below {raw.shape[1]}"
            elif state.grammar is not None and (error := state.grammar.error(raw.shape[1])):
                failed[row] = error
        sound = [row for row in range(len(states)) if row not in failed]
        if not failed:
            adjust(scores, states, self.eos_token_ids)
        elif sound:
            part = scores[sound]
            adjust(part, [states[row] for row in sound], self.eos_token_ids)
            scores[sound] = part
        best, places = largest(scores)
        return self._finish(raw, scores, states, best, places, failed)

    def _finish(
        self,
        raw: Tensor,
        scores: Tensor,
        states: Sequence[SamplingState],
        best: Tensor,
        places: Tensor,
        failed: dict[int, str],
    ) -> list[Sampled | SamplingError]:
        """Chooses from adjusted scores, whose largest are known, and accepts."""
        for row, value in enumerate(best.tolist()):
            if not math.isfinite(value) and row not in failed:
                grammar = states[row].grammar
                failed[row] = (grammar is not None and grammar.error(raw.shape[1])) or _failure(value)
        tokens = places.tolist()
        drawn = [row for row, state in enumerate(states) if not state.params.is_greedy and row not in failed]
        if drawn:
            uniforms = torch.tensor([states[row].uniform() for row in drawn], dtype=torch.float64, device=scores.device)
            part, peak = (scores, best) if len(drawn) == len(states) else (scores[drawn], best[drawn])
            chosen = choose(part, peak, [states[row].params for row in drawn], uniforms, self._work)
            for row, token in zip(drawn, chosen.tolist(), strict=True):
                tokens[row] = token
        logs = self._logprobs(raw, states, tokens, failed)
        result: list[Sampled | SamplingError] = []
        for row, (state, token) in enumerate(zip(states, tokens, strict=True)):
            if row in failed:
                result.append(SamplingError(failed[row]))
                continue
            try:
                state.accept(token)
            except Exception as error:  # a grammar's, for one; rows before have accepted theirs
                failure = SamplingError(f"token {token} could not be accepted: {error}")
                failure.__cause__ = error
                result.append(failure)
                continue
            log = logs.get(row)
            if log is None:
                result.append(Sampled(token))
            else:
                state.cumulative_logprob += log.logprob
                top = None if state.params.logprobs is None else log.top_logprobs
                result.append(Sampled(token, log.logprob, top))
        return result

    @staticmethod
    def _logprobs(
        raw: Tensor, states: Sequence[SamplingState], tokens: Sequence[int], failed: dict[int, str]
    ) -> dict[int, TokenLogprobs]:
        rows = [row for row, state in enumerate(states) if state.wants_logprob and row not in failed]
        if not rows:
            return {}
        counts = [states[row].params.logprobs or 0 for row in rows]
        return dict(zip(rows, token_logprobs(raw[rows], [tokens[row] for row in rows], counts), strict=True))


def _is_greedy_bfloat16(logits: Tensor, states: Sequence[SamplingState]) -> bool:
    """Whether the largest logits are all that is needed, of a type that they are found in without a copy."""
    return logits.dtype == torch.bfloat16 and all(state.params.is_greedy for state in states)


def _failure(value: float) -> str:
    if math.isnan(value):
        return "the logits hold NaN"
    return "the logits hold infinity" if value > 0 else "no token may follow: every logit is -inf"
