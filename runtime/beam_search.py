"""Beam search over one prompt, as a state machine that is fed logits and says which beams go on with which tokens.

Scores, candidates and stopping are those of transformers' `generate(num_beams=...)`: a beam's score is the sum of its
tokens' log probabilities, a finished one's is divided by its length to the power of `length_penalty` (Wu et al., 2016,
without their constants), and of the best candidates only the first `num_beams` may finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.compiler.errors import OptionError, SamplingError
from llmopt.runtime.sampling.checks import check_flag, check_real, check_whole
from llmopt.runtime.sampling.params import MAX_TOKENS

MAX_BEAMS = 256


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search; `beam_width`, `max_tokens` and `ignore_eos` are vLLM's names, the others transformers'.

    beam_width: beams that are followed, and the most that are returned.
    max_tokens: longest continuation.
    ignore_eos: no beam ends before `max_tokens`.
    length_penalty: the exponent of the length by which finished scores are divided; above 0 favours long ones.
    early_stopping: True stops with `beam_width` finished beams; False when a heuristic finds that no beam that is
        followed would be better than those; "never" only when none can be.

    Raises OptionError, naming option, value and what is allowed.
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        check_whole("beam_width", self.beam_width, 1, MAX_BEAMS)
        check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_flag("ignore_eos", self.ignore_eos)
        check_real("length_penalty", self.length_penalty, -100.0, 100.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise OptionError("early_stopping", self.early_stopping, (True, False, "never"))


@dataclass(frozen=True)
class Beam:
    """A continuation: its token ids, and its score (with the length penalty once it is finished)."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The search over one prompt.

    First `advance` takes the prompt's logits `[1, V]`. While `done` is False, beam i of the next step continues beam
    `parents[i]` of the last one with the token `tokens[i]`, and `advance` takes the logits `[beam_width, V]` after
    them.

    Args:
        params: width, length, penalties.
        eos_token_ids: tokens that finish a beam.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._running = [Beam((), 0.0)]
        self._finished: list[Beam] = []
        self._improvable = True
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self.done = False

    @property
    def beams(self) -> list[Beam]:
        """The best continuations, best first: finished ones."""
        return list(self._finished)

    def advance(self, logits: Tensor) -> None:
        """Takes the logits `[beams, V]` of the running beams and chooses the next ones.

        Raises SamplingError for NaN, and where fewer continuations than beams are possible.
        """
        candidates = self._candidates(logits)
        length = len(self._running[0].tokens) + 1
        last = length == self.params.max_tokens
        ends = [last or beam.tokens[-1] in self._eos for _, beam in candidates]
        width = self.params.beam_width
        going = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:width]
        self._finish([beam for (_, beam), end in zip(candidates[:width], ends, strict=False) if end], length)
        # At the last length nothing goes on; what the heuristic looks at is the best that would.
        best = going[0][1].score if going else float("-inf")
        if going:
            self.parents = [parent for parent, _ in going]
            self._running = [beam for _, beam in going]
            self.tokens = [beam.tokens[-1] for beam in self._running]
        self._improvable = self._improvable and self._may_improve(best, length)
        full = len(self._finished) == width
        self.done = last or not self._improvable or (full and self.params.early_stopping is True)

    def _candidates(self, logits: Tensor) -> list[tuple[int, Beam]]:
        """(parent, beam), best first: enough that as many as there are beams go on when the best of them end."""
        if len(logits) != len(self._running):
            raise SamplingError(f"{len(logits)} rows of logits for {len(self._running)} beams")
        scores = torch.tensor([beam.score for beam in self._running], dtype=torch.float32, device=logits.device)
        total = logits.float().log_softmax(-1) + scores.unsqueeze(-1)
        count = max(2, 1 + len(self._eos)) * self.params.beam_width
        values, places = total.flatten().topk(min(count, total.numel()))
        found = [
            (place // logits.shape[1], place % logits.shape[1], value)
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value > float("-inf")
        ]
        if bool(values.isnan().any()):
            raise SamplingError("the logits hold NaN or infinity")
        if sum(token not in self._eos for _, token, _ in found) < self.params.beam_width:
            raise SamplingError(f"fewer than beam_width = {self.params.beam_width} continuations are possible")
        return [(row, Beam((*self._running[row].tokens, token), value)) for row, token, value in found]

    def _finish(self, beams: Sequence[Beam], length: int) -> None:
        """Keeps the best of finished beams; as in transformers no more are taken once the search is decided."""
        width = self.params.beam_width
        if not self._improvable or (len(self._finished) == width and self.params.early_stopping is True):
            return
        penalty = float(length) ** self.params.length_penalty
        everything = self._finished + [Beam(beam.tokens, beam.score / penalty) for beam in beams]
        self._finished = sorted(everything, key=lambda beam: -beam.score)[:width]

    def _may_improve(self, best: float, length: int) -> bool:
        """Whether the best running beam might still be better than the worst that is kept."""
        if len(self._finished) < self.params.beam_width:
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        length = self.params.max_tokens if longest else length
        return best / float(length) ** self.params.length_penalty > self._finished[-1].score


def beam_search(
    step: Callable[[Sequence[int], Sequence[int]], Tensor],
    prompt_logits: Tensor,
    params: BeamSearchParams,
    eos_token_ids: Sequence[int] = (),
) -> list[Beam]:
    """Searches to the end.

    Args:
        step: takes (parents, tokens) as in `BeamSearch` and gives the logits `[beam_width, V]` after them.
        prompt_logits: `[1, V]` of the prompt's last token.
        params: width, length, penalties.
        eos_token_ids: tokens that finish a beam.

    Returns finished beams, best first, at most `beam_width`.
    """
    search = BeamSearch(params, eos_token_ids)
    search.advance(prompt_logits)
    while not search.done:
        search.advance(step(search.parents, search.tokens))
    return search.beams
