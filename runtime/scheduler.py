"""Decides what each step computes, and keeps the books of requests and pages. Pure Python: it never sees a tensor.

One rule covers everything: a request's computed tokens catch up with its known ones. A prompt is many known tokens at
once, taken in chunks; a decoding request knows one more token than is computed. `plan` gives both a share of one step
(continuous batching: Yu et al., Orca, 2022; chunks beside decodes: Agrawal et al., Sarathi-Serve, 2024), and `commit`
takes what the step chose.

When pages run out, the request of the worst rank gives all of its back and waits: to be brought back from the swap
space, or to be computed again (`_swaps`). The request of the best rank is never chosen, and no request is admitted that
would not fit alone: something always gets ahead.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmopt.compiler.errors import InputError, QueueFullError
from llmopt.runtime.adapter_slots import AdapterSlots
from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.metrics import Counters
from llmopt.runtime.page_groups import Move, PageGroup, PageGroups
from llmopt.runtime.prefix_cache import PrefixCache
from llmopt.runtime.request import BlockTable, Request, Status

# Rows of logits of one step that are computed for log probabilities of prompts: each is as wide as the vocabulary.
MAX_PROMPT_ROWS = 256
# Tokens up to which keys and values are computed again rather than swapped. A decode step reads all weights whatever it
# computes, and so many tokens more change its time little; swapping would copy their pages twice.
MIN_SWAPPED_TOKENS = 64

# Full pages of a decoding request that are filed together: hashing touches much that a step has put out of the caches.
FILED_TOGETHER = 4

# Waiting requests that are looked at when the first of them has to wait for its adapter.
LOOKAHEAD = 64


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a scheduler.

    max_num_seqs, max_num_batched_tokens: requests that run at once, and tokens of one step.
    max_model_len: longest sequence, prompt included.
    max_num_queued: requests that may wait; 0 is no limit.
    enable_prefix_caching: share the pages of prompts that begin alike.
    eos_token_ids: tokens that end a request.
    min_swapped_tokens: computed tokens from which a preempted request is swapped out rather than computed again.
    max_loras: adapters that running requests may have at once; 0: requests have none, or it does not matter which.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_queued: int = 0
    enable_prefix_caching: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    min_swapped_tokens: int = MIN_SWAPPED_TOKENS
    max_loras: int = 0


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of a request; `samples`: the logits of the last choose its next token."""

    request: Request
    start: int
    length: int
    samples: bool


class StepPlan(NamedTuple):
    """What the next step computes, once `moves` are performed; see `PageGroups`, whose own list this is."""

    chunks: tuple[Chunk, ...]
    moves: deque[Move]


class Scheduler:
    """Requests in, plans out.

    `plan` may be called again before `commit`, when a step was interrupted: it plans the same tokens anew.
    """

    def __init__(self, groups: Sequence[PageGroup], config: SchedulerConfig, fingerprint: str = "") -> None:
        self.config = config
        self.pages = PageGroups(groups, config.max_num_batched_tokens)
        self.prefixes = PrefixCache(groups, fingerprint)
        self.counters = Counters()
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self._waiting: list[Request] = []
        self._arrivals = 0
        self._seats = list(range(config.max_num_seqs - 1, -1, -1))
        self._adapters = AdapterSlots(config.max_loras)
        # Tokens of full pages that are filed together. Pages that are given back must have been filed before.
        self._together = (1 if self.pages.has_windows else FILED_TOGETHER) * self.pages.block_size
        self._planned: dict[Request, Chunk] = {}
        # How often a request has stopped running: whether all that a plan computes are still wanted.
        self.num_left = 0
        # The running requests, if the latest plan was of a token of each of them and nobody has come or left since.
        self.decoding: list[Request] = []
        # Whether a waiting request could start beside them, though nobody has left.
        self._may_start = True

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> BlockPool:
        """The pages of the first group of layers, for most models of all."""
        return self.pages.groups[0].pool

    @property
    def num_waiting(self) -> int:
        """Requests that have no pages, those in the swap space included."""
        return len(self._waiting)

    @property
    def num_swapped(self) -> int:
        """Requests in the swap space."""
        return sum(request.status is Status.SWAPPED for request in self._waiting)

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is left to compute."""
        return bool(self.requests)

    @property
    def has_room(self) -> bool:
        """Whether `add` would take another request now."""
        return self.config.max_num_queued == 0 or len(self._waiting) < self.config.max_num_queued

    def check(self, num_prompt: int, max_tokens: int | None) -> int:
        """The longest that a request can get, in tokens; raises InputError for one that could never be served."""
        limit = self.config.max_model_len
        if num_prompt < 1:
            raise InputError("the prompt is empty")
        if num_prompt >= limit:
            raise InputError(f"the prompt has {num_prompt} tokens; the longest sequence is {limit}")
        total = limit if max_tokens is None else min(num_prompt + max_tokens, limit)
        if (pool := self.pages.too_small(total)) is not None:
            raise InputError(
                f"prompt and output of {total} tokens do not fit into the KV cache of "
                f"{pool.num_blocks * pool.block_size}; raise kv_cache_memory_bytes or lower max_tokens"
            )
        return total

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises InputError for one that could never be served or whose id is taken, QueueFullError when too many wait.
        """
        request.limit = self.check(request.num_prompt, request.params.max_tokens)
        if request.request_id in self.requests:
            raise InputError(f"a request with the id {request.request_id!r} has not finished yet")
        if not self.has_room:
            raise QueueFullError(f"{len(self._waiting)} requests wait, max_num_queued is {self.config.max_num_queued}")
        own = frozenset(request.params.stop_token_ids)
        request.ends = own if request.params.ignore_eos else own | self.config.eos_token_ids
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self.requests[request.request_id] = request
        request.tables = [BlockTable() for _ in self.pages.groups]
        self._enqueue(request)

    def fork(self, parent_id: str, child: Request) -> None:
        """Adds a request whose tokens begin as the parent's, on the parent's pages as far as these are computed.

        Pages are copied once one of the two writes to them. Where nothing can be shared the child waits like any other.
        Raises as `add`, and InputError for an unknown parent.
        """
        parent = self.requests.get(parent_id)
        if parent is None:
            raise InputError(f"there is no unfinished request with the id {parent_id!r}")
        self.add(child)
        count = min(parent.num_computed, len(child.tokens) - 1)
        same = child.tokens[:count] == parent.tokens[:count] and child.prompt_embeds is parent.prompt_embeds
        kin = (child.cache_salt, child.adapter) == (parent.cache_salt, parent.adapter)
        if not (count and same and kin and self._seats and parent.status is Status.RUNNING):
            return
        # Behind a window the parent may have given back what the child, which is not as far, still looks at.
        if not self.pages.can_share(parent, count):
            return
        self._waiting.remove(child)
        pages = self.pool.blocks_for(count)
        child.cacheable = parent.cacheable
        child.keys = parent.keys[: count // self.pool.block_size]
        self.pages.share(child, [table.blocks[:pages] for table in parent.tables])
        parent.room = 0  # who writes to a page that both hold gets a copy of it
        self._start(child, count)
        child.num_filed = min(parent.num_filed, count // self.pool.block_size)

    def abort(self, request_id: str) -> bool:
        """Ends a request, whatever it is doing; whether there was one."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self.counters.requests_aborted += 1
        self._end(request, "abort")
        return True

    def forget_prefixes(self) -> None:
        """Call this when the model has changed: nothing that was computed before is shared with later requests."""
        self.pages.forget_all()
        for request in self.requests.values():
            request.keys.clear()
            request.num_filed = 0
            request.cacheable = request.num_computed == 0

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages away: to the swap space, or to be computed again from its known tokens."""
        request.num_preempted += 1
        self.counters.num_preemptions += 1
        self._file(request)
        if self._swaps(request) and self.pages.swap_out(request):
            self._leave(request)
            request.status, request.num_swapped = Status.SWAPPED, request.num_swapped + 1
            self.counters.num_swapped_out += 1
        else:
            self._vacate(request)
            request.status, request.cacheable = Status.WAITING, True
        self._enqueue(request)

    def _swaps(self, request: Request) -> bool:
        """Whether a preempted request should rather be swapped than computed again; see MIN_SWAPPED_TOKENS."""
        return request.num_computed >= self.config.min_swapped_tokens

    # ---- a step ----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """What the next step computes: decodes before chunks of prompts, and then requests that start."""
        self.decoding = []
        self._planned.clear()
        before = self.counters.num_preemptions
        # Decodes first: they are one token each, and nobody waits for a token because a prompt is long.
        order = sorted(self.running, key=lambda r: (len(r.tokens) - r.num_computed > 1, r.priority, r.arrival))
        budget = self.config.max_num_batched_tokens
        preempted = before
        for request in order:
            if budget <= 0:
                break
            share = self._share(request, budget)
            if share and request.status is Status.RUNNING and self._make_room(request, share):
                budget -= self._plan_chunk(request, share)
            if preempted != self.counters.num_preemptions:  # which may have taken requests out of the plan
                preempted, budget = self.counters.num_preemptions, self._budget()
        self._may_start = True
        if preempted == before or not self.running:
            self._admit()
            # Who does not fit now will not, until somebody leaves or pages go back before a request ends.
            self._may_start = self.pages.has_windows
        if not self._planned and self.requests:
            raise RuntimeError(f"{self.pool.num_held} of {self.pool.num_blocks} blocks are held, but not by a request")
        chunks = tuple(self._planned.values())
        if len(chunks) == len(self.running) and all(chunk.length == 1 and chunk.samples for chunk in chunks):
            self.decoding = [chunk.request for chunk in chunks]
        return StepPlan(chunks, self.pages.moves)

    def decodes_on(self, requests: Sequence[Request]) -> bool:
        """Whether the next step is a token of each of `requests`, a value of `decoding`, if they have pages for it.

        That is so where nobody has come or left (`_start`, `_leave`, `_enqueue` and `_end` put another list in its
        place), and no waiting request could start: one that had no seat or not the pages then does not have them now.
        """
        may_start = self._may_start and self._waiting and self._seats
        return requests is self.decoding and not may_start and not self.pages.moves

    def prepare(self) -> None:
        """Does what the next plan needs whatever the present step brings: keys of the prompts that come next."""
        if self._caches:
            for request in self._waiting[: len(self._seats) + 1]:
                self.prefixes.extend_keys(request)

    @staticmethod
    def is_wanted(chunk: Chunk) -> bool:
        """Whether a planned chunk is still to be computed: not once its request was aborted or preempted."""
        return chunk.request.status is Status.RUNNING and chunk.request.num_computed == chunk.start

    def commit(self, plan: StepPlan, results: Sequence[int | Exception | None]) -> list[Request]:
        """Takes what a step gave for each chunk: the token it chose, None where none was asked for, or what went wrong.

        Gives the requests that got a token or failed, in the plan's order. What was aborted or preempted since the
        plan was made is passed over.
        """
        changed = []
        for chunk, result in zip(plan.chunks, results, strict=True):
            if not self.is_wanted(chunk):
                continue
            request = chunk.request
            if isinstance(result, Exception):
                self.fail(request, result)
            else:
                self.advance(request, chunk.start + chunk.length, result)
            if result is not None:
                changed.append(request)
        return changed

    def advance(self, request: Request, end: int, token: int | None) -> None:
        """Notes that the first `end` tokens of a running request are computed, and the token that follows, if any."""
        request.num_computed, pages = end, self.pages
        if end - request.num_filed * pages.block_size >= self._together:
            self._file(request)
        if pages.has_windows:
            pages.give_back_passed(request)
        if token is not None:
            request.tokens.append(token)
            self.counters.generation_tokens += 1
            if token in request.ends or request.stop_check is not None or len(request.tokens) >= request.limit:
                self._finish_if_done(request)

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error. Pages that it held are never shared again: they may hold what broke it."""
        self.prefixes.forget(request)
        self.counters.requests_failed += 1
        request.error = error
        self._end(request, "error")

    def check_books(self) -> None:
        """Raises RuntimeError unless every block is free, cached or held as often as requests list it."""
        self.pages.check(self.requests.values())
        if len(self._seats) + len(self.running) != self.config.max_num_seqs:
            raise RuntimeError(f"{len(self._seats)} free seats, {len(self.running)} running requests")
        if sorted(map(id, [*self.running, *self._waiting])) != sorted(map(id, self.requests.values())):
            raise RuntimeError("a request is in no queue or in two")
        self._adapters.check(r.adapter for r in self.running if r.adapter_slot >= 0 and r.adapter is not None)

    # ---- pages -----------------------------------------------------------------------------------------------------

    def _make_room(self, request: Request, budget: int) -> bool:
        """Gives a request the pages of its next chunk, at the cost of requests of worse rank, or of its own."""
        upto = request.num_computed + min(len(request.tokens) - request.num_computed, budget)
        while not self.extend(request, upto):
            victim = max(self.running, key=lambda r: r.rank)
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def extend(self, request: Request, upto: int) -> bool:
        """Gives a running request what it needs to compute its first `upto` tokens, if there are so many pages."""
        if upto <= request.room:
            return True
        if upto == request.room + 1:  # a page more, behind those that it may write to already
            if not self.pages.add_page(request):
                return False
            request.room += self.pages.block_size
            return True
        needed = self.pages.needed(request, upto)
        if self.pages.short_of(needed):
            return False
        self.pages.extend(request, needed)
        request.room = min(len(table.blocks) for table in request.tables) * self.pool.block_size
        return True

    # ---- from one state to another ---------------------------------------------------------------------------------

    def _budget(self) -> int:
        return self.config.max_num_batched_tokens - sum(chunk.length for chunk in self._planned.values())

    @property
    def _caches(self) -> bool:
        return self.config.enable_prefix_caching

    def _share(self, request: Request, budget: int) -> int:
        """How many of `budget` tokens the request may take."""
        if not request.wants_prompt_rows:
            return budget
        taken = sum(chunk.length for other, chunk in self._planned.items() if other.wants_prompt_rows)
        return min(budget, MAX_PROMPT_ROWS - taken)

    def _file(self, request: Request) -> None:
        """Files the full pages of a running request: before others look for them, and before it gives them up."""
        if self._caches and request.cacheable:
            self.prefixes.file(request)

    def _plan_chunk(self, request: Request, budget: int) -> int:
        left = len(request.tokens) - request.num_computed
        count = min(left, budget)
        self._planned[request] = Chunk(request, request.num_computed, count, count == left)
        return count

    def _admit(self) -> None:
        """Starts waiting requests in the order of their rank, as long as the first of them fits."""
        while (budget := self._budget()) > 0 and (request := self._next_waiting()) is not None:
            share = self._share(request, budget)
            if not share:
                break
            holders = self._slot_holders(request)
            if not self._seats and not any(other.priority > request.priority for other in self.running):
                break
            swapped = request.status is Status.SWAPPED
            hit: list[list[int]] = [[] for _ in self.pages.groups]
            # Tokens whose pages are found are not computed, so there would be no logits of them.
            if self._caches and not swapped and not request.wants_prompt_rows:
                for other in self.running:
                    self._file(other)
                hit = self.prefixes.find(request)
            # Others may grow: room for what they know already, and for one more page each.
            start, growth = self.pages.needed_to_start(request, hit), self.pages.growth(self.running)
            needed = [own + others for own, others in zip(start, growth, strict=True)]
            short = [n - group.pool.num_available for n, group in zip(needed, self.pages.groups, strict=True)]
            if holders or not self._seats or any(count > 0 for count in short):
                if self._displace(request, short, holders):
                    continue
                break
            self._waiting.remove(request)
            if request.num_preempted == 0:
                request.num_hit = len(hit[0]) * self.pool.block_size
                self.counters.prompt_tokens += request.num_prompt
                self.counters.prefix_cache_queries += request.num_prompt if self._caches else 0
                self.counters.prefix_cache_hits += request.num_hit
            if swapped:
                self.pages.swap_in(request)
                self.counters.num_swapped_in += 1
                self._start(request, request.num_computed)
            else:
                self.pages.share(request, hit)
                self._start(request, len(hit[0]) * self.pool.block_size)
                request.num_filed = len(hit[0])
            if not self._make_room(request, share):
                break
            self._plan_chunk(request, share)

    def _next_waiting(self) -> Request | None:
        """The first waiting request, unless it has to wait until running ones of no lower priority give up a slot for
        its adapter.

        Then only requests without an adapter may overtake it: the slots run empty, and it gets the next one.
        """
        blocked = False
        for request in itertools.islice(self._waiting, LOOKAHEAD):
            if request.adapter is None or not self.config.max_loras:
                return request
            if not blocked and (self._adapters.has_room(request.adapter) or self._slot_holders(request)):
                return request
            blocked = True
        return None

    def _slot_holders(self, request: Request) -> list[Request]:
        """The running requests, all of lower priority, that have to go for `request` to have a slot for its adapter.

        None where there is a slot, or where none can be had so. Of several adapters, the one whose best request is of
        the worst rank gives way.
        """
        if request.adapter is None or not self.config.max_loras or self._adapters.has_room(request.adapter):
            return []
        holders: dict[str, list[Request]] = {}
        for other in self.running:
            if other.adapter is not None:
                holders.setdefault(other.adapter, []).append(other)
        lower = [each for each in holders.values() if all(other.priority > request.priority for other in each)]
        return max(lower, key=lambda each: min(other.rank for other in each), default=[])

    def _displace(self, request: Request, short: Sequence[int], holders: Sequence[Request]) -> bool:
        """Preempts `holders`, and then requests of lower priority, the worst first, if that gives `request` a seat and
        the pages that it is short of in each group. Otherwise nobody is preempted: it would help nobody."""
        lower = sorted((r for r in self.running if r.priority > request.priority), key=lambda r: r.rank, reverse=True)
        missing, victims = list(short), list[Request]()
        for victim in [*holders, *(other for other in lower if other not in holders)]:
            if len(victims) >= max(1, len(holders)) and max(missing) <= 0:
                break
            victims.append(victim)
            # Nor is there to be room for the victim to grow.
            gained = zip(missing, self.pages.freed(victim), self.pages.growth([victim]), strict=True)
            missing = [count - freed - growth for count, freed, growth in gained]
        if not victims or max(missing) > 0:
            return False
        for victim in victims:
            self.preempt(victim)
        return True

    def _start(self, request: Request, num_computed: int) -> None:
        """From waiting to running, with pages that hold its first tokens already."""
        self.decoding = []
        request.num_computed, request.room = num_computed, 0
        request.status, request.seat = Status.RUNNING, self._seats.pop()
        if request.adapter is not None and self.config.max_loras:
            request.adapter_slot = self._adapters.pin(request.adapter)
        self.running.append(request)

    def _enqueue(self, request: Request) -> None:
        self.decoding = []
        bisect.insort(self._waiting, request, key=lambda r: r.rank)

    def _vacate(self, request: Request) -> None:
        """From running to nowhere."""
        self.pages.release(request)
        request.num_computed = 0
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Gives up a running request's seat."""
        self.decoding = []
        self.num_left += 1
        request.num_filed = 0
        self.running.remove(request)
        self._seats.append(request.seat)
        request.seat = -1
        if request.adapter is not None and request.adapter_slot >= 0:
            self._adapters.unpin(request.adapter)
            request.adapter_slot = -1
        self._planned.pop(request, None)

    def _end(self, request: Request, reason: str) -> None:
        if request.status is Status.RUNNING:
            if reason != "error":
                self._file(request)
            self._vacate(request)
        else:
            self.decoding = []
            self._waiting.remove(request)
            self.pages.release(request)
        request.finish_reason = reason
        request.status = Status.FINISHED
        del self.requests[request.request_id]

    @staticmethod
    def _is_early(request: Request) -> bool:
        """Whether a token that ends requests does not count yet; behind a finished structure it is all there is."""
        state = request.sampling_state
        return request.num_generated < request.params.min_tokens and not (state is not None and state.is_complete)

    def _finish_if_done(self, request: Request) -> None:
        reason = None
        if request.tokens[-1] in request.ends and not self._is_early(request):
            reason = "stop"
        elif request.stop_check is not None:
            try:
                reason = "stop" if request.stop_check(request) else None
            except Exception as error:  # the caller's code: whatever it raises concerns this request alone
                self.fail(request, error)
                return
        if request.status is not Status.RUNNING:  # the check aborted it
            return
        if reason is None and len(request.tokens) >= request.limit:
            reason = "length"
        if reason is not None:
            self.counters.requests_finished += 1
            self._end(request, reason)
