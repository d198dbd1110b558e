"""Sympy side of loop generation: sizes of traced tensors, what can be proved of an index, and how a loop is refined.

Lowering works on index expressions over loop variables of known size. Where a division, or the choice between the
pieces of a concatenation, cannot be decided for the whole range of a loop, it asks for a finer loop by raising
`SplitLoop` or `FactorLoop`; the loop's owner divides it and lowers again. So the inner loops hold plain addition and
multiplication, which a vectoriser understands.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv, PythonMod

Expr: TypeAlias = sympy.Expr
Indices: TypeAlias = tuple[Expr, ...]

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Unlowerable(Exception):
    """Something that has no loop form; the message says why.

    `node` is the node that cannot be lowered, None where single nodes can and their combination cannot.
    """

    node: Node | None = None


@dataclass(frozen=True)
class Loop:
    """A loop variable that counts from 0 to `size` - 1."""

    variable: sympy.Symbol
    size: Expr

    def split(self, point: Expr) -> tuple[tuple[Loop, Expr], tuple[Loop, Expr]]:
        """The loops over [0, point) and [point, size), each with the old variable in terms of the new one."""
        low, high = (loop_variable(f"{self.variable.name}{side}") for side in "ab")
        return (Loop(low, point), low), (Loop(high, sympy.expand(self.size - point)), high + point)

    def factor(self, inner: Expr) -> tuple[Loop, Loop, Expr]:
        """Outer loop, inner loop of size `inner`, and the old variable in terms of the two."""
        outer_size = exact_quotient(self.size, inner)
        if outer_size is None:
            raise Unlowerable(f"a loop of {self.size} does not divide into rows of {inner}")
        outer, within = (loop_variable(f"{self.variable.name}{side}") for side in "oi")
        return Loop(outer, outer_size), Loop(within, inner), outer * inner + within


class Refinement(Exception):
    """Asks the owner of `variable` to divide its loop."""

    def __init__(self, variable: sympy.Symbol) -> None:
        self.variable = variable
        super().__init__(variable)


class SplitLoop(Refinement):
    """Wants the loop cut in two at `point`."""

    def __init__(self, variable: sympy.Symbol, point: Expr) -> None:
        super().__init__(variable)
        self.point = point


class FactorLoop(Refinement):
    """Wants the loop as two nested ones, the inner of size `inner`."""

    def __init__(self, variable: sympy.Symbol, inner: Expr) -> None:
        super().__init__(variable)
        self.inner = inner


def loop_variable(name: str) -> sympy.Symbol:
    """The sympy symbol of a loop variable."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size_expression(value: Any) -> Expr:
    """The sympy expression of an int or SymInt.

    Raises:
        Unlowerable: a SymFloat, a SymBool or anything else that is no integer.
    """
    if isinstance(value, torch.SymInt):
        return sympy.expand(value.node.expr)
    if isinstance(value, int):
        return sympy.Integer(int(value))
    if isinstance(value, sympy.Expr):
        return value
    raise Unlowerable(f"{type(value).__name__} is not an integer size")


def shape_of(value: torch.Tensor) -> Indices:
    """The sizes of a fake tensor as sympy expressions."""
    return tuple(size_expression(n) for n in value.shape)


def product(sizes: Sequence[Expr]) -> Expr:
    """The product of the sizes, expanded."""
    return expand(sympy.Mul(*sizes))


@functools.lru_cache(maxsize=65536)
def expand(expression: Expr) -> Expr:
    """`sympy.expand`, remembered."""
    return sympy.expand(expression)


def same(left: Expr, right: Expr) -> bool:
    """Whether both are the same polynomial."""
    return left == right or expand(left - right) == 0


@functools.lru_cache(maxsize=65536)
def exact_quotient(top: Expr, bottom: Expr) -> Expr | None:
    """`top / bottom` where that is a polynomial with integer coefficients, else None."""
    if bottom == 1:
        return top
    if top.is_Integer and bottom.is_Integer:
        return top / bottom if bottom != 0 and top % bottom == 0 else None
    quotient = expand(sympy.cancel(top / bottom)) if bottom.free_symbols else expand(top / bottom)
    if sympy.fraction(sympy.together(quotient))[1] != 1:
        return None
    return quotient


@functools.lru_cache(maxsize=65536)
def _is_nonnegative_size(expression: Expr) -> bool:
    if expression.is_Integer:
        return bool(expression >= 0)
    # A size symbol that is known to be positive is 1 + t with t >= 0, which proves s - 1 >= 0.
    shift = {s: s + 1 for s in expression.free_symbols if s.is_positive}
    atoms = {a: sympy.Dummy(nonnegative=True) for a in expression.atoms(sympy.Function) if a.is_nonnegative}
    shifted = sympy.expand(expression.xreplace(atoms).subs(shift, simultaneous=True))
    for term in sympy.Add.make_args(shifted):
        coefficient, rest = term.as_coeff_Mul()
        if coefficient < 0 or not all(f.is_nonnegative for f in sympy.Mul.make_args(rest)):
            return False
    return True


def is_nonnegative(expression: Expr, sizes: Mapping[sympy.Symbol, Expr]) -> bool:
    """Whether `expression` >= 0 is provable for all values of the loop variables in `sizes` (variable: size)."""
    bound = expand(expression)
    for variable in sorted(bound.free_symbols & sizes.keys(), key=str):
        slope = bound.coeff(variable, 1)
        rest = expand(bound - slope * variable)
        if variable in rest.free_symbols or slope.free_symbols & sizes.keys():
            return False
        if _is_nonnegative_size(slope):
            bound = rest
        elif _is_nonnegative_size(expand(-slope)):
            bound = expand(rest + slope * (sizes[variable] - 1))
        else:
            return False
    return _is_nonnegative_size(bound)


def divide(index: Expr, divisor: Expr, sizes: Mapping[sympy.Symbol, Expr], refine: bool) -> tuple[Expr, Expr]:
    """(index // divisor, index % divisor) for an index >= 0.

    Raises:
        FactorLoop: with `refine`, where nesting a loop makes the division exact.
    """
    index = expand(index)
    if divisor == 1:
        return index, ZERO
    if divisor == 0:  # a dimension without entries, which nobody asks for
        return ZERO, ZERO
    quotient, rest = ZERO, ZERO
    for term in sympy.Add.make_args(index):
        part = exact_quotient(term, divisor)
        if part is None:
            rest += term
        else:
            quotient += part
    if is_nonnegative(rest, sizes) and is_nonnegative(divisor - 1 - rest, sizes):
        return quotient, rest
    for variable in sorted(rest.free_symbols & sizes.keys(), key=str) if refine else ():
        slope = rest.coeff(variable, 1)
        inner = exact_quotient(divisor, slope) if slope != 0 else None
        if inner is not None and inner != 1 and not inner.free_symbols & sizes.keys():
            outer = exact_quotient(sizes[variable], inner)
            if outer is not None and outer != 1:
                raise FactorLoop(variable, inner)
    return FloorDiv(index, divisor), PythonMod(index, divisor)


def reshape(
    indices: Indices, shape: Indices, source: Indices, sizes: Mapping[sympy.Symbol, Expr], refine: bool
) -> Indices:
    """The index into a tensor of shape `source` of the element at `indices` in its reshape to `shape`."""
    result: list[Expr] = []
    outer, inner = list(range(len(shape))), list(range(len(source)))
    while outer or inner:
        # The shortest leading runs of both shapes that hold equally many elements map to each other.
        here, there = [outer.pop(0)] if outer else [], [inner.pop(0)] if inner else []
        while True:
            left, right = product([shape[d] for d in here]), product([source[d] for d in there])
            if same(left, right):
                break
            if outer and (exact_quotient(right, left) is not None or not inner):
                here.append(outer.pop(0))
            elif inner:
                there.append(inner.pop(0))
            elif outer:
                here.append(outer.pop(0))
            else:
                break  # equal in total, though not provably: one run of everything that is left
        result += _unflatten(
            [indices[d] for d in here], [shape[d] for d in here], [source[d] for d in there], sizes, refine
        )
    return tuple(result)


def _unflatten(
    indices: list[Expr], shape: list[Expr], source: list[Expr], sizes: Mapping[sympy.Symbol, Expr], refine: bool
) -> list[Expr]:
    wide = [d for d, size in enumerate(source) if size != 1]
    if len(wide) <= 1 and len([s for s in shape if s != 1]) == len(wide):
        kept = [i for i, size in zip(indices, shape, strict=True) if size != 1]
        return [kept[0] if d in wide else ZERO for d in range(len(source))]
    flat = ZERO
    for index, size in zip(indices, shape, strict=True):
        flat = expand(flat * size + index)
    result = [ZERO] * len(source)
    for d in reversed(wide[1:]):
        flat, result[d] = divide(flat, source[d], sizes, refine)
    if wide:
        result[wide[0]] = flat
    return result
