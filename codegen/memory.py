"""Places the temporary values of a program in one arena: values whose lives do not overlap share memory."""

from __future__ import annotations

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


def plan_memory(lives: Sequence[Life]) -> tuple[list[sympy.Expr], sympy.Expr]:
    """(byte offset of each value, size of the arena), as expressions in the symbols of the sizes.

    Sizes are symbolic, so "fits into" is not decidable in general: a freed slot is reused by values of the same size
    expression. The layers of a model repeat the same few sizes, so the arena does not grow with depth.
    """
    slots: list[tuple[sympy.Expr, int]] = []  # (size, last step that uses it)
    chosen = [0] * len(lives)
    for index in sorted(range(len(lives)), key=lambda i: lives[i].first):
        life = lives[index]
        for number, (size, busy_until) in enumerate(slots):
            if busy_until < life.first and size == life.size:
                slots[number] = (size, life.last)
                chosen[index] = number
                break
        else:
            chosen[index] = len(slots)
            slots.append((life.size, life.last))
    starts: list[sympy.Expr] = []
    total: sympy.Expr = sympy.Integer(0)
    for size, _ in slots:
        starts.append(total)
        total = total + _aligned(size)
    return [starts[number] for number in chosen], total


def _aligned(size: sympy.Expr) -> sympy.Expr:
    if size.is_Integer:
        return sympy.Integer((int(size) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)
    return FloorDiv(size + ALIGNMENT - 1, sympy.Integer(ALIGNMENT)) * ALIGNMENT
