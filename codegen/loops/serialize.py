"""`LoopKernel` to and from JSON.

Only lists, strings, integers and booleans are used. Floats are written as `float.hex()` writes them, which is exact and
knows inf and nan. Reading checks every field, and the whole kernel through its own consistency check.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, cast

from llmopt.codegen import index as indices
from llmopt.codegen.index import Index
from llmopt.codegen.loops.ir import (
    DTYPES,
    POSITION,
    Accumulate,
    Accumulator,
    Call,
    Cast,
    Constant,
    DType,
    IndexValue,
    Load,
    Local,
    LoopKernel,
    Nest,
    Position,
    ReductionKind,
    Store,
    Sweep,
    Value,
)
from llmopt.compiler.errors import ProgramFileError

Json: TypeAlias = Any

MAX_ITEMS = 4096  # of one list: values of a sweep, buffers, nests


def kernel_to_json(kernel: LoopKernel) -> Json:
    """The JSON form of a kernel; `kernel_from_json` gives an equal one back."""
    return {
        "name": kernel.name,
        "symbols": list(kernel.symbols),
        "buffers": list(kernel.buffers),
        "num_inputs": kernel.num_inputs,
        "nests": [_nest_to_json(nest) for nest in kernel.nests],
    }


def _nest_to_json(nest: Nest) -> Json:
    return {
        "sizes": [indices.to_json(size) for size in nest.sizes],
        "accumulators": [[a.kind, a.dtype] for a in nest.accumulators],
        "sweeps": [
            {
                "sizes": [indices.to_json(size) for size in sweep.sizes],
                "values": [_value_to_json(value) for value in sweep.values],
                "accumulates": [[a.local, a.value] for a in sweep.accumulates],
                "stores": [[s.buffer, indices.to_json(s.index), s.value] for s in sweep.stores],
            }
            for sweep in nest.sweeps
        ],
    }


def _value_to_json(value: Value) -> Json:
    if isinstance(value, Load):
        return ["load", value.dtype, value.buffer, indices.to_json(value.index), value.guard]
    if isinstance(value, Constant):
        number = float(value.value).hex() if value.dtype.startswith("float") else value.value
        return ["constant", value.dtype, number]
    if isinstance(value, IndexValue):
        return ["index", value.dtype, indices.to_json(value.index)]
    if isinstance(value, Position):
        return ["position", value.dtype, value.arg, indices.to_json(value.size), value.wraps]
    if isinstance(value, Local):
        return ["local", value.dtype, value.number]
    if isinstance(value, Call):
        return ["call", value.dtype, value.function, list(value.args)]
    return ["cast", value.dtype, value.arg]


def kernel_from_json(data: Json) -> LoopKernel:
    """Reads a kernel.

    Raises:
        ProgramFileError: anything that is not the JSON form of a consistent kernel. Indices are checked to use declared
            names only; that they stay inside their buffers cannot be checked here.
    """
    fields = _fields(data, "name", "symbols", "buffers", "num_inputs", "nests")
    symbols = tuple(_text(s) for s in _list(fields["symbols"]))
    return LoopKernel(
        _text(fields["name"]),
        symbols,
        tuple(_dtype(b) for b in _list(fields["buffers"])),
        _integer(fields["num_inputs"]),
        tuple(_nest_from_json(nest, symbols) for nest in _list(fields["nests"])),
    )


def _nest_from_json(data: Json, symbols: tuple[str, ...]) -> Nest:
    fields = _fields(data, "sizes", "accumulators", "sweeps")
    sizes = tuple(indices.from_json(size, symbols) for size in _list(fields["sizes"]))
    rows = (*symbols, *(f"i{d}" for d in range(len(sizes))))
    accumulators = [_tuple(a, 2) for a in _list(fields["accumulators"])]
    return Nest(
        sizes,
        tuple(Accumulator(cast(ReductionKind, _text(kind)), _dtype(dtype)) for kind, dtype in accumulators),
        tuple(_sweep_from_json(sweep, rows) for sweep in _list(fields["sweeps"])),
    )


def _sweep_from_json(data: Json, rows: tuple[str, ...]) -> Sweep:
    fields = _fields(data, "sizes", "values", "accumulates", "stores")
    sizes = tuple(indices.from_json(size, rows) for size in _list(fields["sizes"]))
    names = (*rows, *(f"j{d}" for d in range(len(sizes))))
    stores = [_tuple(s, 3) for s in _list(fields["stores"])]
    return Sweep(
        sizes,
        tuple(_value_from_json(value, number, names) for number, value in enumerate(_list(fields["values"]))),
        tuple(Accumulate(*map(_integer, _tuple(a, 2))) for a in _list(fields["accumulates"])),
        tuple(Store(_integer(b), indices.from_json(i, names), _integer(v)) for b, i, v in stores),
    )


def _value_from_json(data: Json, number: int, names: tuple[str, ...]) -> Value:
    items = _list(data)
    if len(items) < 3:
        raise ProgramFileError("malformed loop kernel: a value of too few fields")
    kind, dtype = _text(items[0]), _dtype(items[1])
    match kind:
        case "load":
            _, _, buffer, position, guard = _tuple(data, 5)
            earlier = tuple(f"{POSITION}{n}" for n in range(number))
            return Load(_integer(buffer), _index(position, (*names, *earlier)), dtype, _integer(guard))
        case "position":
            _, _, arg, size, wraps = _tuple(data, 5)
            if not isinstance(wraps, bool):
                raise ProgramFileError("malformed loop kernel: expected true or false")
            return Position(_integer(arg), _index(size, names), wraps, dtype)
        case "call":
            _, _, function, args = _tuple(data, 4)
            return Call(_text(function), tuple(_integer(a) for a in _list(args)), dtype)
    (_, _, payload) = _tuple(data, 3)
    match kind:
        case "constant":
            return Constant(_number(payload, dtype), dtype)
        case "index":
            return IndexValue(_index(payload, names), dtype)
        case "local":
            return Local(_integer(payload), dtype)
        case "cast":
            return Cast(_integer(payload), dtype)
    raise ProgramFileError(f"malformed loop kernel: unknown value {kind[:40]!r}")


def _index(data: Json, names: tuple[str, ...]) -> Index:
    return indices.from_json(data, names)


def _number(data: Json, dtype: DType) -> float | int | bool:
    if not dtype.startswith("float"):
        return data if isinstance(data, bool) else _integer(data)
    try:
        number = float.fromhex(_text(data))
    except (ValueError, OverflowError) as error:
        raise ProgramFileError(f"malformed loop kernel: {data[:40]!r} is no number") from error
    return math.nan if math.isnan(number) else number


def _fields(data: Json, *names: str) -> dict[str, Json]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise ProgramFileError(f"malformed loop kernel: expected the fields {', '.join(names)}")
    return data


def _list(data: Json) -> list[Json]:
    if not isinstance(data, list) or len(data) > MAX_ITEMS:
        raise ProgramFileError("malformed loop kernel: expected a list of bounded length")
    return data


def _tuple(data: Json, length: int) -> list[Json]:
    items = _list(data)
    if len(items) != length:
        raise ProgramFileError(f"malformed loop kernel: expected {length} fields, found {len(items)}")
    return items


def _text(data: Json) -> str:
    if not isinstance(data, str):
        raise ProgramFileError("malformed loop kernel: expected a string")
    return data


def _integer(data: Json) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or not -(1 << 63) <= data < 1 << 64:
        raise ProgramFileError("malformed loop kernel: expected an integer")
    return data


def _dtype(data: Json) -> DType:
    if not isinstance(data, str) or data not in DTYPES:
        raise ProgramFileError(f"malformed loop kernel: unknown dtype {str(data)[:40]!r}")
    return cast(DType, data)
