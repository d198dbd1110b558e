"""The Python side of the step executor: encodes a list of kernel calls once, then runs it with one foreign call.

`kernels/executor.cpp` defines the layout that is encoded here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.codegen.cpu import openmp
from llmopt.codegen.cpu.available import available_cpus
from llmopt.compiler.errors import LlmoptError, ToolchainError

log = logging.getLogger(__name__)

SCRATCH_BYTES = 4 << 20  # kScratchBytes of kernels/abi.h

_CALL_WORDS = 5  # int64 words of a Call of kernels/executor.cpp

IntArray = np.ndarray[Any, np.dtype[np.int64]]

# Opcodes of the executor's postfix programs.
PUSH, SYMBOL, ADD, MUL, FLOOR_DIV, MOD, MIN, MAX, END = range(9)

FAILURES = {1: "index out of range", 2: "a size is beyond what the kernel was made for"}


@dataclass(frozen=True)
class TensorOperand:
    """Address `bases[base] + value(offset)`, with `offset` a postfix program in bytes; base -1 is an absent operand."""

    base: int
    offset: tuple[int, ...] = (PUSH, 0)


ABSENT = TensorOperand(-1)


@dataclass(frozen=True)
class NativeCall:
    """One kernel call: the entry's name, its operands in the kernel's order, ints as postfix programs.

    label: what it computes and by which kernel, as profilers show it.
    """

    entry: str
    tensors: tuple[TensorOperand, ...]
    ints: tuple[tuple[int, ...], ...]
    floats: tuple[float, ...]
    sync_after: bool = True
    label: str = ""


class KernelError(LlmoptError, RuntimeError):
    """A kernel refused its input while running; `call` is its index in the step."""

    def __init__(self, failure: int, call: int, entry: str) -> None:
        self.failure, self.call = failure, call
        super().__init__(f"{entry}: {FAILURES.get(failure, f'failure {failure}')}")


class _Plan(ctypes.Structure):
    _fields_ = (
        ("num_expressions", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("num_ints", ctypes.c_int64),
        ("num_calls", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("code", "starts", "tensors", "ints", "floats", "calls")),
        *((name, ctypes.c_void_p) for name in ("values", "addresses", "int_args", "seconds", "scratch")),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plan", "bases", "symbols", "parallel", "num_threads")),
        ("threads", ctypes.c_int64),
    )


_forked = False
_lock_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    global _forked
    _forked = True
    for owner in list(_lock_owners):
        owner._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def make_lock(owner: Any) -> None:
    """Sets `owner._lock`, which a forked child finds open, whoever held it in the parent."""
    owner._lock = threading.Lock()
    _lock_owners.add(owner)


def default_threads() -> int:
    """Threads of a run that names no number: PyTorch's, but no more than the process is granted CPUs.

    Workers wait for one another by spinning, so threads beyond the CPUs would cost time.
    """
    wanted, granted = torch.get_num_threads(), available_cpus()
    if wanted > granted:
        _report_fewer(wanted, granted)
    return min(wanted, granted)


@functools.cache  # once
def _report_fewer(wanted: int, granted: int) -> None:
    log.info("kernels run on %d threads, not on PyTorch's %d: the process is granted no more CPUs", granted, wanted)


def team_size(threads: int | None) -> int:
    """Threads of a run that asks for so many, 0 or None for `default_threads()`."""
    # A forked child has an OpenMP runtime that counts on its parent's threads, and none of them: it works alone.
    return 1 if _forked else threads or default_threads()


class Scratch:
    """Working memory of kernels for one run at a time. It grows, and no part of it goes before the whole."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self._threads, self._address = 0, 0

    def address(self, threads: int) -> int:
        """Where the memory of so many threads is; what was given for fewer remains valid."""
        if threads > self._threads:
            self._parts.append(np.empty(SCRATCH_BYTES * threads + 64, np.uint8))
            self._address, self._threads = self._parts[-1].ctypes.data + 63 & ~63, threads
        return self._address


class NativePlan:
    """An encoded list of calls, bound to the entries of one library. Runs are serialised by a lock.

    Plans of which never two run at once may share a `scratch`.

    Raises ToolchainError for a library that this machine cannot load, whoever compiled it.
    """

    _lock: threading.Lock

    def __init__(self, library: Path, calls: Sequence[NativeCall], scratch: Scratch | None = None) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise ToolchainError(f"the compiled kernels cannot be loaded: {error}; delete {library}") from error
        self.entries = [call.entry for call in calls]
        self.labels = [call.label or call.entry for call in calls]
        make_lock(self)
        self._scratch = scratch or Scratch()

        expressions: dict[tuple[int, ...], int] = {}
        number = lambda code: expressions.setdefault(tuple(code), len(expressions))  # noqa: E731
        tensors = [(t.base, number(t.offset)) for call in calls for t in call.tensors]
        ints = [number(code) for call in calls for code in call.ints]
        rows, begin = [], [0, 0, 0]
        for call in calls:
            address = ctypes.cast(getattr(self._library, call.entry), ctypes.c_void_p).value
            rows.append((address, *begin, int(call.sync_after)))
            begin = [begin[0] + len(call.tensors), begin[1] + len(call.ints), begin[2] + len(call.floats)]
        code: list[int] = []
        starts: list[int] = []
        for expression in expressions:
            starts.append(len(code))
            code += [*expression, END]

        array = lambda values, dtype=np.int64: np.array(values or [0], dtype)  # noqa: E731
        self._arrays = {
            "code": array(code),
            "starts": array(starts),
            "tensors": array(tensors),
            "ints": array(ints),
            "floats": array([f for call in calls for f in call.floats], np.float64),
            "calls": array(rows),
            "values": np.zeros(max(1, len(expressions)), np.int64),
            "addresses": np.zeros(max(1, len(tensors)), np.int64),
            "int_args": np.zeros(max(1, len(ints)), np.int64),
        }
        self.seconds = np.zeros(len(calls))
        self._plan = _Plan(len(expressions), len(tensors), len(ints), len(calls))
        for name, values in self._arrays.items():
            setattr(self._plan, name, values.ctypes.data)
        self._entry = self._library.llmopt_run
        self._entry.restype = ctypes.c_int64
        self._entry.argtypes = [ctypes.c_void_p]

    def profile(self, on: bool) -> None:
        """Adds up the time of each call in `seconds` from now on, or stops doing so."""
        self.seconds[:] = 0
        self._plan.seconds = self.seconds.ctypes.data if on else None

    def run(
        self, bases: Sequence[int] | IntArray, symbols: Sequence[int] | IntArray, threads: int | None = None
    ) -> None:
        """Runs all calls on `threads` threads (`default_threads()` if 0 or None); raises KernelError when one refused.

        `bases` are addresses, `symbols` sizes; int64 arrays are used as they are.
        """
        self.runner(np.ascontiguousarray(bases, np.int64), np.ascontiguousarray(symbols, np.int64))(threads)

    def runner(self, bases: IntArray, symbols: IntArray) -> Callable[[int | None], None]:
        """`run` for these very arrays, whose contents count at each call; they are contiguous int64.

        For what runs again and again: a call of it touches little memory, which a step has put out of the caches.
        """
        given = _Run(ctypes.addressof(self._plan), bases.ctypes.data, symbols.ctypes.data, *openmp.entries(), 0)
        address, known = ctypes.addressof(given), 0  # what `given` says of threads: to ask it would cost more

        def run(threads: int | None, _kept: Any = (bases, symbols)) -> None:
            nonlocal known
            with self._lock:
                team = team_size(threads)
                if team != known:
                    self._plan.scratch = self._scratch.address(team)
                    given.threads = known = team
                status = self._entry(address)
                if status:
                    raise self._failure(status)

        return run

    def run_by_call(
        self,
        bases: Sequence[int] | IntArray,
        symbols: Sequence[int] | IntArray,
        threads: int | None,
        span: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        """As `run`, but one foreign call for each kernel call, inside `span(label)`."""
        row = self._arrays["calls"].itemsize * _CALL_WORDS
        base_array, symbol_array = np.ascontiguousarray(bases, np.int64), np.ascontiguousarray(symbols, np.int64)
        team = team_size(threads)
        with self._lock:
            self._plan.scratch = self._scratch.address(team)
            for number, label in enumerate(self.labels):
                part = _Plan.from_buffer_copy(self._plan)
                part.num_calls = 1
                part.calls += number * row
                if part.seconds:
                    part.seconds += number * self.seconds.strides[0]
                given = _Run(
                    ctypes.addressof(part), base_array.ctypes.data, symbol_array.ctypes.data, *openmp.entries(), team
                )
                with span(label):
                    status = self._entry(ctypes.addressof(given))
                if status:
                    raise self._failure(status, number)

    def _failure(self, status: int, first: int = 0) -> KernelError:
        """The error of a run that gave a status other than 0; `first` is the number of its first call."""
        call = first + status // 256
        return KernelError(status % 256, call, self.entries[call])
