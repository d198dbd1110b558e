"""Prints a product with an epilogue (`codegen/loops/epilogue.py`) as a module of Triton kernels.

The kernels have the names of those in `kernels/linear.py`, whose sums they take. In place of `out` and its stride they
are given the epilogue's buffers and symbols, in front of all other arguments.
"""

from __future__ import annotations

from llmopt.codegen.loops.epilogue import PRODUCT
from llmopt.codegen.loops.ir import Load, LoopKernel, Value
from llmopt.codegen.loops.print_triton import TYPES, SweepPrinter, indent

_IMPORTED = "added_splits, gemm_sums, gemv_sums, store_part, with_bias"
_WEIGHTS = "w0, w1, w2, c0, c1, c2, n0, n1, n2, rows"
_TILE = "SPLITS: tl.constexpr, SEGMENTS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr"


def print_triton_epilogue(kernel: LoopKernel) -> str:
    """The source of a module with `gemv`, `gemm` and `merge_splits` whose results go through `kernel`."""
    (nest,) = kernel.nests
    operands = [*(f"b{n}" for n in range(1, len(kernel.buffers))), *kernel.symbols]
    head = ", ".join(operands)
    listed = ", ".join(f'"{name}"' for name in (*kernel.symbols, "rows"))
    jit = f"@triton.jit(do_not_specialize=[{listed}])"
    finish = [
        *(f"{name} = {name}.to(INDEX)" for name in kernel.symbols),
        "values = with_bias(sums, cols, c0, c1, c2, n0, n1, n2, B0, B1, B2)",
        f"epilogue(values, row, cols, ok, rows, {head}, INDEX)",
    ]
    split = [
        "if SPLITS > 1:",
        "    store_part(part, sums, row, cols, ok, rows, n0 + n1 + n2)",
        "else:",
        *indent(finish),
    ]
    body = [
        "i0 = row.to(INDEX)[:, None]",
        "j0 = cols.to(INDEX)[None, :]",
        "xm = i0 < rows",
        "rm = ok",
        "zx = i0 * 0",
        "zr = zx + j0 * 0",
        *_Printer(kernel, nest, nest.sweeps[0]).statements(),
    ]
    lines = [
        f'"""{kernel.name} behind a product"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "from llmopt.codegen.triton.kernels import functions as f",
        f"from llmopt.codegen.triton.kernels.linear import {_IMPORTED}",
        "",
        "",
        "@triton.jit",
        f"def epilogue(values, row, cols, ok, rows, {head}, INDEX: tl.constexpr):",
        *indent(body),
        "",
        "",
        jit,
        f"def gemv({head}, x, part, {_WEIGHTS}, K, x_stride, INDEX: tl.constexpr, M: tl.constexpr, "
        f"BN: tl.constexpr, BK: tl.constexpr, {_TILE}):",
        "    sums, row, cols, ok = gemv_sums(",
        "        x, w0, w1, w2, n0, n1, n2, rows, K, x_stride, M, BN, BK, SPLITS, SEGMENTS",
        "    )",
        *indent(split),
        "",
        "",
        jit,
        f"def gemm({head}, x, part, {_WEIGHTS}, K, x_stride, INDEX: tl.constexpr, BM: tl.constexpr, "
        f"BN: tl.constexpr, BK: tl.constexpr, {_TILE}, PRECISION: tl.constexpr):",
        "    sums, row, cols, ok = gemm_sums(",
        "        x, w0, w1, w2, n0, n1, n2, rows, K, x_stride, BM, BN, BK, SPLITS, SEGMENTS, PRECISION",
        "    )",
        *indent(split),
        "",
        "",
        jit,
        f"def merge_splits({head}, part, c0, c1, c2, n0, n1, n2, rows, INDEX: tl.constexpr, BLOCK: tl.constexpr, "
        "SPLITS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):",
        "    sums, row, cols, ok = added_splits(part, rows, n0 + n1 + n2, BLOCK, SPLITS)",
        *indent(finish),
        "",
    ]
    return "\n".join(lines)


class _Printer(SweepPrinter):
    """The loop over a tile, where the product's entries are `values`, rounded as they would be stored."""

    def value(self, number: int, value: Value) -> list[str]:
        if not isinstance(value, Load) or value.buffer != PRODUCT:
            return super().value(number, value)
        stored = f"values.to({TYPES[self.kernel.buffers[PRODUCT]]})"
        return [f"v{number} = {stored}" if number in self.moved else f"v{number} = {stored}.to(tl.float32)"]
