"""The scheduler against a model that is a formula: shares of a step, ranks, preemption, sharing, and the end of all."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from models.formula import Memory, check_outputs, expected, finish, make, request, step

from llmopt.errors import InputError, QueueFullError
from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.page_groups import MoveKind, PageGroup
from llmopt.runtime.request import Request, Status
from llmopt.runtime.scheduler import Scheduler, SchedulerConfig

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def closure(path: Path) -> frozenset[str]:
    """Every module that importing a file of the runtime executes, but for the package's own root."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            found.add(name)
            inner = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
            if name.startswith("llmopt.") and inner.is_file():
                found |= closure(inner)
    return frozenset(found)


@pytest.mark.parametrize("name", ["block_pool", "request", "page_groups", "prefix_cache", "metrics", "scheduler"])
def test_it_never_sees_a_tensor(name: str) -> None:
    loaded = {module.split(".")[0] for module in closure(ROOT / "runtime" / f"{name}.py")}
    assert loaded.isdisjoint({"torch", "numpy"})


def test_the_closure_of_imports_finds_torch() -> None:
    assert "torch" in closure(ROOT / "runtime" / "engine_core.py")


# ---- shares of a step ----------------------------------------------------------------------------------------------


def test_decodes_go_first_and_prompts_fill_the_step() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    scheduler.add(request("a", 6))
    step(scheduler, memory)
    scheduler.add(request("b", 30))
    scheduler.add(request("c", 3))
    sizes = []
    for _ in range(3):
        plan, _ = step(scheduler, memory)
        sizes.append({chunk.request.request_id: (chunk.length, chunk.samples) for chunk in plan.chunks})
    assert sizes == [
        {"a": (1, True), "b": (15, False)},
        {"a": (1, True), "b": (15, True)},
        {"a": (1, True), "b": (1, True), "c": (3, True)},
    ]
    finish(scheduler, memory)


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 1}, {"max_num_seqs": 2}])
def test_limits_change_no_token_and_compute_none_twice(limits: dict[str, int]) -> None:
    scheduler = make(**limits)
    memory = Memory(scheduler)
    requests = [request(name, n) for name, n in [("a", 1), ("b", 30), ("c", 7), ("d", 19), ("e", 2)]]
    for each in requests:
        scheduler.add(each)
    computed = 0
    while scheduler.has_unfinished:
        plan, _ = step(scheduler, memory)
        computed += sum(chunk.length for chunk in plan.chunks)
    check_outputs(requests)
    assert computed == sum(len(each.tokens) - 1 for each in requests)
    assert scheduler.counters.num_preemptions == 0


def test_requests_join_while_others_run() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    requests = [request(str(i), 3 + i, 6) for i in range(6)]
    shared = 0
    for each in requests:
        scheduler.add(each)
        plan, _ = step(scheduler, memory)
        shared = max(shared, len(plan.chunks))
    finish(scheduler, memory)
    check_outputs(requests)
    assert shared == 4


# ---- queue, priorities, ends ---------------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    scheduler = make(max_num_queued=2)
    for name in "ab":
        scheduler.add(request(name, 3))
    assert not scheduler.has_room
    with pytest.raises(QueueFullError, match="2 requests wait, max_num_queued is 2"):
        scheduler.add(request("c", 3))
    assert set(scheduler.requests) == {"a", "b"}
    memory = Memory(scheduler)
    step(scheduler, memory)
    scheduler.add(request("c", 3))
    finish(scheduler, memory)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 1, "the prompt is empty"),
        (64, 1, "the prompt has 64 tokens; the longest sequence is 64"),
        (30, 20, r"50 tokens do not fit into the KV cache of 48; raise kv_cache_memory_bytes or lower max_tokens"),
        (30, 1 << 24, r"64 tokens do not fit"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt: int, max_tokens: int, message: str) -> None:
    scheduler = make(12)
    with pytest.raises(InputError, match=message):
        scheduler.add(request("a", prompt, max_tokens))
    assert not scheduler.has_unfinished
    scheduler.add(request("b", 28, 20))
    with pytest.raises(InputError, match="'b' has not finished"):
        scheduler.add(request("b", 3))
    finish(scheduler)


def test_priorities_and_first_come_first_served_inside() -> None:
    scheduler = make(max_num_seqs=1)
    memory = Memory(scheduler)
    order = []
    for name, priority in [("a", 5), ("b", 5), ("c", 1), ("d", 1), ("e", 9)]:
        scheduler.add(request(name, 3, 2, priority=priority))
    while scheduler.has_unfinished:
        _, changed = step(scheduler, memory)
        order += [each.request_id for each in changed if each.status is Status.FINISHED]
    assert order == ["c", "d", "a", "b", "e"]


def test_a_better_priority_takes_the_seat_of_a_worse_one() -> None:
    scheduler = make(max_num_seqs=2)
    memory = Memory(scheduler)
    low = [request(name, 5, 8, priority=3) for name in "ab"]
    for each in low:
        scheduler.add(each)
    step(scheduler, memory)
    high = request("c", 5, 3, priority=0)
    scheduler.add(high)
    plan, _ = step(scheduler, memory)
    assert {chunk.request.request_id for chunk in plan.chunks} == {"a", "c"}
    assert [low[0].num_preempted, low[1].num_preempted] == [0, 1]
    # An equal priority does not.
    scheduler.add(request("d", 3, 1, priority=3))
    step(scheduler, memory)
    assert scheduler.counters.num_preemptions == 1
    finish(scheduler, memory)
    check_outputs([*low, high])


@pytest.mark.parametrize("seats", [2, 3])
def test_nobody_is_preempted_for_a_request_that_does_not_fit_all_the_same(seats: int) -> None:
    scheduler = make(20, max_num_seqs=seats, max_num_batched_tokens=64, max_model_len=80)
    memory = Memory(scheduler)
    large, low, high = request("large", 56, 20), request("low", 4, 6, priority=10), request("high", 40, 5)
    scheduler.add(large)
    scheduler.add(low)
    step(scheduler, memory)
    scheduler.add(high)
    step(scheduler, memory)
    # Nor is each step planned again for it.
    decoding = scheduler.decoding
    assert scheduler.decodes_on(decoding) and decoding == [large, low]
    while low.status is Status.RUNNING:
        step(scheduler, memory)
    assert not scheduler.decodes_on(decoding)
    finish(scheduler, memory)
    assert scheduler.counters.num_preemptions == 0
    check_outputs([large, low, high])


def test_a_seat_and_pages_are_taken_together() -> None:
    """A victim's pages, and those that it would have grown to, are just enough."""
    scheduler = make(8, max_num_seqs=2)
    memory = Memory(scheduler)
    first, low = request("first", 3, 12), request("low", 8, 12, priority=5)
    scheduler.add(first)
    scheduler.add(low)
    step(scheduler, memory)
    high = request("high", 20, 4)
    scheduler.add(high)
    step(scheduler, memory)
    assert high.status is Status.RUNNING and low.num_preempted == 1
    finish(scheduler, memory)
    check_outputs([first, low, high])


def test_ends() -> None:
    scheduler = make(eos_token_ids=frozenset({expected([1, 2], 3)[2]}))

    def run(check: Callable[[Request], bool] | None = None, **changes: Any) -> tuple[int, str | None]:
        each = request("x", [1, 2], 6, stop_check=check)
        each.params = each.params.replace(**changes)
        scheduler.add(each)
        finish(scheduler)
        assert each.generated == expected([1, 2], len(each.generated))
        return len(each.generated), each.finish_reason

    assert run() == (3, "stop")
    assert run(ignore_eos=True) == (6, "length")
    assert run(min_tokens=4) == (6, "length")
    assert run(max_tokens=2) == (2, "length")
    assert run(stop_token_ids=(expected([1, 2], 1)[0],)) == (1, "stop")
    assert run(lambda r: r.num_generated == 2) == (2, "stop")
    short = make(max_model_len=4)
    each = request("x", [1, 2], 6)
    short.add(each)
    finish(short)
    assert (len(each.generated), each.finish_reason) == (2, "length")


def test_a_check_may_fail_or_abort() -> None:
    scheduler = make()

    def bad(_: Request) -> bool:
        raise ZeroDivisionError

    def aborting(_: Request) -> bool:
        return scheduler.abort("b") and scheduler.abort("c") and False

    requests = [request("a", 3, stop_check=bad), request("b", 3, stop_check=aborting), request("c", 3), request("d", 3)]
    for each in requests:
        scheduler.add(each)
    finish(scheduler)
    assert [each.finish_reason for each in requests] == ["error", "abort", "abort", "length"]
    assert isinstance(requests[0].error, ZeroDivisionError)
    check_outputs(requests[3:])


def test_abort_between_plan_and_commit() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    requests = [request("a", 5), request("b", 5), request("c", 40)]
    for each in requests:
        scheduler.add(each)
    plan = scheduler.plan()
    results = memory.run(plan)
    assert scheduler.abort("a") and not scheduler.abort("a") and scheduler.abort("c")
    scheduler.preempt(requests[1])
    assert scheduler.commit(plan, results) == []
    scheduler.check_books()
    assert [each.generated for each in requests] == [[], [], []]
    finish(scheduler, memory)
    check_outputs(requests[1:2])
    assert requests[0].finish_reason == "abort"


def test_a_plan_that_was_not_carried_out_is_made_again() -> None:
    """As after an interrupt, with copies pending."""
    scheduler = make()
    memory = Memory(scheduler)
    parent = request("a", 6, 8)
    scheduler.add(parent)
    step(scheduler, memory)
    child = request("b", parent.tokens[:6], 8)
    scheduler.fork("a", child)
    first = scheduler.plan()
    assert first.moves
    scheduler.check_books()
    again = scheduler.plan()
    assert again == first
    scheduler.commit(again, memory.run(again))
    finish(scheduler, memory)
    check_outputs([parent, child])


def test_a_copy_that_was_not_made_yet_is_copied_on() -> None:
    """Forks of a fork whose own copy is pending; the first may even be gone when it is made."""
    for gone in (False, True):
        scheduler = make()
        memory = Memory(scheduler)
        family = [request("a", 6, 8)]
        scheduler.add(family[0])
        step(scheduler, memory)
        for name in "bcd":
            # Of better rank than its parent, so that it is the child who gets a copy.
            child = request(name, family[0].tokens[:6], 8, priority=-len(family))
            scheduler.fork(family[-1].request_id, child)
            family.append(child)
            assert child.status is Status.RUNNING
            scheduler.plan()
        if gone:
            scheduler.abort("b")
            scheduler.abort("c")
        finish(scheduler, memory)
        check_outputs([family[0], family[3]])


# ---- preemption ----------------------------------------------------------------------------------------------------


def test_preemption_changes_no_token_and_the_first_always_gets_ahead() -> None:
    scheduler = make(12, max_num_seqs=4)
    memory = Memory(scheduler)
    requests = [request(name, 6, 30) for name in "abcd"]
    for each in requests:
        scheduler.add(each)
    lengths = [0]
    while scheduler.has_unfinished:
        oldest = min(scheduler.requests.values(), key=lambda r: r.rank)
        plan, _ = step(scheduler, memory)
        assert oldest in [chunk.request for chunk in plan.chunks], "the request of the best rank was left out"
        lengths.append(sum(len(each.tokens) for each in requests))
    check_outputs(requests)
    assert scheduler.counters.num_preemptions > 0
    assert requests[0].num_preempted == 0
    # Every step brings at least a chunk ahead; without thrashing most bring a token for each request that runs.
    assert len(lengths) < sum(each.params.max_tokens for each in requests)


def test_admission_does_not_reserve_the_longest_output() -> None:
    scheduler = make(16, max_num_seqs=4)
    for name in "abcd":
        scheduler.add(request(name, 4, 50))
    scheduler.plan()
    assert len(scheduler.running) == 4


def test_allocated_and_unused_pages_are_few() -> None:
    """Mean length 300, pages of 16: under 4 % of the tokens that held pages could store are not stored, over a run."""
    scheduler = Scheduler(
        [PageGroup(BlockPool(2000, 16))],
        SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=4096, enable_prefix_caching=False),
    )
    for i in range(48):
        scheduler.add(request(str(i), 100 + i * 37 % 400, 20 + i * 13 % 61))
    capacity = used = 0
    lengths: list[int] = []
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        scheduler.commit(plan, [1 if chunk.samples else None for chunk in plan.chunks])
        running = scheduler.running
        capacity += sum(len(each.tables[0].blocks) * 16 for each in running)
        used += sum(each.num_computed for each in running)
        lengths += [len(each.tokens) for each in running]
    assert 280 < sum(lengths) / len(lengths) < 360
    assert 1 - used / capacity < 0.04


# ---- sharing -------------------------------------------------------------------------------------------------------


def test_prefixes_are_found_and_salts_keep_them_apart() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    prompt = list(range(100, 118))

    def run(name: str, tokens: Sequence[int], **fields: Any) -> int:
        each = request(name, tokens, **fields)
        scheduler.add(each)
        finish(scheduler, memory)
        check_outputs([each])
        return each.num_hit

    assert run("a", prompt) == 0
    assert run("b", prompt) == 16
    assert run("c", prompt[:16]) == 12, "a token is left to compute"
    assert run("d", [*prompt[:9], 1, 2, 3]) == 8
    assert run("e", [0, *prompt[1:]]) == 0
    # What was generated is found as well.
    assert run("f", [*prompt, *expected(prompt, 5)]) == 20
    assert run("g", prompt, cache_salt="s") == 0
    assert run("h", prompt, cache_salt="s") == 16
    assert run("i", prompt, adapter="s") == 0
    assert scheduler.counters.prefix_cache_hits == 16 + 12 + 8 + 20 + 16
    scheduler.forget_prefixes()
    assert run("j", prompt) == 0
    assert run("k", prompt) == 16
    off = make(enable_prefix_caching=False)
    for name in "ab":
        off.add(request(name, prompt))
        finish(off)
    assert off.counters.prefix_cache_hits == off.counters.prefix_cache_queries == 0
    assert off.pool.num_cached == 0


def test_pages_computed_before_the_model_changed_are_not_shared() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    scheduler.add(request("a", list(range(20)), 8))
    step(scheduler, memory)
    step(scheduler, memory)
    scheduler.forget_prefixes()
    finish(scheduler, memory)
    assert scheduler.pool.num_cached == 0


def test_a_failed_request_leaves_nothing_in_the_cache() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    bad, good = request("a", list(range(20)), 8), request("b", list(range(8)), 8)
    for each in (bad, good):
        scheduler.add(each)
    for _ in range(2):
        step(scheduler, memory)
    assert scheduler.pool.find(bad.keys[0]) is not None
    plan = scheduler.plan()
    results: list[int | Exception | None] = [*memory.run(plan)]
    results[[chunk.request for chunk in plan.chunks].index(bad)] = ValueError("no")
    assert bad in scheduler.commit(plan, results)
    scheduler.check_books()
    assert all(scheduler.pool.find(key) is None for key in bad.keys)
    assert bad.finish_reason == "error" and isinstance(bad.error, ValueError)
    finish(scheduler, memory)
    scheduler.add(request("c", list(range(20)), 8))
    step(scheduler, memory)
    assert scheduler.counters.requests_failed == 1


def test_forks_share_until_they_write() -> None:
    scheduler = make()
    memory = Memory(scheduler)
    parent = request("a", 10, 9)
    scheduler.add(parent)
    step(scheduler, memory)
    step(scheduler, memory)
    held = scheduler.pool.num_held
    child = request("b", parent.tokens[:10], 9)
    scheduler.fork("a", child)
    scheduler.check_books()
    assert child.status is Status.RUNNING and child.num_computed == 9
    assert scheduler.pool.num_held == held
    plan, _ = step(scheduler, memory)
    assert memory.moves[MoveKind.COPY] == 1
    assert {chunk.request.request_id: chunk.length for chunk in plan.chunks} == {"a": 1, "b": 1}
    finish(scheduler, memory)
    check_outputs([parent, child])
    with pytest.raises(InputError, match="no unfinished request with the id 'a'"):
        scheduler.fork("a", request("c", 3))


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("budget", [3, 16])
def test_pages_behind_the_window_are_given_back(window: int, budget: int) -> None:
    scheduler = make(14, windows=(window,), max_num_batched_tokens=budget, max_model_len=200)
    memory = Memory(scheduler)
    prompt = list(range(50))
    requests = [request(name, prompt, 60) for name in "ab"]
    hits = []
    for each in requests:
        scheduler.add(each)
        most = 0
        while scheduler.has_unfinished:
            step(scheduler, memory)
            most = max(most, scheduler.pool.num_held)
        # Far fewer than the 28 pages of the whole sequence.
        assert most <= scheduler.pages.most(scheduler.pages.groups[0], 110) <= 8
        hits.append(each.num_hit)
    check_outputs(requests)
    assert hits[0] == 0
    scheduler.check_books()


def test_a_window_needs_only_its_own_pages_to_be_found() -> None:
    scheduler = make(40, windows=(6,))
    memory = Memory(scheduler)
    prompt = list(range(30))
    first = request("a", prompt, 2)
    scheduler.add(first)
    finish(scheduler, memory)
    scheduler.pool.forget([scheduler.pool.find(key) for key in first.keys[:4]])  # type: ignore[misc]
    second = request("b", prompt, 9)
    scheduler.add(second)
    finish(scheduler, memory)
    assert second.num_hit == 28
    check_outputs([second])
