"""One request on its way through the engine: what is known of it, what is computed, and which pages it holds."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from llmopt.runtime.adapters import Adapter
    from llmopt.runtime.prompt_embeds import PromptEmbeds
    from llmopt.runtime.sampling import SamplingParams, TokenLogprobs

# Stands in a request's list of blocks for a page that no layer looks at any more.
NO_BLOCK = -1


class Status(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class BlockTable:
    """The pages of a request in one group of layers.

    blocks: page by page, NO_BLOCK for those that are given back.
    num_passed: leading entries of `blocks` that are given back; kept while the request is swapped out.
    num_listed: leading entries of `blocks` that the seat's row of the batch's block table has already.
    host: pages of the swap space that hold the content of the pages after those passed, while it is swapped out.
    """

    blocks: list[int] = field(default_factory=list)
    num_passed: int = 0
    num_listed: int = 0
    host: list[int] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """The blocks that are really held."""
        return self.blocks[self.num_passed :]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One sequence: a prompt and what has been generated for it.

    Attributes:
        request_id: unique among the requests that have not finished.
        tokens: all known tokens, the prompt first.
        num_prompt: how many of them are the prompt.
        prompt_embeds: the prompt where it was given as embeddings; its tokens are 0 then, and mean nothing.
        priority: lower is served first; first come, first served among equals.
        cache_salt: requests share cached pages only with requests of the same salt.
        adapter: names what changes the model for this request, by its content; part of the cache key as well.
        adapter_weights: what it is; None without.
        adapter_slot: where a running request finds it among the program's adapters, -1 for none.
        stop_check: called after each new token but one that ends the request; True ends it with reason "stop".
        outbox: where the engine puts the request whenever it has a new token or has ended.
        published: how many tokens it had when it was last put there, and whether it had ended; one tuple, so that a
            thread that takes no steps never sees the one without the other.
        finish_reason: "stop", "length", "abort" or "error" once it has ended; `error` says what went wrong.
        num_computed: how many leading tokens have keys and values in pages, or in the swap space.
        num_hit: how many of these were found in the cache when the request was first admitted.
        num_preempted: how often its pages were taken away; num_swapped: how often to the swap space.
    """

    request_id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    prompt_embeds: PromptEmbeds | None = None
    priority: int = 0
    cache_salt: str | None = None
    adapter: str | None = None
    adapter_weights: Adapter | None = None
    adapter_slot: int = -1
    stop_check: StopCheck | None = None
    outbox: Outbox | None = None
    published: tuple[int, bool] = (0, False)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    error: Exception | None = None
    num_computed: int = 0
    num_hit: int = 0
    num_preempted: int = 0
    num_swapped: int = 0

    # The scheduler's own.
    arrival: int = -1
    limit: int = 0
    # Tokens that end it: stop tokens, and those that end a text unless they are ignored.
    ends: frozenset[int] = frozenset()
    seat: int = -1
    # How many tokens it may compute before its pages have to be looked at; only while it runs.
    room: int = 0
    # One for each group of layers.
    tables: list[BlockTable] = field(default_factory=list)
    # Keys of the leading full blocks, as far as they were needed; how many of these blocks are filed in the pools.
    keys: list[bytes] = field(default_factory=list)
    num_filed: int = 0
    # False once its keys and values stem from two states of the model.
    cacheable: bool = True
    # Of each generated token, where asked for: its log probability and those of the likeliest tokens.
    logprobs: list[tuple[float, dict[int, float] | None]] = field(default_factory=list)
    # Of each prompt token but the first, as far as computed, where asked for.
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # What the sampler keeps for the sequence.
    sampling_state: Any = None

    @property
    def prompt_ids(self) -> list[int]:
        """The token ids of the prompt; none where it was given as embeddings."""
        return self.tokens[: self.num_prompt] if self.prompt_embeds is None else []

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.num_prompt

    def publish(self) -> None:
        """Lets others see what it has now."""
        self.published = len(self.tokens), self.finish_reason is not None
        if self.outbox is not None:
            self.outbox.append(self)

    @property
    def rank(self) -> tuple[int, int]:
        """Requests of lower rank go first."""
        return self.priority, self.arrival

    @property
    def wants_logprob(self) -> bool:
        """Whether log probabilities of the generated tokens are kept."""
        return self.params.logprobs is not None or self.params.num_sequences > self.params.n

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether logits of its prompt's tokens are still asked for, to give their log probabilities."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1


class Outbox(Protocol):
    """Takes requests that have news; a deque will do."""

    def append(self, request: Request, /) -> None:
        """Called in the thread that takes the step."""


StopCheck: TypeAlias = Callable[[Request], bool]
