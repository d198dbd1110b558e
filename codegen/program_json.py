"""Programs as typed JSON, and back, with every field checked. Nothing from a file is evaluated or copied into code."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy
import torch

from llmopt.codegen import index
from llmopt.codegen.cpu.templates import ARGUMENT_TOKENS, EPILOGUES, FLOATS, HEADERS, REGISTERED_SOURCES
from llmopt.codegen.loops import serialize
from llmopt.codegen.loops.emit import DTYPE_NAMES
from llmopt.codegen.loops.epilogue import check_epilogue, covers
from llmopt.codegen.program import KernelCall, KernelSpec, Operand, Program, Size, SymbolSource, Value, View
from llmopt.compiler.errors import ProgramFileError, UnsupportedError

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool),
    )
}
# What a product's argument says of its results.
_STORED = {token: DTYPE_NAMES[dtype] for dtype, token in FLOATS.items()}
_KINDS = frozenset({"input", "weight", "arena", "output"})
_LIMIT = 1 << 20  # entries of any list in a program


def dtype_name(dtype: torch.dtype) -> str:
    """The JSON form of a dtype."""
    return str(dtype).removeprefix("torch.")


def read_dtype(data: Any) -> torch.dtype:
    """A dtype from its JSON form."""
    if not isinstance(data, str) or data not in _DTYPES:
        raise ProgramFileError(f"unknown dtype {str(data)[:40]!r}")
    return _DTYPES[data]


def to_json(program: Program) -> dict[str, Any]:
    """A program as plain data. Raises UnsupportedError when an op runs on ATen, which is no data."""
    if program.fallbacks:
        first = program.fallbacks[0]
        raise UnsupportedError(f"cannot be saved, it runs on ATen: {first.reason}", operation=first.op)
    many = lambda items: [index.to_json(i) for i in items]  # noqa: E731
    return {
        "symbols": [[s.name, s.index, s.dim] for s in program.symbols],
        "values": [
            [v.kind, v.name, dtype_name(v.dtype), many(v.sizes), many(v.strides), index.to_json(v.offset)]
            for v in program.values
        ],
        "inputs": list(program.inputs),
        "weights": list(program.weights),
        "kernels": [
            [k.template, list(k.arguments), serialize.kernel_to_json(k.loop) if k.loop is not None else None]
            for k in program.kernels
        ],
        "steps": [_call_json(step) for step in program.steps if isinstance(step, KernelCall)],
        "results": [_result_json(r) for r in program.results],
        "mutations": [[argument, _result_json(view)] for argument, view in program.mutations],
        "arena_bytes": index.to_json(program.arena_bytes),
        "batch_invariant": program.batch_invariant,
        "target": program.target,
    }


def _call_json(call: KernelCall) -> list[Any]:
    tensors = [None if t is None else [t.value, index.to_json(t.offset)] for t in call.tensors]
    ints = [index.to_json(i) for i in call.ints]
    return [call.kernel, tensors, ints, list(call.floats), call.sync_after, call.origin]


def _result_json(result: Any) -> Any:
    if isinstance(result, View):
        parts = [[index.to_json(i) for i in part] for part in (result.sizes, result.strides)]
        return ["view", result.value, index.to_json(result.offset), *parts]
    if isinstance(result, Size):
        return ["size", index.to_json(result.index)]
    return ["constant", result]


class _Reader:
    """Checks shapes and types of the JSON form while it is read."""

    def __init__(self, data: Any) -> None:
        if not isinstance(data, dict):
            raise ProgramFileError("the program is no JSON object")
        self.data = data
        self.names: Collection[str] = ()

    def rows(self, key: str, width: int) -> list[list[Any]]:
        rows = self.items(key)
        for row in rows:
            if not isinstance(row, list) or len(row) != width:
                raise ProgramFileError(f"malformed entry in {key}")
        return rows

    def items(self, key: str) -> list[Any]:
        items = self.data.get(key)
        if not isinstance(items, list) or len(items) > _LIMIT:
            raise ProgramFileError(f"{key} is missing or no list")
        return items

    def flag(self, key: str) -> bool:
        flag = self.data.get(key)
        if not isinstance(flag, bool):
            raise ProgramFileError(f"{key} is {str(flag)[:40]}")
        return flag

    def number(self, data: Any, below: int, what: str, least: int = 0) -> int:
        if not isinstance(data, int) or isinstance(data, bool) or not least <= data < below:
            raise ProgramFileError(f"{what} is {str(data)[:40]}, outside {least}..{below - 1}")
        return data

    def expression(self, data: Any) -> index.Index:
        return index.from_json(data, self.names)

    def indices(self, data: Any) -> tuple[index.Index, ...]:
        if not isinstance(data, list) or len(data) > 256:
            raise ProgramFileError("a list of index expressions is missing or too long")
        return tuple(self.expression(item) for item in data)


def from_json(data: Any) -> Program:
    """Reads what `to_json` wrote. Raises ProgramFileError for anything else."""
    reader = _Reader(data)
    inputs = reader.items("inputs")
    count = len(reader.items("values"))
    symbols = []
    for name, source, dim in reader.rows("symbols", 3):
        if not isinstance(name, str) or not index.is_name(name):
            raise ProgramFileError("a symbol has no valid name")
        symbols.append(
            SymbolSource(name, reader.number(source, len(inputs), "symbol input"), reader.number(dim, 8, "dim", -1))
        )
    reader.names = frozenset(s.name for s in symbols)
    values = []
    for kind, name, dtype, sizes, strides, offset in reader.rows("values", 6):
        if kind not in _KINDS or not isinstance(name, str):
            raise ProgramFileError(f"unknown kind of value {str(kind)[:40]!r}")
        shape = (reader.indices(sizes), reader.indices(strides))
        values.append(Value(kind, name, read_dtype(dtype), *shape, reader.expression(offset)))
    kernels = [_kernel(row) for row in reader.rows("kernels", 3)]
    steps: list[Any] = []
    for kernel, tensors, ints, floats, sync, origin in reader.rows("steps", 6):
        if not isinstance(tensors, list) or not isinstance(floats, list) or not isinstance(origin, str):
            raise ProgramFileError("malformed kernel call")
        if not all(isinstance(f, float | int) and not isinstance(f, bool) for f in floats) or not isinstance(
            sync, bool
        ):
            raise ProgramFileError("malformed kernel call")
        operands = tuple(None if t is None else _operand(reader, t, count) for t in tensors)
        number = reader.number(kernel, len(kernels), "kernel")
        numbers = reader.indices(ints)
        _check_rows(kernels[number], numbers, reader.names)
        steps.append(KernelCall(number, operands, numbers, tuple(map(float, floats)), sync, origin))
    return Program(
        symbols,
        values,
        [None if i is None else reader.number(i, count, "input") for i in inputs],
        [reader.number(w, count, "weight") for w in reader.items("weights")],
        kernels,
        steps,
        [_result(reader, r, count) for r in reader.items("results")],
        [_mutation(reader, row, len(inputs), count) for row in reader.rows("mutations", 2)],
        reader.expression(data.get("arena_bytes")),
        reader.flag("batch_invariant"),
        _target(data.get("target", "cpu")),
    )


def _target(name: Any) -> str:
    if name not in ("cpu", "cuda"):
        raise ProgramFileError(f"unknown target {str(name)[:40]!r}")
    return str(name)


def _kernel(row: list[Any]) -> KernelSpec:
    template, arguments, loop = row
    if template == "loop":
        return KernelSpec("loop", (), serialize.kernel_from_json(loop))
    if not isinstance(template, str) or (template not in HEADERS and template not in REGISTERED_SOURCES):
        raise ProgramFileError(f"unknown kernel template {str(template)[:40]!r}")
    if not isinstance(arguments, list) or not all(isinstance(a, str) and a in ARGUMENT_TOKENS for a in arguments):
        raise ProgramFileError(f"unknown arguments of kernel template {template}")
    if loop is None:
        return KernelSpec(template, tuple(arguments))
    if template not in EPILOGUES or len(arguments) != 1:
        raise ProgramFileError(f"kernel template {template} has no epilogue")
    epilogue = serialize.kernel_from_json(loop)
    check_epilogue(epilogue, _STORED.get(arguments[0]))
    return KernelSpec(template, tuple(arguments), epilogue)


def _check_rows(kernel: KernelSpec, ints: tuple[index.Index, ...], names: Collection[str]) -> None:
    """A product whose epilogue walks over fewer rows would write past the ends of the results."""
    if kernel.loop is None or kernel.product is None:
        return
    symbols = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in names}
    values = [index.to_sympy(number, symbols) for number in ints]
    count = len(kernel.loop.symbols)
    if len(values) <= count or not covers(kernel.loop, values[:count], values[count]):
        raise ProgramFileError("an epilogue does not walk over the rows of its product")


def _operand(reader: _Reader, data: Any, count: int) -> Operand:
    if not isinstance(data, list) or len(data) != 2:
        raise ProgramFileError("malformed operand")
    return Operand(reader.number(data[0], count, "operand"), reader.expression(data[1]))


def _mutation(reader: _Reader, row: list[Any], inputs: int, values: int) -> tuple[int, View]:
    argument, view = row
    value = _result(reader, view, values)
    if not isinstance(value, View):
        raise ProgramFileError("a mutation's new value is no tensor")
    return reader.number(argument, inputs, "mutated argument"), value


def _result(reader: _Reader, data: Any, count: int) -> Any:
    if isinstance(data, list) and len(data) == 5 and data[0] == "view":
        value = reader.number(data[1], count, "result")
        return View(value, reader.expression(data[2]), reader.indices(data[3]), reader.indices(data[4]))
    if isinstance(data, list) and len(data) == 2 and data[0] == "size":
        return Size(reader.expression(data[1]))
    if isinstance(data, list) and len(data) == 2 and data[0] == "constant" and isinstance(data[1], int | float | None):
        return data[1]
    raise ProgramFileError("malformed result")
