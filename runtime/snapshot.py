"""What was known of a request at some time, on the way to whoever reads it.

A sequence's tokens grow on while a snapshot is under way, but what they begin with stays what it is. So a snapshot has
the lists and how much of them counts, and copies nothing: each token's news would otherwise cost the whole sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmopt.runtime.outputs import CompletionOutput, PositionLogprobs, RequestOutput


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """A continuation: `tokens[first:end]`, where there are `logprobs` the first `end - first` of them, and `text`.

    The other fields are those of `CompletionOutput`.
    """

    index: int
    text: str = ""
    tokens: Sequence[int] = ()
    first: int = 0
    end: int = 0
    cumulative_logprob: float | None = None
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.end - self.first

    def output(self, tokens: int = 0, characters: int = 0) -> CompletionOutput:
        """What is known but for the first `tokens` tokens and `characters` characters."""
        return CompletionOutput(
            self.index,
            self.text[characters:],
            tuple(self.tokens[self.first + tokens : self.end]),
            self.cumulative_logprob,
            tuple(self.logprobs[tokens : self.num_tokens]) if self.logprobs is not None else None,
            self.finish_reason,
            self.stop_reason,
            self.error,
        )


class Snapshot(NamedTuple):
    """A request: its output without continuations, and these."""

    head: RequestOutput
    sequences: tuple[SequenceSnapshot, ...]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.head.finished

    def output(self) -> RequestOutput:
        """All of it."""
        return dataclasses.replace(self.head, outputs=tuple(sequence.output() for sequence in self.sequences))


class Delta:
    """Leaves out of the outputs of one request what an earlier one had, and continuations without news."""

    def __init__(self) -> None:
        # Of each continuation: tokens and characters that were given, and whether its end was.
        self._given: dict[int, tuple[int, int, bool]] = {}
        self._is_first = True

    def __call__(self, snapshot: Snapshot) -> RequestOutput | None:
        """What is new; None for nothing."""
        news = tuple(part for each in snapshot.sequences if (part := self._part(each)) is not None)
        if not news and not snapshot.finished:
            return None
        prompt_logprobs = snapshot.head.prompt_logprobs if self._is_first else None
        self._is_first = False
        return dataclasses.replace(snapshot.head, outputs=news, prompt_logprobs=prompt_logprobs)

    def _part(self, sequence: SequenceSnapshot) -> CompletionOutput | None:
        given = self._given.get(sequence.index, (0, 0, False))
        now = sequence.num_tokens, len(sequence.text), sequence.finish_reason is not None
        if now == given:
            return None
        self._given[sequence.index] = now
        return sequence.output(*given[:2])
