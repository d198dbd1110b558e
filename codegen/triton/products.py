"""Launches of `linear`, `batched_linear` and `grouped_linear`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from llmopt.codegen.cpu.templates import PlannedCall
from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.triton.calls import Call, ceil_div, power, precision
from llmopt.codegen.triton.epilogue import print_triton_epilogue
from llmopt.codegen.triton.launch import Launch, index_type

SEGMENTS = 3  # weights that one launch takes
GEMV_ROWS = 4  # rows up to which weights are streamed through the CUDA cores
SPLIT_ROWS = 64  # rows up to which K may be split; more fill the GPU by themselves
MAX_SPLITS = 8
LONG_K = 2048  # a shorter K is not worth a second launch
WIDE_N = 8192  # more columns fill the GPU by themselves


def _may_split(k: int, columns: int) -> bool:
    return k >= LONG_K and columns <= WIDE_N


def linear_workspace(call: PlannedCall) -> sympy.Expr | None:
    """Bytes of the partial sums of split products, None where no launch would split."""
    rows, k, _, _, _, *sizes = call.ints
    columns = sympy.Integer(0) + sum(sizes)
    if not (k.is_Integer and columns.is_Integer and _may_split(int(k), int(columns))):
        return None
    return 4 * MAX_SPLITS * columns * sympy.Min(rows, SPLIT_ROWS)


def _splits(call: Call, tiles: int, rows: int, k: int, columns: int) -> int:
    """How many programs share one tile's K: enough to give every multiprocessor two."""
    part = call.tensors[-1]
    if part is None or rows > SPLIT_ROWS or not _may_split(k, columns):
        return 1
    wanted = ceil_div(2 * call.device.multiprocessors, tiles)
    return max(1, min(MAX_SPLITS, wanted, k // 1024))


def _linear(call: Call) -> list[Launch]:
    if call.epilogue is not None:
        return _with_epilogue(call, call.epilogue)
    rows, k, x_stride, out_stride, count, *sizes = call.ints
    x, out, *rest = call.tensors
    part = rest[-1]
    made: list[Launch] = []
    for begin in range(0, count, SEGMENTS):
        here = sizes[begin : begin + SEGMENTS]
        weights = [rest[2 * n] for n in range(begin, begin + len(here))]
        biases = [rest[2 * n + 1] for n in range(begin, begin + len(here))]
        target = _Target((out[sum(sizes[:begin]) :],), (out_stride,))
        made += _segments(call, x, target, part, weights, biases, here, (rows, k, x_stride))
    return made


def _with_epilogue(call: Call, epilogue: LoopKernel) -> list[Launch]:
    buffers, symbols = len(epilogue.buffers) - 1, len(epilogue.symbols)
    rows, k, x_stride, _, _, *sizes = call.ints[symbols:]
    operands = call.tensors[:buffers]
    x, _, *rest, part = call.tensors[buffers:]
    reach = max([rows * sum(sizes), *(t.untyped_storage().nbytes() // t.element_size() for t in operands)])
    source = _printed(epilogue)
    target = _Target((*operands, *call.ints[:symbols]), (), {"INDEX": index_type(reach)}, source)
    return _segments(call, x, target, part, rest[::2], rest[1::2], sizes, (rows, k, x_stride))


@functools.lru_cache(1024)
def _printed(epilogue: LoopKernel) -> str:
    return print_triton_epilogue(epilogue)


@dataclass(frozen=True)
class _Target:
    """Where results go: the kernels' arguments for it, and the module that the kernels are in when it is generated.

    A generated module takes `first` before all other arguments, `kernels/linear.py` between x and the partial sums, and
    `last` at the end.
    """

    first: tuple[Any, ...]
    last: tuple[Any, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        x: tuple[Any, ...],
        args: tuple[Any, ...],
        constants: Mapping[str, Any],
        warps: int = 4,
        stages: int = 2,
    ) -> Launch:
        """A launch of kernel `name` on the target, the input (none for partial sums) and the other arguments."""
        ordered = (*self.first, *x, *args) if self.source else (*x, *self.first, *args, *self.last)
        module = "" if self.source else "linear."
        return Launch(module + name, grid, ordered, {**self.constants, **constants}, warps, stages, self.source)


def _segments(
    call: Call,
    x: torch.Tensor,
    target: _Target,
    part: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    shape: tuple[int, int, int],
) -> list[Launch]:
    rows, k, x_stride = shape
    if rows == 0:
        return []
    lack = SEGMENTS - len(sizes)
    w = (*weights, *[weights[0]] * lack)
    b = call.present(*biases, *([None] * lack))
    n = (*sizes, *([0] * lack))
    flags = {f"B{i}": i < len(biases) and biases[i] is not None for i in range(SEGMENTS)}
    constants: dict[str, Any] = {"SEGMENTS": len(sizes), **flags}
    streamed = rows <= GEMV_ROWS
    if streamed:
        m = power(rows)
        tile = {"M": m, "BN": 8, "BK": min(512 // m, power(k))}
    else:
        bm = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 128 else 128
        bn = 128 if rows > 128 else 64
        tile = {"BM": bm, "BN": bn, "BK": 32 if x.dtype == torch.float32 else 64}
        constants["PRECISION"] = precision(x)
    column_tiles = sum(ceil_div(size, tile["BN"]) for size in sizes)
    tiles = column_tiles if streamed else column_tiles * ceil_div(rows, tile["BM"])
    splits = _splits(call, tiles, rows, k, sum(sizes))
    if part is not None and splits > 1:
        part = part.view(torch.float32)
    args = (*call.present(part), *w, *b, *n, rows, k, x_stride)
    warps = 8 if not streamed and tile["BM"] == 128 else 4
    stages = 1 if streamed else 3
    name = "gemv" if streamed else "gemm"
    tiled = {**constants, **tile, "SPLITS": splits}
    made = [target.launch(name, (tiles, splits), (x,), args, tiled, warps, stages)]
    if splits > 1:
        merging = {"BLOCK": 256, "SPLITS": splits, **flags}
        grid = (rows, ceil_div(sum(sizes), 256))
        made.append(target.launch("merge_splits", grid, (), (part, *b, *n, rows), merging))
    return made


def _batched(call: Call) -> list[Launch]:
    batch0, batch1, batch2, m, n, k, *strides = call.ints
    x, w, out = call.tensors
    *levels, x_row, out_row = strides
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    tile = {"BM": bm, "BN": 64, "BK": 32, "PRECISION": precision(x)}
    grid = (batch0 * batch1 * batch2 * ceil_div(m, bm) * ceil_div(n, 64),)  # only the first may be large
    args = (x, w, out, m, n, k, x_row, out_row, batch1, batch2, *levels)
    return [Launch("linear.batched", grid, args, tile, stages=3)]


def _grouped(call: Call) -> list[Launch]:
    rows, k, n, groups, x_stride, out_stride = call.ints
    x, w, ends, out = call.tensors
    # A tile should hold about as many rows as a group has.
    bm = max(16, min(64, power(ceil_div(rows, groups))))
    tile = {"BM": bm, "BN": 64, "BK": 32, "PRECISION": precision(x)}
    grid = (rows // bm + groups + 1 if rows else 0, ceil_div(n, 64))
    args = (x, w, ends, out, call.status, rows, n, k, groups, x_stride, out_stride)
    return [Launch("linear.grouped", grid, args, tile, stages=3)]


LINEAR, BATCHED, GROUPED = _linear, _batched, _grouped
