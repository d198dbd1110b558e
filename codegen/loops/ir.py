"""The loop IR: what a fused kernel computes, independent of the language that it is printed in.

A `LoopKernel` is a list of independent nests. A nest walks over its rows (loop variables i0, i1, ...); the work on a
row is a list of sweeps (inner loop variables j0, j1, ...) that run one after the other. A sweep evaluates a flat list
of typed values for every inner position, adds some of them to the row's accumulators and stores others. A later sweep
of the same row reads a finished accumulator as a `Local`: so softmax is one nest of three sweeps.

No value read from a buffer was written by the same kernel, and rows are independent: they may run in any order, and
in parallel. Names are positional (buffers by number, symbols s0, s1, ...), so equal structure is equality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from llmopt.codegen.index import Index, is_name, rename, symbols_of
from llmopt.compiler.errors import ProgramFileError

DType: TypeAlias = Literal[
    "float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
DTYPES: frozenset[str] = frozenset(get_args(DType))

POSITION = "v"  # an index names value number 3 of its sweep v3

ReductionKind: TypeAlias = Literal["sum", "prod", "max", "min", "any", "all"]
REDUCTIONS: frozenset[str] = frozenset(get_args(ReductionKind))

# What a function takes and gives. "same": arguments and result have one type; "compare": arguments of one type, the
# result is bool; "select": (bool, x, x) -> x.
Signature: TypeAlias = Literal["same", "compare", "select"]

_UNARY = (
    "neg abs sign relu exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal cos sin tan tanh sigmoid silu gelu_erf "
    "gelu_tanh erf floor ceil round trunc bit_not"
)
_BINARY = "add sub mul div floor_div trunc_div remainder fmod maximum minimum pow bit_and bit_or bit_xor shl shr"

# Function name -> (number of arguments, signature). Closed: a printer knows every one.
FUNCTIONS: dict[str, tuple[int, Signature]] = {
    **dict.fromkeys(_UNARY.split(), (1, "same")),
    **dict.fromkeys(_BINARY.split(), (2, "same")),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), (2, "compare")),
    **dict.fromkeys(("isnan", "isinf"), (1, "compare")),
    "where": (3, "select"),
}


def register(dtype: DType) -> DType:
    """The type in which a value of this storage type is computed: float32 for the half types, else itself."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


@dataclass(frozen=True)
class Load:
    """`buffers[buffer][index]` in the register type; with a guard (a bool value's number), zero where it is false.

    Beside loop variables and symbols, the index may use earlier `Position`s of the sweep: v3 is value number 3.
    """

    buffer: int
    index: Index
    dtype: DType
    guard: int = -1


@dataclass(frozen=True)
class Constant:
    """A literal of a register type."""

    value: float | int | bool
    dtype: DType

    def __post_init__(self) -> None:
        if self.value != self.value:
            object.__setattr__(self, "value", math.nan)  # one object, so that equal constants are equal


@dataclass(frozen=True)
class IndexValue:
    """The int64 value of an index expression."""

    index: Index
    dtype: DType = "int64"


@dataclass(frozen=True)
class Position:
    """The int64 value number `arg` as a place among `size`; outside of them the kernel fails.

    With `wraps`, negative values count from the end.
    """

    arg: int
    size: Index
    wraps: bool
    dtype: DType = "int64"


@dataclass(frozen=True)
class Local:
    """A finished accumulator of the same row."""

    number: int
    dtype: DType


@dataclass(frozen=True)
class Call:
    """`function(args)`; arguments are numbers of earlier values of the sweep."""

    function: str
    args: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True)
class Cast:
    """Conversion of value `arg` to `dtype`. To a half type: rounds, and stays in a float32 register."""

    arg: int
    dtype: DType


Value: TypeAlias = Load | Constant | IndexValue | Position | Local | Call | Cast


@dataclass(frozen=True)
class Accumulate:
    """Combines value `value` into accumulator `local` of the row."""

    local: int
    value: int


@dataclass(frozen=True)
class Store:
    """`buffers[buffer][index] = value`, converted to the buffer's type."""

    buffer: int
    index: Index
    value: int


@dataclass(frozen=True)
class Sweep:
    """Inner loops j0, j1, ... of the given sizes (none: once a row) and what they do at each position."""

    sizes: tuple[Index, ...]
    values: tuple[Value, ...]
    accumulates: tuple[Accumulate, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Accumulator:
    """One running value of a row, started at the neutral element of `kind`."""

    kind: ReductionKind
    dtype: DType


@dataclass(frozen=True)
class Nest:
    """Rows i0, i1, ... of the given sizes (none: one row), their accumulators, and the sweeps over each row."""

    sizes: tuple[Index, ...]
    accumulators: tuple[Accumulator, ...]
    sweeps: tuple[Sweep, ...]


@dataclass(frozen=True)
class LoopKernel:
    """One fused kernel.

    Operands of the printed function: tensors are `buffers` in order (the first `num_inputs` are read, the others
    written; an output overlaps no other operand), ints are the values of `symbols` in order.
    """

    name: str
    symbols: tuple[str, ...]
    buffers: tuple[DType, ...]
    num_inputs: int
    nests: tuple[Nest, ...]

    def __post_init__(self) -> None:
        """Raises ProgramFileError where the parts do not fit together."""
        _check_kernel(self)


def value_dtype(value: Value) -> DType:
    """The register type of a value."""
    return register(value.dtype)


def arguments(value: Value) -> tuple[int, ...]:
    """Numbers of the values that `value` reads."""
    if isinstance(value, Call):
        return value.args
    if isinstance(value, Cast | Position):
        return (value.arg,)
    if isinstance(value, Load):
        return (*((value.guard,) if value.guard >= 0 else ()), *positions(value.index))
    return ()


def positions(index: Index) -> tuple[int, ...]:
    """Numbers of the values that an index uses."""
    return tuple(sorted(int(name[1:]) for name in symbols_of(index) if name[0] == POSITION))


def renumbered(value: Value, numbers: Mapping[int, int] | Sequence[int]) -> Value:
    """`value` where the values that it reads have other numbers."""
    if isinstance(value, Call):
        return replace(value, args=tuple(numbers[a] for a in value.args))
    if isinstance(value, Cast | Position):
        return replace(value, arg=numbers[value.arg])
    if isinstance(value, Load):
        names = {f"{POSITION}{n}": f"{POSITION}{numbers[n]}" for n in positions(value.index)}
        guard = numbers[value.guard] if value.guard >= 0 else -1
        return replace(value, index=rename(value.index, names), guard=guard)
    return value


# ---- checks ---------------------------------------------------------------------------------------------------------


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise ProgramFileError(f"malformed loop kernel: {why}")


def _check_index(index: Index, allowed: frozenset[str]) -> None:
    unknown = symbols_of(index) - allowed
    _require(not unknown, f"index uses undeclared names {sorted(unknown)}")


def _check_kernel(kernel: LoopKernel) -> None:
    _require(is_name(kernel.name), f"{kernel.name!r} is no name")
    _require(len(set(kernel.symbols)) == len(kernel.symbols), "a symbol is declared twice")
    for name in kernel.symbols:
        _require(is_name(name) and name[0] == "s", f"{name!r} is no symbol name")
    _require(all(dtype in DTYPES for dtype in kernel.buffers), "a buffer has an unknown dtype")
    _require(0 <= kernel.num_inputs <= len(kernel.buffers), "more inputs than buffers")
    for nest in kernel.nests:
        names = frozenset(kernel.symbols)
        for size in nest.sizes:
            _check_index(size, names)
        rows = names | {f"i{d}" for d in range(len(nest.sizes))}
        for accumulator in nest.accumulators:
            _require(accumulator.kind in REDUCTIONS, f"unknown reduction {accumulator.kind!r}")
            _require(accumulator.dtype in DTYPES, "an accumulator has an unknown dtype")
            _require(register(accumulator.dtype) == accumulator.dtype, "an accumulator has a storage type")
        _check_order(nest)
        for sweep in nest.sweeps:
            _check_sweep(kernel, nest, sweep, rows)


def _check_order(nest: Nest) -> None:
    """A sweep reads only accumulators that no later or equal sweep adds to."""
    last = {a.local: i for i, sweep in enumerate(nest.sweeps) for a in sweep.accumulates}
    for i, sweep in enumerate(nest.sweeps):
        for value in sweep.values:
            if isinstance(value, Local):
                _require(last.get(value.number, i) < i, "a sweep reads an unfinished accumulator")


def _check_sweep(kernel: LoopKernel, nest: Nest, sweep: Sweep, rows: frozenset[str]) -> None:
    for size in sweep.sizes:
        _check_index(size, rows)
    inner = rows | {f"j{d}" for d in range(len(sweep.sizes))}
    for number, value in enumerate(sweep.values):
        _require(value.dtype in DTYPES, f"unknown dtype {value.dtype!r}")
        _require(all(0 <= a < number for a in arguments(value)), "a value reads a later one")
        if isinstance(value, Load):
            places = {n for n in range(number) if isinstance(sweep.values[n], Position)}
            _check_index(value.index, inner | {f"{POSITION}{n}" for n in places})
        elif isinstance(value, IndexValue):
            _check_index(value.index, inner)
        if isinstance(value, Load):
            _require(0 <= value.buffer < kernel.num_inputs, "a load from no input buffer")
            _require(value.dtype == register(kernel.buffers[value.buffer]), "a load of another type than its buffer")
            _require(value.guard >= -1, "a negative guard")
            if value.guard >= 0:
                _require(value_dtype(sweep.values[value.guard]) == "bool", "a guard is not bool")
        elif isinstance(value, Local):
            _require(0 <= value.number < len(nest.accumulators), "an unknown accumulator")
            _require(value.dtype == nest.accumulators[value.number].dtype, "an accumulator read as another type")
        elif isinstance(value, IndexValue):
            _require(value.dtype == "int64", "an index that is not int64")
        elif isinstance(value, Position):
            _check_index(value.size, frozenset(kernel.symbols))
            _require({value.dtype, value_dtype(sweep.values[value.arg])} == {"int64"}, "a position that is not int64")
        elif isinstance(value, Constant):
            _check_constant(value)
        elif isinstance(value, Call):
            _check_call(value, [value_dtype(sweep.values[a]) for a in value.args])
    for accumulate in sweep.accumulates:
        _require(0 <= accumulate.local < len(nest.accumulators), "an unknown accumulator")
        _require(0 <= accumulate.value < len(sweep.values), "an unknown value")
        dtype = nest.accumulators[accumulate.local].dtype
        _require(value_dtype(sweep.values[accumulate.value]) == dtype, "an accumulator of another type than its value")
    for store in sweep.stores:
        _check_index(store.index, inner)
        _require(kernel.num_inputs <= store.buffer < len(kernel.buffers), "a store to no output buffer")
        _require(0 <= store.value < len(sweep.values), "an unknown value")
        dtype = register(kernel.buffers[store.buffer])
        _require(value_dtype(sweep.values[store.value]) == dtype, "a store of another type than its buffer")


def _check_constant(value: Constant) -> None:
    _require(register(value.dtype) == value.dtype, "a constant of a storage type")
    if value.dtype == "bool":
        _require(isinstance(value.value, bool), "a bool constant that is not bool")
    elif value.dtype.startswith("float"):
        _require(isinstance(value.value, float), "a float constant that is not float")
    else:
        _require(isinstance(value.value, int) and not isinstance(value.value, bool), "an int constant that is not int")
        bits = int(value.dtype.lstrip("uint"))
        low, high = (0, 1 << bits) if value.dtype[0] == "u" else (-(1 << bits - 1), 1 << bits - 1)
        _require(low <= value.value < high, "an int constant that does not fit its type")


def _check_call(value: Call, dtypes: Sequence[DType]) -> None:
    _require(value.function in FUNCTIONS, f"unknown function {value.function!r}")
    arity, signature = FUNCTIONS[value.function]
    _require(len(dtypes) == arity, f"{value.function} takes {arity} arguments")
    _require(register(value.dtype) == value.dtype, "a call of a storage type")
    if signature == "same":
        _require(set(dtypes) == {value.dtype}, f"{value.function} of other types than its result")
    elif signature == "compare":
        _require(len(set(dtypes)) == 1 and value.dtype == "bool", f"{value.function} compares unlike types")
    else:
        _require(dtypes[0] == "bool" and set(dtypes[1:]) == {value.dtype}, "a select of unlike types")
