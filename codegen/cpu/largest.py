"""The largest element of each row of a matrix, for the sampler: as the last call of a step, and by itself."""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmopt.codegen.cpu.native import SYMBOL, NativeCall, NativePlan, TensorOperand, make_lock
from llmopt.codegen.cpu.templates import FLOATS
from llmopt.codegen.cpu.toolchain import build_library
from llmopt.codegen.program import KernelCall, KernelSpec, Operand, Program, Value, View
from llmopt.compiler.errors import ToolchainError

log = logging.getLogger(__name__)

_SOURCE = '#include "largest.h"\n' + "".join(
    f"LLMOPT_KERNEL(largest_{str(dtype).removeprefix('torch.')}) {{ llmopt::largest<{name}>(args, worker); }}\n"
    for dtype, name in FLOATS.items()
)
# Bytes that are read by one thread: waking others takes as long.
_ONE_THREAD = 1 << 17


def with_largest(program: Program) -> Program | None:
    """The program with one more kernel call, which finds the largest of each row of its first result, `[R, V]`.

    The rows are in the caches then, and the threads are awake. There are two more arguments, the last ones, which the
    call writes to: values float32 `[R]` and places int64 `[R]`, as `LargestKernel` gives them. None for a program of
    another target, or whose first result is no such matrix of floats or is not computed by kernels at its end.
    """
    view = program.results[0] if program.results else None
    last = program.steps[-1] if program.steps else None
    if program.target != "cpu" or not isinstance(view, View) or not isinstance(last, KernelCall):
        return None
    dtype = program.values[view.value].dtype
    if len(view.sizes) != 2 or view.strides[1] != 1 or view.offset != 0 or dtype not in FLOATS:
        return None
    count = len(program.values)
    made = [Value("input", "largest_values", torch.float32), Value("input", "largest_places", torch.int64)]
    operands = Operand(view.value), Operand(count), Operand(count + 1)
    call = KernelCall(len(program.kernels), operands, (*view.sizes, view.strides[0]), (), False, "largest")
    return replace(
        program,
        values=[*program.values, *made],
        inputs=[*program.inputs, count, count + 1],
        kernels=[*program.kernels, KernelSpec("largest", (FLOATS[dtype],))],
        steps=[*program.steps[:-1], replace(last, sync_after=True), call],
    )


class LargestKernel:
    """Finds the largest elements of rows of one dtype: float32, bfloat16 or float16. Threads may share it.

    Raises ToolchainError where kernels cannot be compiled.
    """

    _lock: threading.Lock

    def __init__(self, dtype: torch.dtype) -> None:
        operands, ints = tuple(map(TensorOperand, range(3))), tuple((SYMBOL, i) for i in range(3))
        call = NativeCall(f"largest_{str(dtype).removeprefix('torch.')}", operands, ints, ())
        self._plan = NativePlan(build_library([_SOURCE]), [call])
        self._itemsize = dtype.itemsize
        make_lock(self)
        self._bases, self._sizes = np.zeros(3, np.int64), np.zeros(3, np.int64)
        # Numbers are written and read through these: a call of NumPy costs more than all of them.
        self._address, self._shape = self._bases.data, self._sizes.data
        self._run = self._plan.runner(self._bases, self._sizes)
        self._make_room(16)

    def _make_room(self, rows: int) -> None:
        values, places = np.empty(rows, np.float32), np.empty(rows, np.int64)
        self._bases[1:] = values.ctypes.data, places.ctypes.data
        self._values, self._places, self._room = values.data, places.data, rows

    def __call__(self, address: int, rows: int, columns: int, stride: int) -> tuple[list[float], list[int]]:
        """Value and place of the first largest element of each row; a NaN is larger than all.

        Args:
            address: of the first element, in memory that is there until this returns.
            rows, columns: how many; `columns` is at least 1.
            stride: elements from row to row.
        """
        with self._lock:
            if rows > self._room:
                self._make_room(rows)
            self._address[0] = address
            shape = self._shape
            shape[0], shape[1], shape[2] = rows, columns, stride
            self._run(1 if rows * columns * self._itemsize <= _ONE_THREAD else None)
            values: list[Any] = self._values[:rows].tolist()  # of floats, which typeshed does not know
            return values, self._places[:rows].tolist()


@functools.cache
def largest_kernel(dtype: torch.dtype) -> LargestKernel | None:
    """The kernel for a dtype; None where there is none, or no compiler."""
    if dtype not in FLOATS:
        return None
    try:
        return LargestKernel(dtype)
    except ToolchainError as error:
        log.info("the largest logits are found by NumPy and PyTorch: %s", error)
        return None
