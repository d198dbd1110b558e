"""Slots of adapters: pinned while running requests use them, else least recently used first; scheduling on them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.formula import Memory, check_outputs, finish, make, request, step

from llmopt.runtime.adapter_slots import AdapterSlots
from llmopt.runtime.request import Request


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


@settings(max_examples=100, deadline=None)
@given(
    loads=st.lists(
        st.tuples(
            st.integers(1, 20), st.integers(1, 8), st.sampled_from([None, "a", "b", "c", "d"]), st.integers(0, 2)
        ),
        min_size=1,
        max_size=10,
    ),
    slots=st.integers(1, 3),
    blocks=st.integers(8, 30),
)
def test_any_load_ends_with_every_adapter_served(
    loads: list[tuple[int, int, str | None, int]], slots: int, blocks: int
) -> None:
    """Preempted or not, two adapters are never in one slot, and nobody waits for ever."""
    scheduler = make(blocks, max_loras=slots)
    memory, requests = Memory(scheduler), list[Request]()
    for number, (prompt, count, adapter, wait) in enumerate(loads):
        # No two requests have tokens in common: pages of equal tokens would hold the other adapter's.
        tokens = range(100 * number, 100 * number + prompt)
        requests.append(request(str(number), list(tokens), count, adapter=adapter))
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


def test_without_slots_an_adapter_is_a_part_of_the_key_only() -> None:
    scheduler = make()
    each = request("0", 9, 3, adapter="a")
    scheduler.add(each)
    finish(scheduler)
    assert each.finish_reason == "length" and each.adapter_slot == -1
