"""What the sampler keeps of one sequence: its tokens, their counts, its random stream, and where its grammar stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmopt.compiler.errors import InputError
from llmopt.runtime.sampling.constraints import Constraints
from llmopt.runtime.sampling.params import SamplingParams


class TokenCounts:
    """Which tokens the penalties touch, and how often each was generated, in arrays that grow with the sequence."""

    def __init__(self, prompt: Sequence[int]) -> None:
        seen = sorted(set(prompt))
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._ids = np.array(seen or [0], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Counts a generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def ids(self) -> np.ndarray:
        """Distinct token ids `[N]` int64: those of the prompt if it was given, then the generated ones."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` was generated, `[N]` float32; 0 for one that only the prompt has."""
        return self._counts[: len(self)]


class BadWords:
    """Token sequences that must not be completed, found by the token before their last."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._after: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append(tuple(word))

    def __bool__(self) -> bool:
        return bool(self._always or self._after)

    def banned(self, generated: Sequence[int]) -> list[int]:
        """The tokens that would complete one after what was generated."""
        near = self._after.get(generated[-1], ()) if generated else ()
        return self._always + [word[-1] for word in near if tuple(generated[1 - len(word) :]) == word[:-1]]


class SamplingState:
    """One sequence that is being generated.

    Args:
        params: the request's parameters.
        prompt: its token ids, for the repetition penalty.
        stream: the number of this sequence among the `num_sequences` of its request: each draws random numbers of its
            own.
        constraints: what `ConstraintCompiler` made of `params`; needed for bad_words and structured_outputs.

    Attributes: `params`, `generated` (token ids after the prompt) and `cumulative_logprob`, of the generated tokens, as
    far as log probabilities were asked for.

    Random numbers come from Philox 4x64 (Salmon et al., 2011) under the key (seed, stream), one for each token that is
    not chosen greedily, so they depend on nothing else: not on the batch, not on preemption, not on the machine.
    """

    __slots__ = (
        "_always_adjusted",
        "_random",
        "_uniform",
        "allowed_ids",
        "bad_words",
        "biased_ids",
        "biases",
        "counts",
        "cumulative_logprob",
        "generated",
        "grammar",
        "highest_id",
        "is_plain",
        "params",
        "stop_ids",
        "wants_logprob",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        stream: int = 0,
        *,
        constraints: Constraints | None = None,
    ) -> None:
        if constraints is None:
            for name in ("bad_words", "structured_outputs"):
                if getattr(params, name):
                    raise InputError(f"{name} needs a tokenizer: compile the parameters with ConstraintCompiler first")
            constraints = Constraints()
        self.params = params
        self.generated: list[int] = []
        self.cumulative_logprob = 0.0
        self.bad_words = BadWords(constraints.bad_words)
        # As arrays, because they may be long and are needed at every step.
        self.stop_ids = np.array(params.stop_token_ids, dtype=np.int64)
        self.allowed_ids = np.array(params.allowed_token_ids or (), dtype=np.int64)
        self.biased_ids = np.array(list(params.logit_bias or ()), dtype=np.int64)
        self.biases = np.array(list((params.logit_bias or {}).values()), dtype=np.float32)
        self.grammar = constraints.grammar.start() if constraints.grammar is not None else None
        penalised = params.repetition_penalty != 1.0
        self.counts: TokenCounts | None = None
        if penalised or params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts(prompt if penalised else ())
        self._random: np.random.Philox | None = None
        self._uniform: float | None = None
        if not params.is_greedy:
            seed = params.seed if params.seed is not None else int(torch.randint(0, (1 << 63) - 1, ()))
            self._random = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        self.wants_logprob = params.logprobs is not None or params.num_sequences > params.n
        self._always_adjusted = bool(
            self.counts is not None
            or self.grammar is not None
            or self.bad_words
            or len(self.biased_ids)
            or len(self.allowed_ids)
        )
        # Whether its tokens are the largest of the model's own logits all the way, whatever was `generated`.
        self.is_plain = (
            params.is_greedy and not (self._always_adjusted or self.wants_logprob) and params.min_tokens == 0
        )
        self.highest_id = max(
            max(params.stop_token_ids, default=0),
            int(self.biased_ids.max(initial=0)),
            int(self.allowed_ids.max(initial=0)),
            max((max(word) for word in constraints.bad_words), default=0),
            max(prompt, default=0) if penalised else 0,
        )

    def accept(self, token: int) -> None:
        """Appends a generated token."""
        self.generated.append(token)
        self._uniform = None
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def uniform(self) -> float:
        """The random number of the next token, in the open interval from 0 to 1, of 52 bits; the same until `accept`.

        So a choice that failed may be made again.
        """
        if self._random is None:
            raise InputError("a greedy sequence has no random numbers")
        if self._uniform is None:
            self._uniform = ((self._random.random_raw() >> 12) + 0.5) * 2.0**-52
        return self._uniform

    @property
    def is_early(self) -> bool:
        """Whether neither the end of sequence nor a stop token may come yet."""
        return len(self.generated) < self.params.min_tokens

    @property
    def is_adjusted(self) -> bool:
        """Whether anything but temperature and truncation changes the next token's logits."""
        return self._always_adjusted or self.is_early

    @property
    def is_complete(self) -> bool:
        """Whether the structured output is finished, so that only the end of sequence could follow."""
        return self.grammar is not None and self.grammar.is_complete
