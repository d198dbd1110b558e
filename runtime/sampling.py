"""What to generate: the parameters of a request, checked before any work, and the choice of the next token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from llmopt.compiler.errors import OptionError


@dataclass(frozen=True)
class SamplingParams:
    """How a request is continued; names and defaults as in vLLM.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p, top_k, min_p: nucleus (Holtzman et al., 2020), the k likeliest (0 is all), and a floor relative to the best.
        As in transformers the nucleus is one of the k likeliest, renormalised.
    max_tokens, min_tokens: how many tokens to generate; before min_tokens the end of sequence is not chosen, and
        nothing else ends the request.
    stop, stop_token_ids: texts and ids that end a request; neither they nor the end of sequence are in its text.
    ignore_eos: go on at the end of sequence.
    seed: makes a request repeatable.
    skip_special_tokens: leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), list | tuple):
                raise OptionError(name, getattr(self, name), "a list or tuple")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        for name, least in (("top_k", 0), ("max_tokens", 1), ("min_tokens", 0)):
            if not _is_whole(getattr(self, name), least, 1 << 31):
                raise OptionError(name, getattr(self, name), f"a whole number, {least} or more")
        if self.min_tokens > self.max_tokens:
            raise OptionError("min_tokens", self.min_tokens, f"at most max_tokens = {self.max_tokens}")
        if self.seed is not None and not _is_whole(self.seed, 0, 1 << 63):
            raise OptionError("seed", self.seed, "a whole number, 0 or more, or None")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise OptionError("stop", self.stop, "non-empty strings")
        if not all(_is_whole(t, 0, 1 << 31) for t in self.stop_token_ids):
            raise OptionError("stop_token_ids", self.stop_token_ids, "token ids, whole numbers from 0")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(name, getattr(self, name), (False, True))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _is_whole(number: object, least: int, below: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number < below


def _between(name: str, number: float, low: float, high: float, open_low: bool = False) -> None:
    fits = isinstance(number, int | float) and not isinstance(number, bool) and low <= number <= high
    if not fits or (open_low and number == low):
        raise OptionError(name, number, f"a number {'above' if open_low else 'from'} {low} to {high}")


def choose(logits: torch.Tensor, params: SamplingParams, rng: torch.Generator | None) -> int:
    """The next token of one request from its logits `[V]`."""
    if params.is_greedy:
        return int(logits.argmax())
    scores = logits.float() / params.temperature
    order = scores.argsort(descending=True)
    if params.top_k:
        order = order[: params.top_k]
    probabilities = scores[order].softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_p < 1.0:
        # A token stays if what precedes it has not yet filled the nucleus, so the first always stays.
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities[0]
    chosen = torch.multinomial(probabilities * keep, 1, generator=rng)
    return int(order[chosen])
