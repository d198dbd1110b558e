"""Prints a `LoopKernel` as a module of Triton kernels, one for each nest, on `codegen/triton/kernels/functions.py`.

A program holds XBLOCK rows as a column `[XBLOCK, 1]` and walks along each sweep in steps of RBLOCK, so that what
changes along the sweep is a tile `[XBLOCK, RBLOCK]`. A nest without accumulators has nothing to walk along: its inner
loops become rows too (`flattened`), which spreads them over the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmopt.codegen.index import Index, is_nonnegative, multiply, rename, symbols_of
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
    register,
    value_dtype,
)

TYPES: dict[DType, str] = {
    "float32": "tl.float32",
    "float64": "tl.float64",
    "bfloat16": "tl.bfloat16",
    "float16": "tl.float16",
    "int64": "tl.int64",
    "int32": "tl.int32",
    "int16": "tl.int16",
    "int8": "tl.int8",
    "uint8": "tl.uint8",
    "bool": "tl.int1",
}
_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "bit_and": "&", "bit_or": "|", "bit_xor": "^",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
# Functions of triton.language, and those of kernels/functions.py (the others of the IR, by their own names).
_LANGUAGE = frozenset(["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "cos", "sin", "erf", "floor", "ceil", "abs"])
_BY_KIND = {
    "div": ("f.int_trunc_div", "/"),
    "floor_div": ("f.int_floor_div", "f.float_floor_div"),
    "trunc_div": ("f.int_trunc_div", ""),
    "remainder": ("f.int_floor_mod", "f.float_remainder"),
    "fmod": ("f.int_trunc_mod", "f.float_fmod"),
    "pow": ("f.int_pow", "f.float_pow"),
}
_EXTREME: dict[str, tuple[str, str]] = {
    "float32": ('-float("inf")', 'float("inf")'),
    "float64": ('-float("inf")', 'float("inf")'),
    **{f"int{n}": (str(-(1 << n - 1)), str((1 << n - 1) - 1)) for n in (64, 32, 16, 8)},
    "uint8": ("0", "255"),
    "bool": ("False", "True"),
}


@dataclass(frozen=True)
class Walk:
    """The sizes that a launch chooses its grid and blocks by: rows, and for the longest sweep its length if known."""

    rows: Index
    inner: Index


def flattened(kernel: LoopKernel) -> list[Nest]:
    """The kernel's nests, where those without accumulators have one nest for each sweep and no inner loops."""
    nests = []
    for nest in kernel.nests:
        ragged = any(symbols_of(size) - set(kernel.symbols) for sweep in nest.sweeps for size in sweep.sizes)
        if nest.accumulators or ragged:
            nests.append(nest)
            continue
        for sweep in nest.sweeps:
            names = {f"j{n}": f"i{len(nest.sizes) + n}" for n in range(len(sweep.sizes))}
            flat = Sweep(
                (),
                tuple(_renamed(value, names) for value in sweep.values),
                (),
                tuple(replace(store, index=rename(store.index, names)) for store in sweep.stores),
            )
            nests.append(Nest((*nest.sizes, *sweep.sizes), (), (flat,)))
    return nests


def _renamed(value: Value, names: dict[str, str]) -> Value:
    return replace(value, index=rename(value.index, names)) if isinstance(value, Load | IndexValue) else value


def walks(kernel: LoopKernel) -> list[Walk]:
    """How each printed nest is walked; `inner` is 1 where there is no inner loop and 0 where its length varies."""
    found = []
    for nest in flattened(kernel):
        longest: Index = 1
        for sweep in nest.sweeps:
            if any(symbols_of(size) - set(kernel.symbols) for size in sweep.sizes):
                longest = 0
            elif sweep.sizes:
                longest = _product(sweep.sizes)
        found.append(Walk(_product(nest.sizes), longest))
    return found


def _product(sizes: Sequence[Index]) -> Index:
    total: Index = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def print_triton(kernel: LoopKernel) -> str:
    """The source of a module with functions `nest0`, `nest1`, ...

    Their arguments: the buffers in order, `status` (an int32 that is set to 1 when a position is out of range), the
    symbols in order, the number of rows, then INDEX (the type to index in), XBLOCK and RBLOCK.
    """
    lines = [f'"""{kernel.name}"""', "", "import triton", "import triton.language as tl", ""]
    lines.append("from llmopt.codegen.triton.kernels import functions as f")
    for number, nest in enumerate(flattened(kernel)):
        lines += ["", "", *_NestPrinter(kernel, nest).lines(f"nest{number}")]
    return "\n".join([*lines, ""])


def to_triton(index: Index) -> str:
    """An index expression over tensors of the index type."""
    if isinstance(index, int):
        return str(index) if index >= 0 else f"({index})"
    if isinstance(index, str):
        return index
    left, right = to_triton(index.left), to_triton(index.right)
    if index.operator in ("+", "*"):
        return f"({left} {index.operator} {right})"
    if index.operator in ("min", "max"):
        return f"tl.{index.operator}imum({left}, {right})"
    if is_nonnegative(index.left) and is_nonnegative(index.right):
        return f"({left} {index.operator} {right})"
    return f"f.int_floor_{'div' if index.operator == '//' else 'mod'}(zx + {left}, {right} + zx)"


class _NestPrinter:
    """The function of one nest."""

    def __init__(self, kernel: LoopKernel, nest: Nest) -> None:
        self.kernel, self.nest = kernel, nest

    def lines(self, name: str) -> list[str]:
        kernel, nest = self.kernel, self.nest
        # Numbers of rows that are multiples of 16 get code of their own, in which the mask lets accesses be wide.
        listed = ", ".join(f'"{s}"' for s in kernel.symbols)
        buffers = "".join(f"b{n}, " for n in range(len(kernel.buffers)))
        symbols = "".join(f"{s}, " for s in kernel.symbols)
        head = [
            f"@triton.jit(do_not_specialize=[{listed}])",
            f"def {name}({buffers}status, {symbols}rows, INDEX: tl.constexpr, XBLOCK: tl.constexpr, "
            "RBLOCK: tl.constexpr):",
        ]
        body = [f"{s} = {s}.to(INDEX)" for s in kernel.symbols]
        body.append("x = (tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK).to(INDEX))[:, None]")
        body += ["xm = x < rows", "zx = x * 0", "zr = zx + tl.zeros([XBLOCK, RBLOCK], INDEX)"]
        body += ["rest = x"] if nest.sizes else []
        for d in reversed(range(len(nest.sizes))):
            if d == 0:
                body.append("i0 = rest")
            else:
                body += [f"m{d} = zx + {to_triton(nest.sizes[d])}", f"i{d} = rest % m{d}", f"rest = rest // m{d}"]
        for n, accumulator in enumerate(nest.accumulators):
            kind = TYPES[accumulator.dtype]
            body.append(f"acc{n} = tl.full([XBLOCK, RBLOCK], {_neutral(accumulator)}, {kind})")
        last = {a.local: i for i, sweep in enumerate(nest.sweeps) for a in sweep.accumulates}
        for i, sweep in enumerate(nest.sweeps):
            body += SweepPrinter(kernel, nest, sweep).lines()
            body += [f"a{n} = {_reduced(nest.accumulators[n], n)}" for n in sorted(last) if last[n] == i]
        return [*head, *indent(body)]


def _neutral(accumulator: Accumulator) -> str:
    low, high = _EXTREME[accumulator.dtype]
    zero, one = ("False", "True") if accumulator.dtype == "bool" else ("0", "1")
    return {"sum": zero, "prod": one, "max": low, "min": high, "any": zero, "all": one}[accumulator.kind]


def _reduced(accumulator: Accumulator, number: int) -> str:
    kind: str = accumulator.kind
    if kind in ("max", "min"):
        kind += "_float" if accumulator.dtype.startswith("float") else "_int"
    if accumulator.dtype == "bool" and accumulator.kind in ("max", "min"):
        kind = {"max": "any", "min": "all"}[accumulator.kind]
    return f"f.row_{kind}(acc{number})"


class SweepPrinter:
    """The statements of one sweep for all rows of a program."""

    def __init__(self, kernel: LoopKernel, nest: Nest, sweep: Sweep) -> None:
        self.kernel, self.nest, self.sweep = kernel, nest, sweep
        # A sweep without inner loops that adds to accumulators adds its one position.
        self.walks = bool(sweep.sizes) or bool(sweep.accumulates)
        self.varies = self._varying()
        self.moved = self._moved()

    def _moved(self) -> set[int]:
        """Loads that are only stored in the type that they have: moved bit for bit, NaN payloads too."""
        values, kinds = self.sweep.values, self.kernel.buffers
        used = {a for value in values for a in arguments(value)} | {a.value for a in self.sweep.accumulates}
        found = set()
        for number, value in enumerate(values):
            if isinstance(value, Load) and number not in used and value.dtype != "bool":
                targets = {kinds[store.buffer] for store in self.sweep.stores if store.value == number}
                if targets == {kinds[value.buffer]}:
                    found.add(number)
        return found

    def _varying(self) -> list[bool]:
        """For each value whether it changes along the sweep: then it is a tile, else a column."""
        inner = {f"j{n}" for n in range(len(self.sweep.sizes))}
        varies: list[bool] = []
        for value in self.sweep.values:
            direct = isinstance(value, Load | IndexValue) and bool(symbols_of(value.index) & inner)
            varies.append(direct or any(varies[a] for a in arguments(value)))
        return varies

    def lines(self) -> list[str]:
        """Statements; the rows' indices are i0, i1, ..., finished accumulators a0, a1, ..."""
        sizes = self.sweep.sizes
        if not self.walks:
            return self.statements()
        lines = [f"n{d} = zx + {to_triton(size)}" for d, size in enumerate(sizes)]
        lines.append("length = zx + 1" + "".join(f" * n{d}" for d in range(len(sizes))) if sizes else "length = zx + 1")
        body = ["r = zr + start + tl.arange(0, RBLOCK).to(INDEX)[None, :]", "rm = xm & (r < length)"]
        rest = "r"
        for d in reversed(range(len(sizes))):
            if d == 0:
                body.append(f"j0 = {rest}")
            else:
                # A row of an empty loop is masked, but must not divide by zero.
                body += [f"d{d} = tl.maximum(n{d}, 1)", f"j{d} = {rest} % d{d}", f"q{d} = {rest} // d{d}"]
                rest = f"q{d}"
        body += self.statements()
        return [*lines, "for start in range(0, tl.max(length), RBLOCK):", *indent(body)]

    def statements(self) -> list[str]:
        """What is done at each position."""
        lines: list[str] = []
        for number, value in enumerate(self.sweep.values):
            lines += self.value(number, value)
        for accumulate in self.sweep.accumulates:
            lines.append(self._accumulate(accumulate.local, accumulate.value))
        mask, shape = ("rm", "zr") if self.walks else ("xm", "zx")
        for store in self.sweep.stores:
            kind = TYPES[self.kernel.buffers[store.buffer]]
            text = f"v{store.value}"
            if store.value not in self.moved:
                text += ".to(tl.int8)" if kind == "tl.int1" else f".to({kind})"
            pointer = f"b{store.buffer} + (zx + {to_triton(store.index)} + {shape})"
            lines.append(f"tl.store({pointer}, {text}, mask={mask})")
        return lines

    def _accumulate(self, local: int, value: int) -> str:
        accumulator = self.nest.accumulators[local]
        seen = f"tl.where(rm, v{value}, {_neutral(accumulator)})"
        if accumulator.dtype == "bool":
            sign = "|" if accumulator.kind in ("any", "max", "sum") else "&"
            seen = f"(v{value} & rm)" if sign == "|" else f"(v{value} | (r >= length) | (x >= rows))"
            return f"acc{local} = acc{local} {sign} {seen}"
        if accumulator.kind in ("any", "all"):
            raise TypeError(f"{accumulator.kind} of {accumulator.dtype}")
        if accumulator.kind == "sum":
            return f"acc{local} += {seen}"
        if accumulator.kind == "prod":
            return f"acc{local} *= {seen}"
        module = "f" if accumulator.dtype.startswith("float") else "tl"
        seen = f"{seen}.to({TYPES[accumulator.dtype]})"
        return f"acc{local} = {module}.{accumulator.kind}imum(acc{local}, {seen})"

    def value(self, number: int, value: Value) -> list[str]:
        """Statements that define value `number`."""
        name = f"v{number}"
        if isinstance(value, Constant):
            return [f"{name} = tl.full([1, 1], {_literal(value)}, {TYPES[value.dtype]})"]
        if isinstance(value, IndexValue):
            return [f"{name} = (zx + {to_triton(value.index)}).to(tl.int64)"]
        if isinstance(value, Local):
            return [f"{name} = a{value.number}"]
        if isinstance(value, Call):
            return [f"{name} = {self._call(value)}"]
        if isinstance(value, Cast):
            return [f"{name} = {self._cast(value)}"]
        mask = "rm" if self.varies[number] else "xm"
        if isinstance(value, Position):
            size = to_triton(value.size)
            wrap = f" + tl.where(v{value.arg} < 0, {size}, 0)" if value.wraps else ""
            zeros = "zr" if self.varies[number] else "zx"
            return [
                f"{name} = v{value.arg}{wrap}",
                f"bad{number} = ({name} < 0) | ({name} >= {size})",
                f"tl.store(status + {zeros}, 1, mask={mask} & bad{number})",
                f"{name} = tl.where(bad{number}, 0, {name})",
            ]
        guard = f" & v{value.guard}" if value.guard >= 0 else ""
        zeros = "zr" if self.varies[number] else "zx"
        pointer = f"b{value.buffer} + (zx + {to_triton(value.index)} + {zeros})"
        text = f"tl.load({pointer}, mask={mask}{guard}, other=0)"
        if value.dtype == "bool":
            return [f"{name} = {text} != 0"]
        if number in self.moved:
            return [f"{name} = {text}"]
        return [f"{name} = {text}.to({TYPES[value.dtype]})"]

    def _call(self, value: Call) -> str:
        function, args = value.function, [f"v{a}" for a in value.args]
        kind = value_dtype(self.sweep.values[value.args[-1]])
        floating = kind.startswith("float")
        if function in _OPERATORS:
            text = f"({args[0]} {_OPERATORS[function]} {args[1]})"
            # Triton adds and multiplies conditions as it does integers of one bit.
            return text if value.dtype in ("bool",) or floating else f"{text}.to({TYPES[value.dtype]})"
        if function == "where":
            return f"tl.where({', '.join(args)})"
        if function == "bit_not":
            return f"({args[0]} == 0)" if kind == "bool" else f"(~{args[0]})"
        if function == "neg":
            return f"(-{args[0]})"
        if function == "isnan":
            return f"({args[0]} != {args[0]})"
        if function == "isinf":
            return f'(tl.abs({args[0]}) == float("inf"))'
        if function == "reciprocal":
            return f"(1.0 / {args[0]})"
        if function == "trunc_div" and floating:
            return f"f.trunc(f.float_div({args[0]}, {args[1]}))"
        if function in _BY_KIND:
            name = _BY_KIND[function][floating]
            return f"{name}({', '.join(args)})" if "." in name else f"({args[0]} {name} {args[1]})"
        if function in ("maximum", "minimum"):
            if kind == "bool":
                return f"({args[0]} {'|' if function == 'maximum' else '&'} {args[1]})"
            return f"{'f' if floating else 'tl'}.{function}({', '.join(args)})"
        if function == "round":
            return f"f.round_even({args[0]})"
        if function in ("floor", "ceil", "trunc", "round") and not floating:
            return args[0]
        return f"{'tl' if function in _LANGUAGE else 'f'}.{function}({', '.join(args)})"

    def _cast(self, value: Cast) -> str:
        source, kind = f"v{value.arg}", value_dtype(self.sweep.values[value.arg])
        if value.dtype == "bool":
            return source if kind == "bool" else f"({source} != 0)"
        if register(value.dtype) != value.dtype:
            wide = source if kind == "float32" else f"{source}.to(tl.float32)"
            return f"{wide}.to({TYPES[value.dtype]}).to(tl.float32)"
        if kind.startswith("float") and value.dtype in ("int8", "int16", "uint8"):
            source += ".to(tl.int64)"  # wraps, as a conversion by way of a wide integer does
        return f"{source}.to({TYPES[value.dtype]})"


def _literal(value: Constant) -> str:
    if isinstance(value.value, float):
        if math.isnan(value.value):
            return 'float("nan")'
        if math.isinf(value.value):
            return '-float("inf")' if value.value < 0 else 'float("inf")'
    return repr(value.value)


def indent(lines: Sequence[str]) -> list[str]:
    """The lines, one level further in."""
    return [f"    {line}" for line in lines]
