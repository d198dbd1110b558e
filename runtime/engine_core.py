"""The engine: requests are added at any time, and each step computes a share of all that run."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol, cast

import torch

from llmopt.compiler.errors import InputError, OptionError, RequestError
from llmopt.compiler.options import Options
from llmopt.compiler.step import CacheSpec
from llmopt.runtime.adapters import Adapter, Adapters, LoRARequest
from llmopt.runtime.batch_builder import BatchBuilder
from llmopt.runtime.cache_sizes import cache_sizes, host_sizes
from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.overlap import Flight, Worker, overlaps
from llmopt.runtime.peft_folder import read_adapter, stamp
from llmopt.runtime.prompt_embeds import PromptEmbeds, checked_embeds, with_prompt_embeds
from llmopt.runtime.request import Outbox, Request, StopCheck
from llmopt.runtime.sampling import (
    Constraints,
    Sampled,
    Sampler,
    SamplingParams,
    SamplingState,
    token_logprobs,
)
from llmopt.runtime.scheduler import Chunk, Scheduler, SchedulerConfig, StepPlan
from llmopt.runtime.step_program import StepProgram

MAX_SALT_LENGTH = 256


class VocabularyInfo(Protocol):
    """What an engine must know about a model besides its program."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""


class EngineCore:
    """Runs requests on a step program with continuous batching. Threads may share it: one at a time takes a step.

    Each step is launched and settled. With `async_scheduling` the next one is launched before `step` returns.

    Args:
        program: bound to its weights.
        info: vocabulary and ends of sequence.
        options: limits, and the size of the KV cache.
        max_model_len: longest sequence, prompt included.
    """

    def __init__(self, program: StepProgram, info: VocabularyInfo, options: Options, max_model_len: int) -> None:
        self.program, self.vocab_size, self.max_model_len = program, info.vocab_size, max_model_len
        config = SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_num_queued=options.max_num_queued,
            enable_prefix_caching=options.enable_prefix_caching,
            eos_token_ids=frozenset(info.eos_token_ids),
            max_loras=program.adapters.spec.max_loras if program.adapters is not None else 0,
        )
        # Where the program takes adapters: its slots for them, and all that are known by name.
        self._slots = program.adapters
        self._embeds = program.prompt_embeds
        self.adapters = Adapters(self._slots.spec, stamp, read_adapter) if self._slots is not None else None
        sizes, per_page = cache_sizes(program, options, max_model_len), program.bytes_per_block_of_groups()
        self.cache = program.new_cache(sizes, host_sizes(sizes, per_page, options.swap_space_bytes))
        self.scheduler = Scheduler(self.cache.groups, config, _fingerprint(program.caches))
        narrowest = min((spec.window for spec in program.caches if spec.window), default=0)
        self._builder = BatchBuilder(
            config.max_num_seqs, program.block_size, len(sizes), narrowest, adapters=self.adapters is not None
        )
        self.eos_token_ids = info.eos_token_ids
        self._sampler = Sampler(info.vocab_size, info.eos_token_ids)
        # What a step has found of its logits, if it looked at all of them and no more.
        self._largest = program.largest if program.vocab_size == info.vocab_size else lambda logits: None
        self._ids = map(str, itertools.count())
        self._lock = threading.RLock()
        device = program.executable.device
        self._worker = Worker(device) if overlaps(options, device) else None
        self._flight: Flight | None = None
        # The latest step's run, if it was of nothing but decodes, and the flight that takes its steps.
        self._run: tuple[DecodeRun, Flight] | None = None

    # ---- requests --------------------------------------------------------------------------------------------------

    def prompt(self, given: Sequence[int] | torch.Tensor | PromptEmbeds) -> Sequence[int] | PromptEmbeds:
        """A prompt of token ids as it is, one of embeddings copied; raises InputError as `checked_embeds`."""
        return checked_embeds(given, self._embeds) if isinstance(given, torch.Tensor) else given

    def check(
        self,
        prompt: Sequence[int] | PromptEmbeds,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Raises InputError or OptionError for a request that could never be served, before any work is done."""
        if isinstance(prompt, PromptEmbeds):
            if params.prompt_logprobs is not None:
                raise OptionError(
                    "prompt_logprobs", params.prompt_logprobs, "None with prompt_embeds, which have no ids"
                )
        else:
            for token in prompt:
                if type(token) is not int or not 0 <= token < self.vocab_size:
                    raise InputError(f"token id {token!r} is not in 0..{self.vocab_size - 1}")
        self.scheduler.check(len(prompt), params.max_tokens)
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) >= 1 << 31:
            raise InputError(f"priority must be a whole number of 32 bits, got {priority!r}")
        if cache_salt is not None and not (isinstance(cache_salt, str) and 0 < len(cache_salt) <= MAX_SALT_LENGTH):
            raise InputError(f"cache_salt must be a text of 1 to {MAX_SALT_LENGTH} characters, got {cache_salt!r:.80}")

    def add_request(
        self,
        prompt: Sequence[int] | torch.Tensor | PromptEmbeds,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: int = 0,
        stop_check: StopCheck | None = None,
        outbox: Outbox | None = None,
        constraints: Constraints | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queues a request; it runs in the steps that follow.

        Args:
            prompt: token ids, or embeddings `[S, H]` where the program takes them.
            params: how to continue it.
            request_id: a name for `abort` and `fork`; by default one is made.
            priority: lower goes first.
            cache_salt: keys and values are shared only between requests of the same salt.
            stream: which random stream of the seed this sequence draws from.
            stop_check, outbox: see `Request`.
            constraints: what `ConstraintCompiler` made of `params`.
            adapter: one of `adapters`.

        Raises InputError for a request that could never be served, QueueFullError when too many wait.
        """
        prompt = self.prompt(prompt)
        self.check(prompt, params, priority=priority, cache_salt=cache_salt)
        if adapter is not None and self.adapters is None:
            raise InputError("this program takes no adapters: it was made with enable_lora=False")
        with self._lock:
            name = self._new_id() if request_id is None else request_id
        embeds = prompt if isinstance(prompt, PromptEmbeds) else None
        request = Request(
            name,
            [0] * len(prompt) if isinstance(prompt, PromptEmbeds) else list(prompt),
            len(prompt),
            params,
            prompt_embeds=embeds,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter.key if adapter is not None else None,
            adapter_weights=adapter,
            stop_check=stop_check,
            outbox=outbox,
        )
        request.sampling_state = SamplingState(params, request.prompt_ids, stream, constraints=constraints)
        with self._lock:
            self.scheduler.add(request)
        return request

    def adapter(self, request: LoRARequest) -> Adapter:
        """The adapter that a request names; raises as `Adapters.add`, and InputError where there are none."""
        if not isinstance(request, LoRARequest):
            raise InputError(f"lora_request must be a LoRARequest, got {request!r:.80}")
        if self.adapters is None:
            raise InputError(f"lora_request={request.lora_name!r} needs the option enable_lora=True")
        return self.adapters.add(request)

    def fork(
        self,
        parent: Request,
        *,
        stream: int,
        constraints: Constraints | None = None,
        stop_check: StopCheck | None = None,
        outbox: Outbox | None = None,
    ) -> Request:
        """Another continuation of a request's prompt, on the same pages until one of the two writes to them.

        Where the first has ended already, its pages are found as any prefix is. Arguments and errors as `add_request`.
        """
        with self._lock:
            name = self._new_id()
        child = Request(
            name,
            parent.tokens[: parent.num_prompt],
            parent.num_prompt,
            parent.params,
            prompt_embeds=parent.prompt_embeds,
            priority=parent.priority,
            cache_salt=parent.cache_salt,
            adapter=parent.adapter,
            adapter_weights=parent.adapter_weights,
            stop_check=stop_check,
            outbox=outbox,
        )
        child.sampling_state = SamplingState(parent.params, parent.prompt_ids, stream, constraints=constraints)
        # The prompt is the same: its log probabilities are the first one's.
        child.prompt_logprobs = parent.prompt_logprobs
        with self._lock:
            if self.scheduler.requests.get(parent.request_id) is parent:
                self.scheduler.fork(parent.request_id, child)
            else:
                self.scheduler.add(child)
        return child

    def abort(self, which: str | Request) -> bool:
        """Ends a request, given itself or its id, whatever it is doing; whether it was still going on."""
        with self._lock:
            name = which if isinstance(which, str) else which.request_id
            request = self.scheduler.requests.get(name)
            if request is None or (request is not which and not isinstance(which, str)):
                return False
            self.scheduler.abort(name)
            request.publish()
        return True

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error: for when the engine itself went wrong, so that nobody waits for ever."""
        with self._lock:
            for request in list(self.scheduler.requests.values()):
                self.scheduler.fail(request, error)
                request.publish()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    @property
    def has_room(self) -> bool:
        """Whether `add_request` would take another request now."""
        return self.scheduler.has_room

    def reset_prefix_cache(self) -> None:
        """Call this when weights have changed: later requests share nothing with what was computed before."""
        with self._lock:
            self.scheduler.forget_prefixes()
            for chunk in self._flight.work.chunks if self._flight else ():
                chunk.request.cacheable = False

    def metrics(self) -> Metrics:
        """Counts as of now."""
        scheduler = self.scheduler
        return Metrics(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=scheduler.num_waiting,
            num_requests_swapped=scheduler.num_swapped,
            kv_cache_usage=scheduler.pages.usage,
            swap_space_usage=scheduler.pages.swap_usage,
            num_steps=self.program.num_steps,
            **asdict(scheduler.counters),
        )

    # ---- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Computes one step; gives the requests that got a token or failed.

        With `async_scheduling` the step after it has begun by then, and runs while the caller looks at these; requests
        added now join the step after that.

        What goes wrong for one request ends that request alone, with finish_reason "error" and its `error` set.
        """
        flight = self._flight
        if flight is not None:  # outside the lock: others may add and abort meanwhile
            flight.wait()
        with self._lock:
            flight = self._flight or self._launch()
            if flight is None:
                return []
            changed = self._settle(flight)
            self._flight = None
            if self._worker is not None:
                self._flight = self._launch()
                self.scheduler.prepare()
                if self._run is not None:
                    self._run[0].prepare()
            return changed

    def _launch(self) -> Flight | None:
        """Plans the next step and begins it; None when there is nothing to do."""
        if self._run is not None:
            run, flight = self._run
            if run.goes_on:
                return flight.begin(self.scheduler.num_left)
            self._run = None
        plan = self.scheduler.plan()
        if not plan.chunks:
            return None
        while plan.moves:
            self.cache.perform(plan.moves[0])
            plan.moves.popleft()
        self._load_adapters(plan.chunks)
        # Built here: what happens to requests while the step runs must not reach it.
        batch = self._builder.build(plan.chunks)
        given = batch if self._embeds is None else with_prompt_embeds(batch, plan.chunks)
        # Tokens are chosen from the logits before the next step, so these may be lent.
        forward = functools.partial(self.program, given, self.cache, lend=True)
        if self.scheduler.decoding and given is batch:
            run = self._builder.decode_run(self.scheduler, batch)
            flight = Flight(run, forward, self._worker)
            self._run = run, flight
        else:
            flight = Flight(plan, forward, self._worker)
        return flight.begin(self.scheduler.num_left)

    def _settle(self, flight: Flight) -> list[Request]:
        """Chooses tokens from the logits of a step, and takes them to its requests."""
        work = flight.work
        try:
            logits = flight.logits()
        except Exception as error:
            return self._settle_alone(work.chunks, error)
        if flight.num_left != self.scheduler.num_left:
            chunks, logits = self._wanted(work.chunks, logits)
            return self._commit(chunks, self._choose(chunks, logits))
        if not isinstance(work, DecodeRun):
            return self._commit(work.chunks, self._choose(work.chunks, logits))
        largest = self._largest(logits) if work.is_plain else None
        if largest is not None and math.isfinite(sum(largest[0])):
            return work.commit(largest[1])
        results = self._choose(work.chunks, logits)
        if all(type(result) is int for result in results):
            return work.commit(cast(list[int], results))
        return self._commit(work.chunks, results)

    def _settle_alone(self, chunks: Sequence[Chunk], error: Exception) -> list[Request]:
        """After a step that failed: somebody in the batch is to blame, so each takes it alone.

        Steps may be repeated: they write the same keys and values again.
        """
        wanted = [chunk for chunk in chunks if self.scheduler.is_wanted(chunk)]
        results = [self._alone(chunk) if len(chunks) > 1 else _failure(error) for chunk in wanted]
        return self._commit(wanted, results)

    def _commit(self, chunks: Sequence[Chunk], results: Sequence[int | Exception | None]) -> list[Request]:
        self._run = None  # its batch stays behind
        changed = self.scheduler.commit(StepPlan(tuple(chunks), self.scheduler.pages.moves), results)
        for request in changed:
            request.publish()
        return changed

    def _load_adapters(self, chunks: Sequence[Chunk]) -> None:
        """Brings the weights of the requests' adapters into their slots; no step runs meanwhile."""
        if self._slots is not None:
            for chunk in chunks:
                if chunk.request.adapter_weights is not None:
                    self._slots.load(chunk.request.adapter_slot, chunk.request.adapter_weights)

    def _wanted(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> tuple[Sequence[Chunk], torch.Tensor]:
        """The chunks whose requests were neither aborted nor preempted during the step, and their rows of the logits.

        The others must not draw from their random streams: what is preempted is computed again.
        """
        wanted = [self.scheduler.is_wanted(chunk) for chunk in chunks]
        if all(wanted):
            return chunks, logits
        kept = [is_wanted for chunk, is_wanted in zip(chunks, wanted, strict=True) for _ in self._builder.rows(chunk)]
        return [chunk for chunk, is_wanted in zip(chunks, wanted, strict=True) if is_wanted], logits[torch.tensor(kept)]

    def _alone(self, chunk: Chunk) -> int | Exception | None:
        try:
            batch = self._builder.build([chunk])
            given = batch if self._embeds is None else with_prompt_embeds(batch, [chunk])
            logits = self.program(given, self.cache, lend=True)
        except Exception as error:
            return _failure(error)
        return self._choose([chunk], logits)[0]

    def _choose(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> list[int | Exception | None]:
        """The next token of each chunk that ends in one, given the logits of the rows that the builder asked for."""
        results: list[int | Exception | None] = [None] * len(chunks)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        if logits.shape[0] != len(sampling):
            every = logits
            logits = self._check_witnesses(chunks, logits, results)
            self._keep_prompt_logprobs(chunks, every, results)
            # A sequence that failed must not draw from its random stream nor accept a token.
            kept = [row for row, i in enumerate(sampling) if results[i] is None]
            if len(kept) != len(sampling):
                logits, sampling = logits[kept], [sampling[row] for row in kept]
        if not sampling:
            return results
        states = [chunks[i].request.sampling_state for i in sampling]
        for i, outcome in zip(sampling, self._sample(logits, states), strict=True):
            if isinstance(outcome, Sampled):
                results[i] = outcome.token
                if outcome.logprob is not None:
                    chunks[i].request.logprobs.append((outcome.logprob, outcome.top_logprobs))
            else:
                results[i] = outcome
        return results

    def _sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> Sequence[Sampled | Exception]:
        """What the sampler chooses for each row; where it fails, somebody is to blame, so each row is tried alone."""
        try:
            return self._sampler(logits, states, self._largest(logits))
        except Exception as error:
            if len(states) == 1:
                return [_failure(error)]
        return [each for row, state in enumerate(states) for each in self._sample(logits[row : row + 1], [state])]

    def _check_witnesses(
        self, chunks: Sequence[Chunk], logits: torch.Tensor, results: list[int | Exception | None]
    ) -> torch.Tensor:
        """Enters an error for chunks with a row that is not finite; gives the rows that tokens are chosen from."""
        finite = logits.amax(-1).isfinite().tolist()
        last, end = [], 0
        for i, chunk in enumerate(chunks):
            begin, end = end, end + len(self._builder.rows(chunk))
            if not all(finite[begin:end]):
                results[i] = RequestError("the logits of this request are not finite")
            if chunk.samples:
                last.append(end - 1)
        return logits[last]

    def _keep_prompt_logprobs(
        self, chunks: Sequence[Chunk], logits: torch.Tensor, results: Sequence[int | Exception | None]
    ) -> None:
        """Notes how likely the prompts' tokens are, for the chunks that were asked for that and have not failed."""
        begin = 0
        for chunk, result in zip(chunks, results, strict=True):
            request, rows = chunk.request, self._builder.rows(chunk)
            if request.wants_prompt_rows and result is None and (wanted := self._builder.prompt_rows(chunk)):
                place = begin + rows.index(wanted[0])
                first = chunk.start + wanted[0] + 1
                tokens = request.tokens[first : first + len(wanted)]
                count = request.params.prompt_logprobs or 0
                found = token_logprobs(logits[place : place + len(wanted), : self.vocab_size], tokens, count)
                request.prompt_logprobs.extend(found)
            begin += len(rows)

    def _new_id(self) -> str:
        return next(name for name in self._ids if name not in self.scheduler.requests)


def _failure(error: Exception) -> RequestError:
    failure = RequestError(f"the step of this request failed: {error}")
    failure.__cause__ = error
    return failure


def _fingerprint(caches: Sequence[CacheSpec]) -> str:
    """Everything about the pages of one pool that is not the same for all its requests is in a request's own key."""
    return repr(list(caches))
