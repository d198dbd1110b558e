"""Generates text with a step program: prompts are prefilled together, then every request decodes in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.sampling import Sampled, Sampler, SamplingParams, SamplingState
from llmopt.runtime.step_program import StepBatch, StepProgram


@dataclass
class Request:
    """One prompt and what has been generated for it."""

    index: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    finish_reason: str | None = None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    state: SamplingState = field(init=False)

    def __post_init__(self) -> None:
        self.state = SamplingState(self.params, self.tokens)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.num_prompt


# Called after each new token of a request but one that ends it; returning True ends the request with reason "stop".
StopCheck = Callable[[Request], bool]


class Generator:
    """Runs requests on a step program.

    Args:
        program: bound to its weights.
        cache: pages for all requests that run together.
        max_model_len: longest sequence, prompt included.
        max_num_seqs, max_num_batched_tokens: limits of one step.
        vocab_size: token ids must lie below it.
        eos_token_ids: tokens that end a request.
    """

    def __init__(
        self,
        program: StepProgram,
        cache: KVCache,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.program, self.cache = program, cache
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sampler = Sampler(vocab_size, tuple(eos_token_ids))

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises InputError for a request that could never be served, before any work is done."""
        if not prompt:
            raise InputError("the prompt is empty")
        bad = next(
            (t for t in prompt if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.vocab_size), None
        )
        if bad is not None:
            raise InputError(f"token id {bad!r} is not in 0..{self.vocab_size - 1}")
        if len(prompt) >= self.max_model_len:
            raise InputError(f"the prompt has {len(prompt)} tokens; the longest sequence is {self.max_model_len}")
        for name, neutral in (
            ("n", 1),
            ("best_of", None),
            ("logprobs", None),
            ("prompt_logprobs", None),
            ("detokenize", True),
        ):
            if getattr(params, name) != neutral:
                raise InputError(f"{name}={getattr(params, name)} is not served here")
        total = self._total(prompt, params)
        if self.cache.blocks_for(total) > self.cache.num_blocks:
            raise InputError(
                f"prompt and output of {total} tokens do not fit into the KV cache of "
                f"{self.cache.num_blocks * self.cache.block_size}; raise kv_cache_memory_bytes or lower max_tokens"
            )

    def _total(self, prompt: Sequence[int], params: SamplingParams) -> int:
        limit = self.max_model_len
        return limit if params.max_tokens is None else min(len(prompt) + params.max_tokens, limit)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        stop_check: StopCheck | None = None,
    ) -> Iterator[Request]:
        """Yields a request each time it got a token; its `finish_reason` is set with the last one.

        All prompts are checked first, so a bad one raises before any has been run.
        """
        for prompt, param in zip(prompts, params, strict=True):
            self.check(prompt, param)
        waiting = [Request(i, list(p), len(p), s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        running: list[Request] = []
        try:
            while waiting or running:
                self._admit(waiting, running)
                batch = self._plan(running)
                for request in self._step(batch):
                    self._finish(request, stop_check)
                    yield request
                for request in [r for r in running if r.finish_reason is not None]:
                    running.remove(request)
                    self.cache.release(request.blocks)
                    request.blocks = []
        finally:
            for request in running:
                self.cache.release(request.blocks)
                request.blocks = []

    def _admit(self, waiting: list[Request], running: list[Request]) -> None:
        """Starts requests in order while they fit; each reserves the pages of its longest possible output."""
        while waiting and len(running) < self.max_num_seqs:
            request = waiting[0]
            total = self._total(request.tokens, request.params)
            if self.cache.blocks_for(total) > self.cache.num_free:
                break
            request.blocks = self.cache.allocate(total)
            running.append(waiting.pop(0))
        if not running:
            raise InputError(
                f"{self.cache.num_blocks - self.cache.num_free} of {self.cache.num_blocks} KV cache blocks are held by "
                "another generation that has not ended; finish or close it, or raise kv_cache_memory_bytes"
            )

    def _plan(self, running: Sequence[Request]) -> list[tuple[Request, int]]:
        """How many tokens of each request the next step computes: decodes first, then prompts in chunks."""
        budget = self.max_num_batched_tokens
        plan = []
        for request in sorted(running, key=lambda r: len(r.tokens) - r.computed):
            count = min(len(request.tokens) - request.computed, budget)
            if count > 0:
                plan.append((request, count))
                budget -= count
        return plan

    def _step(self, plan: Sequence[tuple[Request, int]]) -> list[Request]:
        """Runs one step; gives the requests that got a token, in the plan's order."""
        chunks = [r.tokens[r.computed : r.computed + n] for r, n in plan]
        batch = StepBatch.build(
            chunks, [r.computed for r, _ in plan], [r.blocks for r, _ in plan], self.cache.block_size
        )
        logits = self.program(batch, self.cache)
        done: list[Request] = []
        rows: list[int] = []
        for row, (request, count) in enumerate(plan):
            request.computed += count
            if request.computed == len(request.tokens):
                rows.append(row)
                done.append(request)
        sampled = self.sampler(logits[rows], [request.state for request in done])
        for request, choice in zip(done, sampled, strict=True):
            if not isinstance(choice, Sampled):
                raise choice
            request.tokens.append(choice.token)
        return done

    def _finish(self, request: Request, stop_check: StopCheck | None) -> None:
        params, token = request.params, request.tokens[-1]
        early = request.num_generated < params.min_tokens
        ends = token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos)
        if (ends and not early) or (stop_check is not None and stop_check(request)):
            request.finish_reason = "stop"
        elif request.num_generated == params.max_tokens or len(request.tokens) >= self.max_model_len:
            request.finish_reason = "length"


class VocabularyInfo(Protocol):
    """What a generator must know about a model besides its program."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""


def make_generator(
    program: StepProgram,
    options: Options,
    info: VocabularyInfo,
    max_model_len: int,
    lengths: Sequence[int],
    caches: dict[tuple[int, int], KVCache],
) -> Generator:
    """A generator over `program`; its KV cache is kept in `caches` and grows with what is asked for.

    With `kv_cache_memory_bytes` the pool has that size; otherwise it holds the longest `max_num_seqs` of `lengths`.
    """
    block_size = program.block_size
    blocks = [-(-min(n, max_model_len) // block_size) for n in lengths]
    if options.kv_cache_memory_bytes:
        count = max(1, options.kv_cache_memory_bytes // program.bytes_per_block())
    else:
        count = max(1, sum(sorted(blocks)[-options.max_num_seqs :]))
    key = (id(program), 0)
    cache = caches.get(key)
    # Another generation that has not ended keeps its pages; without a fixed budget this one gets a pool of its own.
    if cache is None or cache.num_blocks < count or (cache.num_free < count and not options.kv_cache_memory_bytes):
        cache = caches[key] = program.new_cache(count)
    return Generator(
        program,
        cache,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
    )
