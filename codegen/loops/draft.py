"""One attempt at lowering one output over one range of its index: the emitter behind the op handlers.

A draft keeps sympy indices and fx nodes; `lower.py` turns a group's drafts into the IR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
from torch.fx import Node

from llmopt.codegen.loops.emit import dtype_name
from llmopt.codegen.loops.ir import FUNCTIONS, Call, Cast, Constant, DType, Local, ReductionKind, register
from llmopt.codegen.loops.operations import OPERATIONS
from llmopt.codegen.loops.symbolic import (
    ONE,
    ZERO,
    Expr,
    FactorLoop,
    Indices,
    Loop,
    Refinement,
    SplitLoop,
    Unlowerable,
    expand,
    is_nonnegative,
    loop_variable,
    same,
    size_expression,
)
from llmopt.codegen.loops.views import Context, bound_arguments, tensor_of, transform_of

MAX_PIECES = 32  # ranges of one loop nest, beyond which choices are made element by element


@dataclass(frozen=True)
class DraftLoad:
    """The element at `index` (counted from the first element) of the buffer of `node`."""

    node: Node
    index: Expr
    dtype: DType
    guard: int = -1


@dataclass(frozen=True)
class DraftIndex:
    """An index expression as an int64 value."""

    index: Expr
    dtype: DType = "int64"


@dataclass(frozen=True)
class DraftPosition:
    """Value number `arg` as a place among `size`; loads of the sweep name it by a symbol of its own."""

    arg: int
    size: Expr
    wraps: bool
    dtype: DType = "int64"


DraftValue: TypeAlias = DraftLoad | DraftIndex | DraftPosition | Constant | Local | Call | Cast


@dataclass
class DraftSweep:
    """Loops and the values computed in them; equal values have one number."""

    loops: list[Loop]
    values: list[DraftValue] = field(default_factory=list)
    numbers: dict[DraftValue, int] = field(default_factory=dict)
    positions: dict[sympy.Symbol, int] = field(default_factory=dict)
    memo: dict[Any, int] = field(default_factory=dict)

    def emit(self, value: DraftValue) -> int:
        """The number of `value`, which is added where it is new."""
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            self.values.append(value)
        return self.numbers[value]


@dataclass
class DraftReduction:
    """An accumulator, how many rows have one, and the sweeps that feed it with the number of the value they add."""

    kind: ReductionKind
    dtype: DType
    rows: Expr
    parts: list[tuple[DraftSweep, int]]


def strided(node: Node, index: Indices) -> Expr:
    """Position of an element in the node's buffer, in elements from the node's first."""
    strides = tensor_of(node).stride()
    return expand(sum((i * size_expression(s) for i, s in zip(index, strides, strict=True)), ZERO))


class Draft:
    """Lowers the element of `output` at `index`, for all values of `loops`.

    `inlined(node)` tells whether a node is computed here; any other one is read from its buffer. Implements
    `emit.Emit`.
    """

    def __init__(
        self, output: Node, loops: Sequence[Loop], index: Indices, inlined: Callable[[Node], bool], refine: bool
    ) -> None:
        self.output, self.index, self.inlined = output, index, inlined
        self.reductions: list[DraftReduction] = []
        self._known: dict[Any, int] = {}
        self._guard = -1
        self._fresh = 0
        self._sweeps = [DraftSweep(list(loops))]
        self.context = Context({loop.variable: loop.size for loop in loops}, refine)
        self.final = self._sweeps[0]
        self.result = self.cast(self.value(output, index), register(dtype_name(tensor_of(output).dtype)))
        self.store_index = strided(output, index)

    @property
    def _sweep(self) -> DraftSweep:
        return self._sweeps[-1]

    # ---- emit.Emit ----

    def value(self, node: Node, index: Indices) -> int:
        key = (node, index, self._guard)
        memo = self._sweep.memo
        if key not in memo:
            memo[key] = self._lower(node, index)
        return memo[key]

    def call(self, function: str, *args: int) -> int:
        _, signature = FUNCTIONS[function]
        dtype: DType = "bool" if signature == "compare" else self._dtype(args[-1])
        if dtype == "bool" and function in ("neg", "sub", "div", "pow"):
            raise Unlowerable(f"{function} of bool")
        return self._sweep.emit(Call(function, args, dtype))

    def constant(self, value: float | int | bool, dtype: DType) -> int:
        if dtype == "bool":
            return self._sweep.emit(Constant(bool(value), dtype))
        if dtype.startswith(("float", "bfloat")):
            # Rounding to a half type, where that is wanted, is done by the compiler of the generated code.
            ref = self._sweep.emit(Constant(float(value), register(dtype)))
            return self.cast(ref, dtype)
        if isinstance(value, float) and not math.isfinite(value):
            raise Unlowerable(f"the constant {value} as {dtype}")
        bits = int(dtype.lstrip("uint"))
        wrapped = int(value) % (1 << bits)
        if dtype[0] != "u" and wrapped >= 1 << (bits - 1):
            wrapped -= 1 << bits
        return self._sweep.emit(Constant(wrapped, dtype))

    def cast(self, ref: int, dtype: DType) -> int:
        value = self._sweep.values[ref]
        if self._dtype(ref) == dtype:
            return ref
        if register(dtype) != dtype:
            exact = isinstance(value, DraftLoad) and dtype_name(tensor_of(value.node).dtype) == dtype
            if exact or (isinstance(value, Cast) and value.dtype == dtype):
                return ref
        if isinstance(value, Constant) and register(dtype) == dtype and self._foldable(value, dtype):
            return self.constant(value.value, dtype)
        return self._sweep.emit(Cast(ref, dtype))

    def index_value(self, index: Expr) -> int:
        index = expand(index)
        if index.is_Integer:
            return self.constant(int(index), "int64")
        return self._sweep.emit(DraftIndex(index))

    def position(self, ref: int, size: Expr, wraps: bool) -> Expr:
        number = self._sweep.emit(DraftPosition(ref, size, wraps))
        symbol = loop_variable(f"p{number}_{len(self._sweeps)}")
        self._sweep.positions[symbol] = number
        return symbol

    def load(self, node: Node, index: Indices) -> int:
        dtype = register(dtype_name(tensor_of(node).dtype))
        return self._sweep.emit(DraftLoad(node, strided(node, index), dtype, self._guard))

    def reduce(
        self,
        key: object,
        kind: ReductionKind,
        dtype: DType,
        rows: Expr,
        sizes: Sequence[Expr],
        body: Callable[[Indices], int],
    ) -> int:
        if key not in self._known:
            reduction = DraftReduction(kind, dtype, rows, self._reduce(dtype, sizes, body))
            self._known[key] = len(self.reductions)
            self.reductions.append(reduction)
        return self._sweep.emit(Local(self._known[key], dtype))

    def piecewise(self, index: Expr, pieces: Sequence[tuple[Expr, Callable[[Expr], int]]]) -> int:
        sizes = self.context.sizes
        starts = [ZERO]
        for length, _ in pieces:
            starts.append(expand(starts[-1] + length))
        for (_, value), begin, end in zip(pieces, starts, starts[1:], strict=False):
            if is_nonnegative(index - begin, sizes) and is_nonnegative(end - 1 - index, sizes):
                return value(expand(index - begin))
        if self.context.refine:
            self._ask_for_split(expand(index), starts[1:-1])
        return self._choose(index, pieces, starts)

    # ---- inside ----

    def _dtype(self, ref: int) -> DType:
        return register(self._sweep.values[ref].dtype)

    @staticmethod
    def _foldable(value: Constant, dtype: DType) -> bool:
        if dtype.startswith("float"):
            return dtype == "float64" or value.dtype != "float64"
        return not isinstance(value.value, float) or dtype == "bool"

    def _lower(self, node: Node, index: Indices) -> int:
        if not self.inlined(node):
            return self.load(node, index)
        arguments = bound_arguments(node)
        try:
            return self._compute(node, arguments, index)
        except Unlowerable as error:
            error.node = error.node or node
            raise

    def _compute(self, node: Node, arguments: dict[str, Any], index: Indices) -> int:
        transform = transform_of(node)
        if transform is not None:
            source, inner = transform(node, arguments, index, self.context)
            return self.value(source, tuple(expand(i) for i in inner))
        handler = OPERATIONS.get(node.target)
        if handler is None:
            raise Unlowerable(f"{node.target} has no loop form")
        return handler(self, node, arguments, index)

    def _reduce(
        self, dtype: DType, sizes: Sequence[Expr], body: Callable[[Indices], int]
    ) -> list[tuple[DraftSweep, int]]:
        """One sweep for each range of the inner loops that the body asks for."""
        loops, index = [], []
        for size in sizes:
            if size == 1:
                index.append(ZERO)
                continue
            self._fresh += 1
            loops.append(Loop(loop_variable(f"r{self._fresh}"), size))
            index.append(loops[-1].variable)
        outer, guard = self.context, self._guard
        self._guard = -1  # a guard belongs to one element; the row's reductions are wanted either way
        parts = refinements(loops, tuple(index), lambda p, i, r: self._reduce_part(outer, p, i, r, dtype, body))
        self._guard = guard
        return parts

    def _reduce_part(
        self,
        outer: Context,
        loops: list[Loop],
        index: Indices,
        refine: bool,
        dtype: DType,
        body: Callable[[Indices], int],
    ) -> tuple[DraftSweep, int]:
        own = {loop.variable: loop.size for loop in loops}
        depth = len(self._sweeps)
        self.context = Context({**outer.sizes, **own}, outer.refine and refine)
        self._sweeps.append(DraftSweep(loops))
        try:
            ref = self.cast(body(index), dtype)
            return self._sweep, ref
        finally:
            del self._sweeps[depth:]
            self.context = outer

    def _ask_for_split(self, index: Expr, boundaries: Sequence[Expr]) -> None:
        """Raises SplitLoop where the index is `variable + constant` and a boundary lies inside its range."""
        sizes = self.context.sizes
        variables = index.free_symbols & sizes.keys()
        if len(variables) != 1:
            return
        variable = variables.pop()
        if index.coeff(variable, 1) != 1:
            return
        offset = expand(index - variable)
        if variable in offset.free_symbols:
            return
        for boundary in boundaries:
            point = expand(boundary - offset)
            size = sizes[variable]
            inside = is_nonnegative(point, {}) and is_nonnegative(size - point, {})
            if inside and point != 0 and not same(point, size):
                raise SplitLoop(variable, point)

    def _choose(self, index: Expr, pieces: Sequence[tuple[Expr, Callable[[Expr], int]]], starts: Sequence[Expr]) -> int:
        """Element by element: loads of the pieces not chosen are guarded, because their addresses are wild."""
        position, before = self.index_value(index), self._guard
        result = -1
        try:
            for (_, value), begin, end in zip(pieces, starts, starts[1:], strict=False):
                inside = self.call("ge", position, self.index_value(begin))
                inside = self.call("bit_and", inside, self.call("lt", position, self.index_value(end)))
                self._guard = inside if before < 0 else self.call("bit_and", before, inside)
                ref = value(expand(index - begin))
                result = ref if result < 0 else self.call("where", inside, ref, result)
        finally:
            self._guard = before
        return result


def refinements(loops: list[Loop], index: Indices, lower: Callable[[list[Loop], Indices, bool], Any]) -> list[Any]:
    """The results of `lower` over the ranges into which it asks to divide `loops`, in order.

    A refinement of a loop that is not among `loops` is passed on to its owner.
    """
    done: list[Any] = []
    waiting: list[tuple[list[Loop], Indices]] = [(loops, index)]
    while waiting:
        piece, at = waiting.pop()
        try:
            done.append(lower(piece, at, len(done) + len(waiting) < MAX_PIECES))
        except Refinement as wish:
            owned = [n for n, loop in enumerate(piece) if loop.variable == wish.variable]
            if not owned:
                raise
            waiting += reversed([_replace(piece, at, owned[0], *new) for new in _divided(piece[owned[0]], wish)])
    return done


def _divided(loop: Loop, wish: Refinement) -> list[tuple[list[Loop], Expr]]:
    """What stands in place of `loop`: each range's loops, and the old variable in terms of theirs."""
    if isinstance(wish, SplitLoop):
        return [([low], position) for low, position in loop.split(wish.point)]
    if not isinstance(wish, FactorLoop):
        raise TypeError(f"unknown refinement {wish}")
    outer, inner, position = loop.factor(wish.inner)
    return [([outer, inner], position)]


def _replace(
    loops: list[Loop], index: Indices, number: int, new: list[Loop], position: Expr
) -> tuple[list[Loop], Indices]:
    # A loop that runs once is no loop.
    once = {loop.variable: ZERO for loop in new if loop.size == ONE}
    position = position.xreplace(once)
    kept = [loop for loop in new if loop.size != ONE]
    swap = {loops[number].variable: position}
    return (
        [*loops[:number], *kept, *loops[number + 1 :]],
        tuple(expand(i.xreplace(swap)) for i in index),
    )
