"""The arena: values that live at once never share memory, whatever the sizes, and it is no larger than it must be."""

from __future__ import annotations

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.codegen.memory import ALIGNMENT, Life, plan_memory

S, T = sympy.symbols("s t", integer=True, nonnegative=True)
SIZES = st.one_of(
    st.integers(0, 5000).map(sympy.Integer),
    st.builds(
        lambda multiple, unit: multiple * unit, st.integers(1, 300), st.sampled_from([S, T, S * T, S + 1, S + T])
    ),
)


@st.composite
def lives(draw: st.DrawFn) -> list[Life]:
    made = []
    for _ in range(draw(st.integers(0, 25))):
        first = draw(st.integers(0, 30))
        made.append(Life(draw(SIZES), first, first + draw(st.integers(0, 8))))
    return made


@settings(deadline=None)
@given(lives(), st.integers(0, 70), st.integers(0, 70))
def test_values_that_live_at_once_do_not_overlap(lives: list[Life], s: int, t: int) -> None:
    places, total = plan_memory(lives)
    sizes = {S: s, T: t}
    placed = [
        (life, place, int(place.offset.subs(sizes)), int(life.size.subs(sizes)))
        for life, place in zip(lives, places, strict=True)
    ]
    for index, (life, place, start, size) in enumerate(placed):
        assert start % ALIGNMENT == 0
        assert 0 <= start <= start + size <= int(total.subs(sizes))
        for other, taken, begin, length in placed[:index]:
            together = life.first <= other.last and other.first <= life.last
            apart = start + size <= begin or begin + length <= start or not size or not length
            assert apart or not together
            assert apart or (place.overlaps(taken) and taken.overlaps(place))


def _layers(count: int, unit: sympy.Expr) -> list[Life]:
    """What a BERT's layers keep: the stream, q, k and v, attention, its product, the stream again, both products."""
    made = []
    for step in range(0, 7 * count, 7):
        spans = [(1, 0, 4), (3, 1, 2), (1, 2, 3), (1, 3, 4), (1, 4, 7), (4, 5, 6), (1, 6, 7)]
        made += [Life(3072 * width * unit, step + first, step + last) for width, first, last in spans]
    return made


def test_as_much_as_is_alive_at_once_and_no_more_for_more_layers() -> None:
    for unit in (sympy.Integer(1), S, S * T):
        for count in (1, 2, 12):
            _, total = plan_memory(_layers(count, unit))
            assert sympy.expand(total - 18432 * unit) == 0


def test_sizes_of_one_kind_are_compared_and_sizes_of_two_kinds_are_not() -> None:
    small, large = Life(64 * S, 0, 1), Life(128 * S, 2, 3)
    places, total = plan_memory([small, large])
    assert ([place.offset for place in places], total) == ([0, 0], 128 * S)
    assert places[0].overlaps(places[1])
    places, total = plan_memory([small, Life(64 * T, 2, 3)])
    assert [place.offset for place in places] == [0, 64 * S]
    assert not places[0].overlaps(places[1])
    assert total == 64 * S + 64 * T
