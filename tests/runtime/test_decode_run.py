"""Runs of decodes: the same chunks, batches and tokens as plans that are made anew at every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from models.formula import SIZE, Memory, check_batch, expected, make, request

from llmopt.runtime.batch_builder import BatchBuilder
from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.request import Request
from llmopt.runtime.scheduler import Scheduler, StepPlan


class Loop:
    """Steps of the formula model, by runs where they go on; the batch is checked against the requests' books each time.

    Args:
        ahead: whether each step is followed by what `prepare` does while it runs.
    """

    def __init__(
        self, requests: Sequence[Request], *, windows: Sequence[int] = (0,), blocks: int = 99, ahead: bool
    ) -> None:
        self.scheduler: Scheduler = make(blocks, windows, max_num_seqs=len(requests), max_num_batched_tokens=64)
        self.memory, self.ahead = Memory(self.scheduler), ahead
        self.builder = BatchBuilder(len(requests), SIZE, len(windows), adapters=True)
        for each in requests:
            self.scheduler.add(each)
        self.run: DecodeRun | None = None
        self.num_steps = self.num_on = 0

    def plan(self) -> StepPlan:
        self.num_steps += 1
        if self.run is not None and self.run.goes_on:
            self.num_on += 1
            check_batch(self.run.batch, self.run.chunks)
            return StepPlan(self.run.chunks, self.scheduler.pages.moves)
        plan = self.scheduler.plan()
        batch = self.builder.build(plan.chunks)
        check_batch(batch, plan.chunks)
        self.run = self.builder.decode_run(self.scheduler, batch) if self.scheduler.decoding else None
        return plan

    def step(self, during: Callable[[], object] = lambda: None) -> list[Request]:
        plan = self.plan()
        results = self.memory.run(plan)
        if self.ahead and self.run is not None:
            self.run.prepare()
        num_left = self.scheduler.num_left
        during()
        if self.run is not None and self.scheduler.num_left == num_left:
            changed = self.run.commit([result for result in results if result is not None])
        else:
            self.run, changed = None, self.scheduler.commit(plan, results)
        self.scheduler.check_books()
        return changed


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("windows", [(0,), (7,), (0, 9)])
def test_tokens_and_batches_are_those_of_plans(
    windows: tuple[int, ...], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[bool] = []
    turn_page = DecodeRun._turn_page
    monkeypatch.setattr(DecodeRun, "_turn_page", lambda run, *args: turned.append(turn_page(run, *args)) or turned[-1])
    draw = random.Random(5)
    requests = [request(str(i), draw.randint(1, 20), max_tokens=draw.randint(25, 40)) for i in range(5)]
    loop = Loop(requests, windows=windows, ahead=ahead)
    while loop.scheduler.has_unfinished:
        loop.step()
    for each in requests:
        assert each.generated == expected(each.tokens[: each.num_prompt], each.params.max_tokens or 0)
    # A request ends five times, and a batch gets wider a few times.
    assert loop.num_on >= loop.num_steps - 7 and loop.num_steps >= 25
    assert turned.count(True) >= 34 and turned.count(False) <= 3


def test_pages_are_taken_while_the_step_before_runs() -> None:
    held = {}
    for ahead in (False, True):
        requests = [request(str(i), SIZE + i, max_tokens=30) for i in range(3)]
        loop = Loop(requests, ahead=ahead)
        loop.step()
        counts = []
        for _ in range(2 * SIZE):
            loop.step(lambda: counts.append(loop.scheduler.pool.num_held))
        held[ahead] = counts
    # A request gets its next page one step earlier, and never more than that.
    assert held[True][:-1] == held[False][1:]


@pytest.mark.parametrize(
    "event", ["a request comes", "a request is aborted", "a request is preempted", "pages run out"]
)
def test_a_run_ends(event: str) -> None:
    requests = [request(str(i), 3 + i, max_tokens=20) for i in range(3)]
    loop = Loop(requests, ahead=True, blocks=9 if event == "pages run out" else 99)
    loop.step()
    loop.step()
    scheduler, run = loop.scheduler, loop.run
    assert run is not None and run.goes_on
    late = request("late", 5)
    events: dict[str, Callable[[], object]] = {
        "a request comes": lambda: scheduler.add(late),
        "a request is aborted": lambda: scheduler.abort("1"),
        "a request is preempted": lambda: scheduler.preempt(requests[2]),
    }
    if event in events:
        loop.step(events[event])
        assert not run.goes_on
    while scheduler.has_unfinished:
        loop.step()
    assert event != "pages run out" or scheduler.counters.num_preemptions > 0
    for each in requests:
        if each.finish_reason != "abort":
            assert each.generated == expected(each.tokens[: each.num_prompt], 20)


def test_a_stop_check_may_end_others() -> None:
    requests = [request(str(i), 3, max_tokens=20) for i in range(3)]
    loop = Loop(requests, ahead=False)
    loop.step()
    requests[0].stop_check = lambda each: loop.scheduler.abort("2") and len(each.tokens) > 5
    loop.step()
    known = len(requests[2].tokens)
    assert loop.step() == requests[:2]
    assert (requests[2].finish_reason, len(requests[2].tokens)) == ("abort", known)


def test_an_interrupt_in_the_middle_ends_the_run() -> None:
    requests = [request(str(i), 3, max_tokens=20) for i in range(3)]
    loop = Loop(requests, ahead=False)
    loop.step()
    loop.step()

    def interrupt(each: Request) -> bool:
        raise KeyboardInterrupt

    requests[1].stop_check = interrupt
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    requests[1].stop_check = None
    assert loop.run is not None and not loop.run.goes_on
    while loop.scheduler.has_unfinished:
        loop.step()
    for each in requests:
        assert each.generated == expected(each.tokens[: each.num_prompt], 20)
