"""Places the temporary values of a program in one arena: values whose lives do not overlap share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Life:
    """One temporary value: its size in bytes, and the first and last step that touch it."""

    size: sympy.Expr
    first: int
    last: int


@dataclass(frozen=True)
class Place:
    """Where a value lies: its byte offset in the arena, and its share of one of the arena's regions.

    `start` and `end` count in the region's unit, whatever number of bytes that is; regions never meet.
    """

    offset: sympy.Expr
    region: int
    start: int
    end: int

    def overlaps(self, other: Place) -> bool:
        """Whether the two have memory in common."""
        return self.region == other.region and self.start < other.end and other.start < self.end


def plan_memory(lives: Sequence[Life]) -> tuple[list[Place], sympy.Expr]:
    """(place of each value, size of the arena in bytes), with expressions in the symbols of the sizes.

    Sizes are symbolic, so which of two is larger is not decidable in general. It is among multiples of one expression,
    such as 3072 s and 12288 s, which is what the values of a model are: each such family has a region of its own, in
    which values are placed by number.
    """
    families: dict[sympy.Expr, list[int]] = defaultdict(list)
    known = {size: _family(size) for size in dict.fromkeys(life.size for life in lives)}
    for index, life in enumerate(lives):
        families[known[life.size][1]].append(index)
    places: dict[int, Place] = {}
    total: sympy.Expr = sympy.Integer(0)
    for region, (unit, members) in enumerate(families.items()):
        starts, length = _place([(known[lives[i].size][0], lives[i].first, lives[i].last) for i in members])
        for index, start in zip(members, starts, strict=True):
            places[index] = Place(total + start * unit, region, start, start + known[lives[index].size][0])
        total = total + length * unit
    return [places[index] for index in range(len(lives))], total


def _family(size: sympy.Expr) -> tuple[int, sympy.Expr]:
    """(multiple, unit): their product is `size`, or where it is not aligned the next aligned one."""
    multiple, unit = size.as_content_primitive()
    if unit == 1:
        return int(multiple + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT, unit
    if multiple.is_Integer and multiple % ALIGNMENT == 0:
        return int(multiple), unit
    return ALIGNMENT, FloorDiv(size + ALIGNMENT - 1, sympy.Integer(ALIGNMENT))


def _place(lives: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets of (size, first, last), and how long the memory is: the better one of two orders of choosing.

    Large values first leaves the fewest gaps (greedy by size; Pisarchyk and Lee, "Efficient Memory Management for Deep
    Neural Net Inference", 2020); early ones first does better where a large value could stand in several places.
    """
    by_size = sorted(range(len(lives)), key=lambda i: (-lives[i][0], *lives[i][1:]))
    by_time = sorted(range(len(lives)), key=lambda i: (lives[i][1], -lives[i][0], lives[i][2]))
    return min((_place_in_order(lives, order) for order in (by_size, by_time)), key=lambda placed: placed[1])


def _place_in_order(lives: Sequence[tuple[int, int, int]], order: Sequence[int]) -> tuple[list[int], int]:
    """Each value takes the lowest place that is free throughout its life."""
    taken: dict[int, set[tuple[int, int]]] = defaultdict(set)  # by step: (start, end)
    starts = [0] * len(lives)
    length = 0
    for index in order:
        size, first, last = lives[index]
        steps = range(first, last + 1)
        place = 0
        for start, end in sorted(set().union(*(taken[step] for step in steps))):
            if start - place >= size:
                break
            place = max(place, end)
        starts[index] = place
        length = max(length, place + size)
        for step in steps:
            taken[step].add((place, place + size))
    return starts, length
