"""Slots of adapters: pinned while running requests use them, else least recently used first; scheduling on them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.formula import Memory, check_outputs, finish, make, request, step

from llmopt.runtime.adapter_slots import AdapterSlots
from llmopt.runtime.request import Request
from llmopt.runtime.scheduler import Scheduler


def test_the_least_recently_used_one_goes_first() -> None:
    slots = AdapterSlots(2)
    a, b = slots.pin("a"), slots.pin("b")
    assert sorted((a, b)) == [0, 1] and slots.pin("a") == a
    assert not slots.has_room("c") and slots.has_room("b")
    slots.check(["a", "a", "b"])
    for key in ("a", "b", "a"):
        slots.unpin(key)
    assert slots.pin("a") == a, "an adapter that nobody uses stays where it is"
    assert slots.has_room("c") and slots.pin("c") == b
    slots.unpin("a")
    assert slots.pin("b") == a


def test_a_slot_that_is_used_is_never_taken() -> None:
    slots = AdapterSlots(1)
    slots.pin("a")
    with pytest.raises(RuntimeError, match="all 1 slots"):
        slots.pin("b")
    slots.check(["a"])
    with pytest.raises(RuntimeError, match="pinned"):
        slots.check([])


@settings(max_examples=100)
@given(
    loads=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(1, 8),
            st.sampled_from([None, "a", "b", "c", "d"]),
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=10,
    ),
    slots=st.integers(1, 3),
    blocks=st.integers(8, 30),
)
def test_any_load_ends_with_every_adapter_served(
    loads: list[tuple[int, int, str | None, int, int]], slots: int, blocks: int
) -> None:
    """Preempted or not, two adapters are never in one slot, and nobody waits for ever."""
    scheduler = make(blocks, max_loras=slots)
    memory, requests = Memory(scheduler), list[Request]()
    for number, (prompt, count, adapter, wait, priority) in enumerate(loads):
        # No two requests have tokens in common: pages of equal tokens would hold the other adapter's.
        tokens = range(100 * number, 100 * number + prompt)
        requests.append(request(str(number), list(tokens), count, priority=priority, adapter=adapter))
        scheduler.add(requests[-1])
        for _ in range(wait):
            if scheduler.has_unfinished:
                step(scheduler, memory)
                places = {(r.adapter, r.adapter_slot) for r in scheduler.running if r.adapter is not None}
                assert len(places) == len({slot for _, slot in places}) <= slots
                assert all(0 <= slot < slots for _, slot in places)
    finish(scheduler, memory)
    check_outputs(requests)
    assert all(each.adapter_slot == -1 for each in requests)


def adapted(scheduler: Scheduler, *loads: tuple[str, str | None, int]) -> dict[str, Request]:
    """Requests (name, adapter, priority) of 5 tokens and 4 more, no two of which have tokens in common."""
    made = {}
    for name, adapter, priority in loads:
        made[name] = request(name, [100 * ord(name) + i for i in range(5)], 4, priority=priority, adapter=adapter)
        scheduler.add(made[name])
    return made


def test_a_better_priority_displaces_an_adapter() -> None:
    """All users of one adapter go, of that one whose best user is worst; who has another adapter stays."""
    scheduler = make(40, max_loras=2, max_num_seqs=8)
    memory = Memory(scheduler)
    made = adapted(scheduler, ("a", "x", 1), ("b", "y", 2), ("c", "y", 3), ("d", None, 9))
    step(scheduler, memory)
    assert len(scheduler.running) == 4
    made |= adapted(scheduler, ("u", "z", 0))
    step(scheduler, memory)
    assert {r.request_id for r in scheduler.running} == {"a", "d", "u"}
    assert [made[name].num_preempted for name in "abcdu"] == [0, 1, 1, 0, 0]
    finish(scheduler, memory)
    check_outputs(list(made.values()))


def test_an_equal_or_worse_priority_waits() -> None:
    """Also for a slot that only some of its users would have to leave."""
    scheduler = make(40, max_loras=1, max_num_seqs=8)
    memory = Memory(scheduler)
    made = adapted(scheduler, ("a", "x", 1), ("b", "x", 5))
    step(scheduler, memory)
    made |= adapted(scheduler, ("u", "z", 1), ("v", "z", 3), ("w", None, 7))
    step(scheduler, memory)
    assert {r.request_id for r in scheduler.running} == {"a", "b", "w"}, "only one without an adapter overtakes"
    finish(scheduler, memory)
    check_outputs(list(made.values()))
    assert all(each.num_preempted == 0 for each in made.values())


def test_nobody_goes_for_a_request_that_finds_no_pages() -> None:
    """Its adapter's slot could be had, but pages are held by its betters."""
    scheduler = make(10, max_loras=1, max_num_batched_tokens=64)  # pages of 4 tokens
    memory = Memory(scheduler)
    made = {"a": request("a", list(range(1000, 1022)), 6, priority=0)}
    scheduler.add(made["a"])
    made |= adapted(scheduler, ("b", "x", 2))
    step(scheduler, memory)
    assert len(scheduler.running) == 2
    made["u"] = request("u", list(range(2000, 2025)), 2, priority=1, adapter="z")
    scheduler.add(made["u"])
    step(scheduler, memory)
    assert (made["b"].num_preempted, made["u"].num_computed) == (0, 0), "a slot without pages is of no use"
    finish(scheduler, memory)
    check_outputs(list(made.values()))


def test_without_slots_an_adapter_is_a_part_of_the_key_only() -> None:
    scheduler = make()
    each = request("0", 9, 3, adapter="a")
    scheduler.add(each)
    finish(scheduler)
    assert each.finish_reason == "length" and each.adapter_slot == -1
