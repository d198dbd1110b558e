"""What the steps of a program cost, as data: index expressions over the program's symbols, to be kept in files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from llmopt.codegen import index
from llmopt.codegen.program import Program
from llmopt.compiler.errors import ProgramFileError, UnsupportedError
from llmopt.compiler.opspec import Cost

_MOST = 1 << 31  # of any size
CONTEXT = "context"  # keys that a query sees: in costs beside the program's symbols, of which none is called so


def costs_to_json(costs: Sequence[Cost], names: Mapping[sympy.Symbol, str]) -> list[Any]:
    """For each step [flops, bytes read, bytes written], or null where a cost is no expression of integers.

    `names`: the program's name of each symbol, or CONTEXT.
    """

    def written(cost: Cost) -> list[Any] | None:
        try:
            return [index.to_json(_rounded_down(part, names)) for part in vars(cost).values()]
        except UnsupportedError:  # of an op that users have registered
            return None

    return [written(cost) for cost in costs]


def _rounded_down(expression: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> index.Index:
    top, bottom = sympy.fraction(sympy.together(sympy.expand(expression)))
    whole = index.from_sympy(sympy.expand(top), names)
    return whole if bottom == 1 else index.Binary("//", whole, index.from_sympy(bottom, names))


def costs_from_json(data: Any, program: Program) -> list[tuple[index.Index, ...] | None] | None:
    """Reads what `costs_to_json` wrote for `program`; None for a file without costs.

    Raises ProgramFileError for anything else.
    """
    if data is None:
        return None
    if not isinstance(data, list) or len(data) != len(program.steps):
        raise ProgramFileError("the costs are not those of the program's steps")
    names = frozenset({CONTEXT, *(symbol.name for symbol in program.symbols)})
    found: list[tuple[index.Index, ...] | None] = []
    for row in data:
        if row is not None and (not isinstance(row, list) or len(row) != 3):
            raise ProgramFileError("malformed cost of a step")
        found.append(None if row is None else tuple(_checked(index.from_json(part, names)) for part in row))
    return found


def _checked(cost: index.Index) -> index.Index:
    """A cost that has a sensible number at any sizes, so that a report of a strange file cannot fail on it."""
    if not _divides_by_numbers(cost) or abs(index.evaluate(cost, defaultdict(lambda: _MOST))) >= 1 << 512:
        raise ProgramFileError("the cost of a step has no sensible number")
    return cost


def _divides_by_numbers(cost: index.Index) -> bool:
    if not isinstance(cost, index.Binary):
        return True
    constant = isinstance(cost.right, int) or cost.operator not in ("//", "%")
    return constant and _divides_by_numbers(cost.left) and _divides_by_numbers(cost.right)
