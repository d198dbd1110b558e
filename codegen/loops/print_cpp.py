"""Prints a `LoopKernel` as a C++ translation unit on `abi.h`, `simd.h` and `loops.h`.

Each nest is a function. Workers share its rows; a nest without accumulators that has fewer rows than would keep them
busy shares the innermost loop of every row instead. The innermost loop runs over whole vectors, then element by
element, with one body for both; where it computes on other types than float and bool it is a plain loop, which the
compiler vectorises as it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from llmopt.codegen.index import Index, affine, symbols_of, to_cpp
from llmopt.codegen.loops.ir import (
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
    Sweep,
    Value,
    arguments,
    positions,
    register,
    value_dtype,
)

STORAGE: dict[DType, str] = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bf16",
    "float16": "f16",
    "int64": "std::int64_t",
    "int32": "std::int32_t",
    "int16": "std::int16_t",
    "int8": "std::int8_t",
    "uint8": "std::uint8_t",
    "bool": "bool",
}
_REDUCTION = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "any": "Any", "all": "All"}
_LANES = {"float32", "bool"}  # register types that have vectors
_FEW_ROWS = 4  # rows a worker, below which the innermost loop is shared instead
_GRAIN = 64  # elements of an innermost loop that stay together: a cache line or more of any type


def print_kernel(kernel: LoopKernel, entry: str) -> str:
    """The source of `kernel` as an `extern "C"` function named `entry`.

    Units of several kernels may be joined into one: nothing outside `entry` is named twice.

    Operands: tensors are the buffers in order, inputs first; ints are the symbols in order; no floats.
    """
    lines = [f"// {kernel.name}", '#include "loops.h"', "", "namespace {", "", "using namespace llmopt;"]
    lines += ["using namespace llmopt::loops;", ""]
    for number, nest in enumerate(kernel.nests):
        lines += _NestPrinter(kernel, nest).lines(f"{entry}_nest{number}")
        lines.append("")
    lines += ["}  // namespace", "", f"LLMOPT_KERNEL({entry}) {{"]
    lines += [f"  {entry}_nest{number}(args, worker);" for number in range(len(kernel.nests))]
    return "\n".join([*lines, "}", ""])


def literal(value: Constant) -> str:
    """A C++ literal of exactly this value and type."""
    if value.dtype == "bool":
        return "true" if value.value else "false"
    if value.dtype in ("float32", "float64"):
        kind, suffix = ("float", "f") if value.dtype == "float32" else ("double", "")
        with np.errstate(over="ignore"):
            number = float(np.float32(value.value)) if kind == "float" else float(value.value)
        if math.isnan(number):
            return f"std::numeric_limits<{kind}>::quiet_NaN()"
        if math.isinf(number):
            return f"{'-' if number < 0 else ''}std::numeric_limits<{kind}>::infinity()"
        return f"{number.hex()}{suffix}"
    if value.value == -(1 << 63):
        return "std::numeric_limits<std::int64_t>::min()"
    return f"{STORAGE[value.dtype]}{{{value.value}}}"


class _NestPrinter:
    """The function of one nest."""

    def __init__(self, kernel: LoopKernel, nest: Nest) -> None:
        self.kernel, self.nest = kernel, nest

    def lines(self, name: str) -> list[str]:
        kernel, nest = self.kernel, self.nest
        used = {v.buffer for s in nest.sweeps for v in s.values if isinstance(v, Load)}
        used |= {store.buffer for s in nest.sweeps for store in s.stores}
        body = [f"const std::int64_t {s} = a.ints[{n}];" for n, s in enumerate(kernel.symbols)]
        body += [f"static_cast<void>({s});" for s in kernel.symbols]
        for buffer in sorted(used):
            const = "const " if buffer < kernel.num_inputs else ""
            kind = const + STORAGE[kernel.buffers[buffer]]
            body.append(f"{kind}* __restrict__ b{buffer} = a.tensor<{kind}>({buffer});")
        body += self._rows()
        return [f"void {name}(const Args& a, const Worker& w) {{", *indent(body), "}"]

    @property
    def _shares_inner(self) -> bool:
        return not self.nest.accumulators and all(sweep.sizes for sweep in self.nest.sweeps)

    def _rows(self) -> list[str]:
        sizes = self.nest.sizes
        inside: list[str] = []
        for n, accumulator in enumerate(self.nest.accumulators):
            inside.append(f"Accumulator<{_REDUCTION[accumulator.kind]}, {STORAGE[accumulator.dtype]}> acc{n};")
        for sweep in self.nest.sweeps:
            inside += [
                "{",
                *indent(SweepPrinter(self.kernel, sweep, self._shares_inner, self.nest.accumulators).lines()),
                "}",
            ]
        lines = [f"const std::int64_t m{d} = {to_cpp(size)};" for d, size in enumerate(sizes)]
        lines.append(f"const std::int64_t rows = {' * '.join(f'm{d}' for d in range(len(sizes))) or '1'};")
        if self._shares_inner:
            lines.append(f"const bool few = rows < {_FEW_ROWS} * w.count;")
            lines.append("const Range mine = few ? Range{0, rows} : share(w, rows);")
        else:
            lines.append("const Range mine = share(w, rows);")
        lines.append("if (mine.begin >= mine.end) return;")
        if sizes:
            lines.append("std::int64_t rest = mine.begin;")
        for d in reversed(range(len(sizes))):
            lines += [f"std::int64_t i{d} = rest % m{d};", f"rest /= m{d};"]
        lines.append("for (std::int64_t row = mine.begin; row < mine.end; ++row) {")
        lines += indent(inside)
        # The row's indices count like an odometer.
        lines += indent(_odometer(len(sizes)))
        return [*lines, "}"]


def _odometer(rank: int) -> list[str]:
    lines: list[str] = []
    for d in range(rank):
        step = [f"if (++i{d} == m{d}) {{", f"  i{d} = 0;", "}"]
        lines = [step[0], step[1], *indent(lines), step[2]]
    return lines


class SweepPrinter:
    """The loops of one sweep over a row."""

    def __init__(
        self, kernel: LoopKernel, sweep: Sweep, shared: bool, accumulators: Sequence[Accumulator] = ()
    ) -> None:
        self.kernel, self.sweep, self.shared, self.accumulators = kernel, sweep, shared, accumulators
        self.inner = f"j{len(sweep.sizes) - 1}" if sweep.sizes else None
        self.varies = self._varying()
        self.vector = self.inner is not None and self._fits_lanes()

    def lines(self) -> list[str]:
        """Statements for one row; the row's indices are i0, i1, ..."""
        if self.inner is None:
            return self._statements(range(len(self.sweep.values)), "", final=True)
        sizes = self.sweep.sizes
        body = [
            f"const std::int64_t n = {to_cpp(sizes[-1])};",
            f"const Range part = few ? share(w, n, {_GRAIN}) : Range{{0, n}};"
            if self.shared
            else "const Range part{0, n};",
            *self.row(),
        ]
        for d in reversed(range(len(sizes) - 1)):
            head = f"for (std::int64_t j{d} = 0, e{d} = {to_cpp(sizes[d])}; j{d} < e{d}; ++j{d}) {{"
            body = [head, *indent(body), "}"]
        return body

    def row(self) -> list[str]:
        """The innermost loop over the range `part`."""
        invariant = [n for n, varies in enumerate(self.varies) if not varies]
        return [
            "if (part.begin < part.end) {",
            *indent(self._statements(invariant, "", final=False)),
            *indent(self._pointers()),
            *indent(self._block_copy() or (self._vector_loop() if self.vector else self._scalar_loop())),
            "}",
        ]

    # ---- analysis ----

    def _varying(self) -> list[bool]:
        """For each value whether it changes along the innermost loop."""
        varies: list[bool] = []
        for value in self.sweep.values:
            direct = isinstance(value, Load | IndexValue) and self.inner in symbols_of(value.index)
            varies.append(direct or any(varies[a] for a in arguments(value)))
        return varies

    def _fits_lanes(self) -> bool:
        """Whether all that varies is float or bool and walks through memory in even steps."""
        buffers = self.kernel.buffers
        for value, varies in zip(self.sweep.values, self.varies, strict=True):
            if not varies:
                continue
            if isinstance(value, IndexValue) or value_dtype(value) not in _LANES:
                return False
            if any(value_dtype(self.sweep.values[a]) not in _LANES for a in arguments(value)):
                return False
            if isinstance(value, Load) and (value.guard >= 0 or self._step(value.index) is None):
                return False
        for store in self.sweep.stores:
            if register(buffers[store.buffer]) not in _LANES or self._step(store.index) in (None, 0):
                return False
        kinds = [value_dtype(self.sweep.values[a.value]) for a in self.sweep.accumulates]
        return all(kind in _LANES for kind in kinds)

    def _step(self, index: Index) -> Index | None:
        if any(self.varies[n] for n in positions(index)):
            return None
        split = affine(index, self.inner or "")
        return None if split is None else split[0]

    # ---- text ----

    def _pointers(self) -> list[str]:
        """Addresses of the row's beginnings, so that the loop itself only adds its index."""
        lines = []
        places = [
            (f"p{n}", v.buffer, v.index)
            for n, v in enumerate(self.sweep.values)
            if isinstance(v, Load) and self._walks(n, v)
        ]
        places += [(f"q{n}", s.buffer, s.index) for n, s in enumerate(self.sweep.stores) if self._step(s.index)]
        for name, buffer, index in places:
            split = affine(index, self.inner or "")
            if split is None:
                continue
            lines.append(f"auto* {name} = b{buffer} + {to_cpp(split[1])};")
            if split[0] != 1:
                lines.append(f"const std::int64_t {name}s = {to_cpp(split[0])};")
        return lines

    def _walks(self, number: int, value: Value) -> bool:
        return (
            isinstance(value, Load)
            and self.varies[number]
            and value.guard < 0  # a guarded address may lie anywhere
            and self._step(value.index) is not None
        )

    def _block_copy(self) -> list[str]:
        """For a sweep that only moves unbroken runs of elements: no conversion to registers and back."""
        lines = []
        for number, store in enumerate(self.sweep.stores):
            value, kinds = self.sweep.values[store.value], self.kernel.buffers
            if not isinstance(value, Load) or not self._walks(store.value, value):
                return []
            if kinds[value.buffer] != kinds[store.buffer] or {self._step(value.index), self._step(store.index)} != {1}:
                return []
            run = f"sizeof(*q{number}) * static_cast<std::size_t>(part.end - part.begin)"
            lines.append(f"std::memcpy(q{number} + part.begin, p{store.value} + part.begin, {run});")
        return [] if self.sweep.accumulates else lines

    def _vector_loop(self) -> list[str]:
        j = self.inner
        varying = [n for n, varies in enumerate(self.varies) if varies]
        loop = [
            f"const auto body = [&](auto zero, std::int64_t {j}, int bank) __attribute__((always_inline)) {{",
            "  using V = decltype(zero);",
            "  static_cast<void>(bank);",
            *indent(self._statements(varying, "V", final=True)),
            "};",
            f"std::int64_t {j} = part.begin;",
        ]
        sums = [f"acc{n}" for n in dict.fromkeys(a.local for a in self.sweep.accumulates) if self._sums_floats(n)]
        end = "stop" if sums else "part.end"
        lanes = []
        if self.sweep.accumulates:
            lanes += [
                f"for (; {j} + 2 * kLanes <= {end}; {j} += 2 * kLanes) {{",
                f"  body(vf{{}}, {j}, 0);",
                f"  body(vf{{}}, {j} + kLanes, 1);",
                "}",
            ]
        lanes.append(f"for (; {j} + kLanes <= {end}; {j} += kLanes) body(vf{{}}, {j}, 0);")
        if sums:
            lanes = [
                f"while ({j} + kLanes <= part.end) {{",
                f"  const std::int64_t from = {j}, stop = index_min(part.end, from + kRun);",
                *indent(lanes),
                *(f"  {name}.settle({j} - from);" for name in sums),
                "}",
            ]
        return [*loop, *lanes, f"for (; {j} < part.end; ++{j}) body(0.0f, {j}, 0);"]

    def _sums_floats(self, local: int) -> bool:
        accumulator = self.accumulators[local]
        return accumulator.kind == "sum" and accumulator.dtype == "float32"

    def _scalar_loop(self) -> list[str]:
        j = self.inner
        varying = [n for n, varies in enumerate(self.varies) if varies]
        loop = [f"for (std::int64_t {j} = part.begin; {j} < part.end; ++{j}) {{"]
        if not self.sweep.accumulates:
            loop.insert(0, "#pragma GCC ivdep")
        return [*loop, *indent(self._statements(varying, "", final=True)), "}"]

    def _statements(self, numbers: Iterable[int], lanes: str, final: bool) -> list[str]:
        """Definitions of the given values; with `final`, also what is done with them. `lanes` is the vector type."""
        lines: list[str] = []
        for n in numbers:
            item = self.sweep.values[n]
            if isinstance(item, Position):
                lines += _position(n, item)
            else:
                lines.append(f"const auto v{n} = {self._value(n, lanes)};")
        if not final:
            return lines
        for accumulate in self.sweep.accumulates:
            bank = "bank" if lanes else "0"
            lines.append(f"acc{accumulate.local}.add({self._ref(accumulate.value, lanes)}, {bank});")
        for number, store in enumerate(self.sweep.stores):
            value = self._ref(store.value, lanes)
            split = affine(store.index, self.inner) if self.inner else None
            if split is None or split[0] == 0:
                lines.append(f"write(b{store.buffer} + {to_cpp(store.index)}, {value});")
            elif not lanes:
                lines.append(f"write(q{number} + {self._offset(f'q{number}', split[0])}, {value});")
            elif split[0] == 1:
                lines.append(f"put<V>(q{number} + {self.inner}, {value});")
            else:
                lines.append(f"put<V>(q{number} + {self.inner} * q{number}s, q{number}s, {value});")
        return lines

    def _offset(self, name: str, step: Index) -> str:
        return f"{self.inner}" if step == 1 else f"{self.inner} * {name}s"

    def _ref(self, number: int, lanes: str) -> str:
        """A value as an operand; in the vector body, one from outside the loop is broadcast."""
        if not lanes or self.varies[number]:
            return f"v{number}"
        wrap = "up_mask" if value_dtype(self.sweep.values[number]) == "bool" else "up"
        return f"{wrap}<{lanes}>(v{number})"

    def _value(self, number: int, lanes: str) -> str:
        value = self.sweep.values[number]
        if isinstance(value, Constant):
            return literal(value)
        if isinstance(value, IndexValue):
            return f"std::int64_t{{{to_cpp(value.index)}}}"
        if isinstance(value, Local):
            return f"acc{value.number}.value()"
        if isinstance(value, Call):
            return f"f_{value.function}({', '.join(self._ref(a, lanes) for a in value.args)})"
        if isinstance(value, Cast):
            return self._cast(value, lanes)
        if isinstance(value, Load):
            return self._load(number, value, lanes)
        raise TypeError(f"{value} is a statement")  # see `_statements`

    def _cast(self, value: Cast, lanes: str) -> str:
        source = self._ref(value.arg, lanes)
        kind = value_dtype(self.sweep.values[value.arg])
        if register(value.dtype) != value.dtype:
            inner = source if kind == "float32" else self._between(kind, "float32", source, lanes)
            return f"round_to<{STORAGE[value.dtype]}>({inner})"
        return self._between(kind, value.dtype, source, lanes)

    @staticmethod
    def _between(kind: DType, target: DType, source: str, lanes: str) -> str:
        if kind == target:
            return source
        if lanes and target == "bool":
            return f"float_to_mask<{lanes}>({source})"
        if lanes:
            return f"mask_to_float<{lanes}>({source})"
        return f"convert<{STORAGE[target]}>({source})"

    def _load(self, number: int, value: Load, lanes: str) -> str:
        if self._walks(number, value):
            step = self._step(value.index)
            if not lanes:
                return f"read(p{number} + {self._offset(f'p{number}', step or 0)})"
            if step == 1:
                return f"get<V>(p{number} + {self.inner})"
            return f"get<V>(p{number} + {self.inner} * p{number}s, p{number}s)"
        text = f"read(b{value.buffer} + {to_cpp(value.index)})"
        if value.guard < 0:
            return text
        return f"v{value.guard} ? {text} : {STORAGE[value.dtype]}{{}}"


def _position(number: int, value: Position) -> list[str]:
    """A place that is read from memory: nothing is addressed by it before it has been checked."""
    name, size = f"v{number}", to_cpp(value.size)
    wrap = f" + (v{value.arg} < 0 ? {size} : 0)" if value.wraps else ""
    return [
        f"const std::int64_t {name} = v{value.arg}{wrap};",
        f"if ({name} < 0 || {name} >= {size}) return w.fail(kIndexOutOfRange);",
    ]


def indent(lines: Iterable[str]) -> list[str]:
    """The lines, two columns further right."""
    return [line if line.startswith("#") else f"  {line}" for line in lines]
