"""The scheduler under any order of events, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from models.formula import SIZE, Memory, check_batch, check_outputs, expected, finish, make, request, step

from llmopt.errors import InputError, QueueFullError
from llmopt.runtime.batch_builder import BatchBuilder
from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.request import Request, Status
from llmopt.runtime.scheduler import StepPlan


class Events(RuleBasedStateMachine):
    """Requests are added, forked, aborted, preempted and failed while steps run; after each event the books are right.

    Steps read pages that hold the tokens themselves, so a page that is given to two, or taken too early, is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seen: list[Request] = []
        self.flight: tuple[StepPlan, list[int | None], int] | None = None
        self.run: DecodeRun | None = None

    @rule(
        blocks=st.integers(6, 30),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 20),
        windows=st.sampled_from([(0,), (0,), (3,), (8,), (0, 3), (0, 8)]),
        swap_blocks=st.sampled_from([0, 0, 5, 40]),
        caching=st.booleans(),
        max_loras=st.integers(1, 2),
    )
    @precondition(lambda self: self.count == 0)
    def start(
        self,
        blocks: int,
        seqs: int,
        budget: int,
        windows: tuple[int, ...],
        swap_blocks: int,
        caching: bool,
        max_loras: int,
    ) -> None:
        self.count = 1
        self.scheduler = make(
            blocks,
            windows,
            swap_blocks,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_num_queued=6,
            enable_prefix_caching=caching,
            max_loras=max_loras,
        )
        self.memory = Memory(self.scheduler)
        self.builder = BatchBuilder(seqs, SIZE, len(windows), adapters=True)

    def plan(self) -> StepPlan:
        """The next step, whose batch is that of its chunks; where a run goes on, these are a new plan's."""
        scheduler, run = self.scheduler, self.run
        if run is not None and run.goes_on:
            before = scheduler.counters.num_preemptions, list(scheduler.running)
            plan = scheduler.plan()
            assert set(plan.chunks) == set(run.chunks) and not plan.moves
            assert (scheduler.counters.num_preemptions, scheduler.running) == before
            check_batch(run.batch, run.chunks)
            scheduler.decoding = run.requests
            return StepPlan(run.chunks, plan.moves)
        self.run = None
        plan = scheduler.plan()
        if plan.chunks:
            batch = self.builder.build(plan.chunks)
            check_batch(batch, plan.chunks)
            if scheduler.decoding:
                self.run = self.builder.decode_run(scheduler, batch)
        return plan

    def commit(self, plan: StepPlan, results: Sequence[int | Exception | None], num_left: int) -> None:
        """As the engine does: by the run, unless somebody has left since the plan was made, or failed."""
        tokens = [result for result in results if isinstance(result, int)]
        if self.run is not None and self.scheduler.num_left == num_left and len(tokens) == len(results):
            assert self.run.commit(tokens) == [chunk.request for chunk in plan.chunks]
        else:
            self.run = None
            self.scheduler.commit(plan, results)

    def pick(self, number: int, among: Sequence[Request]) -> Request:
        return among[number % len(among)]

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        salt: str | None,
        adapter: str | None,
        parent: str | None = None,
    ) -> None:
        self.count += 1
        each = request(str(self.count), prompt, max_tokens, priority=priority, cache_salt=salt, adapter=adapter)
        try:
            if parent is None:
                self.scheduler.add(each)
            else:
                self.scheduler.fork(parent, each)
        except (InputError, QueueFullError):
            return
        self.seen.append(each)

    @rule(
        length=st.integers(1, 30),
        offset=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "s"]),
        adapter=st.sampled_from([None, None, "a", "b", "c"]),
    )
    @precondition(lambda self: self.count)
    def add(
        self, length: int, offset: int, max_tokens: int, priority: int, salt: str | None, adapter: str | None
    ) -> None:
        self.submit([i // 6 + offset * (i > 9) for i in range(length)], max_tokens, priority, salt, adapter)

    @rule(number=st.integers(0, 99), cut=st.integers(0, 4), max_tokens=st.integers(1, 12), same=st.booleans())
    @precondition(lambda self: self.count and self.scheduler.requests)
    def fork(self, number: int, cut: int, max_tokens: int, same: bool) -> None:
        parent = self.pick(number, list(self.scheduler.requests.values()))
        prompt = parent.tokens[: max(1, len(parent.tokens) - cut)]
        tokens = [*prompt, *([] if same else [5])]
        self.submit(tokens, max_tokens, parent.priority, parent.cache_salt, parent.adapter, parent.request_id)

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: self.count and self.scheduler.requests)
    def abort(self, number: int) -> None:
        assert self.scheduler.abort(self.pick(number, list(self.scheduler.requests.values())).request_id)

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: self.count and self.scheduler.running)
    def preempt(self, number: int) -> None:
        self.scheduler.preempt(self.pick(number, self.scheduler.running))

    @rule()
    @precondition(lambda self: self.count and not self.flight and self.scheduler.requests)
    def launch(self) -> None:
        """Begins a step, whose results come after other events."""
        plan = self.plan()
        assert plan.chunks, "a step without work while requests are unfinished"
        self.scheduler.check_books()
        self.scheduler.prepare()
        if self.run is not None:
            self.run.prepare()
        self.flight = plan, self.memory.run(plan), self.scheduler.num_left

    @rule()
    @precondition(lambda self: self.flight)
    def settle(self) -> None:
        if self.flight:
            flight, self.flight = self.flight, None
            self.commit(*flight)

    @rule(number=st.integers(0, 99), during=st.sampled_from(["nothing", "failure", "abort", "preempt", "interrupt"]))
    @precondition(lambda self: self.count and self.scheduler.requests)
    def step(self, number: int, during: str) -> None:
        self.settle()
        if not self.scheduler.requests:
            return
        plan, num_left = self.plan(), self.scheduler.num_left
        assert plan.chunks, "a step without work while requests are unfinished"
        self.scheduler.check_books()
        if during == "interrupt":
            return
        results: list[int | Exception | None] = [*self.memory.run(plan)]
        victim = plan.chunks[number % len(plan.chunks)].request
        held = [table.held for table in victim.tables]
        if during == "failure":
            results[number % len(plan.chunks)] = ValueError("no")
        elif during == "abort":
            self.scheduler.abort(victim.request_id)
        elif during == "preempt":
            self.scheduler.preempt(victim)
        self.commit(plan, results, num_left)
        if during == "failure":
            assert victim.finish_reason == "error"
            for group, blocks in zip(self.scheduler.pages.groups, held, strict=True):
                assert not any(group.pool.is_filed(block) for block in blocks), "what may be broken can be found"

    @rule()
    @precondition(lambda self: self.count)
    def change_the_model(self) -> None:
        self.scheduler.forget_prefixes()

    @rule()
    @precondition(lambda self: self.count)
    def drain(self) -> None:
        self.settle()
        finish(self.scheduler, self.memory)

    @invariant()
    def books_are_right(self) -> None:
        if not self.count:
            return
        self.scheduler.check_books()
        for group in self.scheduler.pages.groups:
            for pool in filter(None, (group.pool, group.host)):
                assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks
        for each in self.seen:
            assert each.generated == expected(each.tokens[: each.num_prompt], each.num_generated)
            assert each.status is not Status.FINISHED or not any(t.blocks or t.host for t in each.tables)
            assert (each.adapter_slot >= 0) == (each.status is Status.RUNNING and each.adapter is not None)

    def teardown(self) -> None:
        if self.count:
            self.settle()
            finish(self.scheduler, self.memory)
            self.scheduler.check_books()
            for each in self.seen:
                assert each.finish_reason in ("length", "abort", "error")


Events.TestCase.settings = settings(max_examples=250, stateful_step_count=40, suppress_health_check=list(HealthCheck))
TestEvents = Events.TestCase


@pytest.mark.slow
def test_many_more_orders_of_events() -> None:
    many = settings(
        max_examples=4000, stateful_step_count=60, derandomize=False, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Events, settings=many)


@settings(max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=8),
    blocks=st.integers(16, 40),
    seqs=st.integers(1, 5),
    budget=st.integers(1, 30),
)
def test_any_load_ends_with_the_right_tokens(
    lengths: list[tuple[int, int, int]], blocks: int, seqs: int, budget: int
) -> None:
    scheduler = make(blocks, max_num_seqs=seqs, max_num_batched_tokens=budget)
    memory = Memory(scheduler)
    requests = []
    for i, (prompt, count, wait) in enumerate(lengths):
        requests.append(request(str(i), [j // 3 for j in range(prompt)], count))
        scheduler.add(requests[-1])
        for _ in range(wait):
            if scheduler.has_unfinished:
                step(scheduler, memory)
    finish(scheduler, memory)
    check_outputs(requests)
