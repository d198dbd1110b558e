"""What a generation gives back, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability at one position, under the model's own distribution.

    rank: 1 for the likeliest token; None for one that is not among the likeliest that were asked for.
    decoded_token: its text alone; None without a tokenizer. Part of a character shows as a replacement character.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Log probabilities at each position, by token id; None where a position has none, as the first of a prompt.
PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    index: its place among the prompt's continuations.
    text: "" without a tokenizer or with detokenize=False.
    token_ids: what was generated, the token that ended it included.
    cumulative_logprob: sum of the tokens' log probabilities; None unless log probabilities or best_of asked for it.
    logprobs: for each token, with `SamplingParams.logprobs`.
    finish_reason: "stop", "length" or "abort"; None while it is being generated. A request that failed, alone, has
        "error", and an `error` that says why, beside what it had generated until then.
    stop_reason: the stop text or stop token that ended it; None for the end of sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations; a snapshot while `finished` is False.

    prompt: the text, None where token ids or embeddings were given.
    prompt_token_ids: () where embeddings were given.
    prompt_logprobs: for each token of the prompt, None for the first, with `SamplingParams.prompt_logprobs`.
    num_cached_tokens: how many tokens of the prompt were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class StreamChunk:
    """Text that became certain with one token of continuation `sequence` of prompt `index`.

    The last chunk of one that failed has no token, and in `error` what went wrong.
    """

    index: int
    text: str
    token_id: int | None
    finish_reason: str | None
    sequence: int = 0
    error: str | None = None


@dataclass(frozen=True)
class BeamSearchSequence:
    """A beam: token ids after the prompt, their text, and the sum of their log probabilities over the length to the
    power of `length_penalty`."""

    token_ids: tuple[int, ...]
    text: str
    score: float


@dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best first; the prompt as in `RequestOutput`."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sequences: tuple[BeamSearchSequence, ...]
