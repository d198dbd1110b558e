"""Runs a Program: compiles its kernels, binds weights, and turns arguments into results."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llmopt.codegen.cpu.huge_pages import move_to_huge_pages
from llmopt.codegen.cpu.native import ABSENT, NativeCall, NativePlan, Scratch, TensorOperand, team_size
from llmopt.codegen.cpu.templates import source_of
from llmopt.codegen.cpu.toolchain import build_library
from llmopt.codegen.index import Index, add, evaluate, to_postfix
from llmopt.codegen.loops.print_cpp import print_kernel
from llmopt.codegen.loops.print_epilogue import print_epilogue
from llmopt.codegen.loops.print_triton import print_triton
from llmopt.codegen.program import AtenCall, KernelCall, KernelSpec, Program, Size, View
from llmopt.codegen.triton.epilogue import print_triton_epilogue
from llmopt.codegen.triton.templates import template_source
from llmopt.compiler.errors import InputError

Tensor = torch.Tensor

_profiling = torch._C._autograd._profiler_enabled

# Base 0 of a native call is the arena; value i has base i + 1.
_ARENA = 0
# Sets of sizes whose numbers are kept. A decode step has the same ones for a page of tokens or longer.
_MAX_SIZES = 256


def kernel_entry(spec: KernelSpec) -> str:
    """The name of a kernel's entry: equal specifications share one."""
    return "k_" + hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def kernel_name(spec: KernelSpec) -> str:
    """A kernel's template with its arguments, for people."""
    arguments = ", ".join(spec.arguments).replace("llmopt::", "")
    name = f"{spec.template}<{arguments}>" if arguments else spec.template
    return f"{name} + {spec.loop.name}" if spec.loop is not None and spec.product is not None else name


def kernel_source(spec: KernelSpec, batch_invariant: bool = False, target: str = "cpu") -> str:
    """The text that a kernel is compiled from: a C++ translation unit, or for "cuda" a module of Triton kernels.

    For `batch_invariant` see `Program.batch_invariant`.
    """
    if target == "cuda":
        if spec.loop is None:
            return template_source(spec.template)
        return print_triton(spec.loop) if spec.product is None else print_triton_epilogue(spec.loop)
    if spec.loop is not None:
        if spec.product is not None:
            return print_epilogue(spec.loop, kernel_entry(spec), kernel_entry(spec.product))
        return print_kernel(spec.loop, kernel_entry(spec))
    return source_of(spec, kernel_entry(spec), batch_invariant)


class _Sizes(dict[str, int]):
    """The value of each symbol in a call, and of every index expression that was asked for at these sizes.

    Expressions are known by identity: they belong to the program, which outlives this.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self._known: dict[int, int] = {}
        # Results that are lent at these sizes, made once.
        self.lent: list[Tensor] | None = None

    def at(self, index: Index) -> int:
        """The value of `index`."""
        if isinstance(index, int):
            return index
        known = self._known.get(id(index))
        if known is None:
            known = self._known[id(index)] = evaluate(index, self)
        return known


class Executable:
    """A Program made runnable on this machine. One call at a time.

    Args:
        program: what to run.
        threads: CPU threads of a native call, 0 for PyTorch's number at each call.
        huge_pages: whether weights that stand on the CPU move to huge pages when they are used again.

    Raises ToolchainError when the kernels cannot be compiled.
    """

    device = torch.device("cpu")

    def __init__(self, program: Program, threads: int = 0, huge_pages: bool = False) -> None:
        self.program = program
        self.threads, self.huge_pages = threads, huge_pages
        self._bases = np.zeros(len(program.values) + 1, np.int64)
        self._positions = {symbol.name: i for i, symbol in enumerate(program.symbols)}
        self._symbols = np.zeros(max(1, len(program.symbols)), np.int64)
        self._sizes: dict[tuple[int, ...], _Sizes] = {}
        self._tensors: list[Any] = [None] * len(program.values)
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._lending = torch.empty(0, dtype=torch.uint8)
        self._aten_seconds: dict[int, float] | None = None
        # Arguments that are no weights, and the values that they are.
        self._given = [index for index, slot in enumerate(program.inputs) if slot is not None]
        self._slots = [slot for slot in program.inputs if slot is not None]
        self._given_bases = np.array(self._slots, np.int64) + 1
        self._fresh = [i for i, value in enumerate(program.values) if value.kind == "output"]
        self._steps = self._build()
        # The latest call that lent its results, where it can be made again: its number, its threads, what it lent.
        self.num_calls = 0
        # At which call weights move: not at the first, whose caller has waited long enough and may never come back.
        self._moves_at = -1
        self._again: tuple[int, int, list[Any]] = -1, 0, []
        self._rerun: Callable[[int | None], None] | None = None
        if len(self._steps) == 1 and isinstance(self._steps[0], NativePlan) and not program.mutations:
            self._rerun = self._steps[0].runner(self._bases, self._symbols)

    def _build(self) -> list[Any]:
        """Neighbouring kernel calls become one native call."""
        program = self.program
        # An epilogue calls its product, which need not be called by itself.
        wanted = dict.fromkeys(s for spec in program.kernels for s in (spec, spec.product) if s is not None)
        sources = [kernel_source(spec, program.batch_invariant) for spec in wanted]
        library = build_library(sources) if sources else None
        entries = [kernel_entry(spec) for spec in program.kernels]
        scratch = Scratch()  # they run one after the other
        steps: list[Any] = []
        pending: list[NativeCall] = []

        def flush() -> None:
            if pending and library is not None:
                steps.append(NativePlan(library, list(pending), scratch))
                pending.clear()

        for step in program.steps:
            if isinstance(step, AtenCall):
                flush()
                steps.append(step)
            else:
                pending.append(self._native(step, entries))
        flush()
        return steps

    def _native(self, call: KernelCall, entries: Sequence[str]) -> NativeCall:
        operands = []
        for operand in call.tensors:
            if operand is None:
                operands.append(ABSENT)
                continue
            value = self.program.values[operand.value]
            if value.kind == "arena":
                base, offset = _ARENA, add(value.offset, operand.offset)
            else:
                base, offset = operand.value + 1, operand.offset
            operands.append(TensorOperand(base, to_postfix(offset, self._positions)))
        ints = tuple(to_postfix(i, self._positions) for i in call.ints)
        label = f"llmopt::{call.origin} [{kernel_name(self.program.kernels[call.kernel])}]"
        return NativeCall(entries[call.kernel], tuple(operands), ints, call.floats, call.sync_after, label)

    @property
    def num_kernel_runs(self) -> int:
        """How often one run goes over from ATen, or from the caller, to kernels."""
        return sum(not isinstance(step, AtenCall) for step in self._steps)

    @property
    def native_plans(self) -> list[NativePlan]:
        """The native calls of one run, for profiling."""
        return [step for step in self._steps if isinstance(step, NativePlan)]

    @property
    def weights(self) -> list[Tensor]:
        """The bound weights, in slot order."""
        return [self._tensors[slot] for slot in self.program.weights]

    def bind(self, weights: Sequence[Tensor]) -> None:
        """Sets the weights, in the order of `program.weights`. They are used in place, never copied.

        Raises InputError when a dtype, shape or memory layout differs from what the program was compiled for.
        """
        if len(weights) != len(self.program.weights):
            raise InputError(f"the program takes {len(self.program.weights)} weights, got {len(weights)}")
        for slot, weight in zip(self.program.weights, weights, strict=True):
            value = self.program.values[slot]
            if weight.dtype != value.dtype or tuple(weight.shape) != value.sizes:
                raise InputError(
                    f"weight {value.name} must be {value.dtype}{list(value.sizes)}, "
                    f"got {weight.dtype}{list(weight.shape)}"
                )
            if tuple(weight.stride()) != value.strides and weight.numel() > 1:
                raise InputError(f"weight {value.name} must have strides {value.strides}, got {weight.stride()}")
            self._tensors[slot] = weight
            self._bases[slot + 1] = weight.data_ptr()
        self._moves_at = self.num_calls + 2 if self.huge_pages else -1

    def __call__(self, arguments: Sequence[Any], *, lend: bool = False) -> list[Any]:
        """Runs the program on its arguments (weights among them are ignored; they are bound).

        Results are fresh tensors, or with `lend` tensors that the next such call may overwrite: at sizes that have been
        seen before it allocates nothing.

        Raises KernelError for what kernels refuse, such as a token id outside the table.
        """
        self.num_calls += 1
        if self.num_calls == self._moves_at:
            move_to_huge_pages(self.weights)
        program, bases, tensors = self.program, self._bases, self._tensors
        given = [arguments[index] for index in self._given]
        for slot, argument in zip(self._slots, given, strict=True):
            tensors[slot] = argument
        bases[self._given_bases] = [argument.data_ptr() for argument in given]
        sizes = self._sizes_of(arguments)
        needed = sizes.at(program.arena_bytes)
        if self._arena.numel() < needed + 64:
            self._arena = torch.empty(needed + 64, dtype=torch.uint8, device=self.device)
        bases[_ARENA] = self._arena.data_ptr() + 63 & ~63
        for slot, made in zip(self._fresh, self._lend(sizes) if lend else self._make(sizes), strict=True):
            tensors[slot] = made
            bases[slot + 1] = made.data_ptr()
        # A profiler sees each kernel by name; without one the calls are not told apart.
        run = self._run_in_spans if _profiling() else self._run_step
        for step in self._steps:
            run(step, sizes)
        results = self._finish(arguments, sizes)
        for slot in (*self._fresh, *self._slots):
            tensors[slot] = None
        if lend and self._rerun is not None:
            self._again = self.num_calls, team_size(self.threads), results
        return results

    def again(self, number: int) -> list[Any] | None:
        """Makes the latest call once more, by as many threads, on what its arguments hold now; None where it cannot.

        It is where no other call came after the one with this number (`num_calls`), which lent its results, and where
        kernels are all there is to run. The caller sees to it that the arguments' memory is still there.
        """
        latest, threads, results = self._again
        if self._rerun is None or number != latest or number != self.num_calls or _profiling():
            return None
        self._rerun(threads)
        return results

    def _make(self, sizes: _Sizes) -> list[Tensor]:
        """A fresh tensor for each result that kernels write."""
        made = []
        for slot in self._fresh:
            value = self.program.values[slot]
            shape, strides = [sizes.at(s) for s in value.sizes], [sizes.at(s) for s in value.strides]
            made.append(torch.empty_strided(shape, strides, dtype=value.dtype, device=self.device))
        return made

    def _lend(self, sizes: _Sizes) -> list[Tensor]:
        """The same, on memory that all such calls share."""
        if sizes.lent is None:
            made = self._make(sizes)
            ends = list(itertools.accumulate(-(-t.untyped_storage().nbytes() // 64) * 64 for t in made))
            if ends and ends[-1] > self._lending.numel():
                self._lending = torch.empty(ends[-1], dtype=torch.uint8, device=self.device)
                for other in self._sizes.values():
                    other.lent = None
            storage = self._lending.untyped_storage()
            sizes.lent = [
                torch.empty(0, dtype=t.dtype, device=self.device).set_(
                    storage, begin // t.itemsize, t.shape, t.stride()
                )
                for t, begin in zip(made, [0, *ends], strict=False)
            ]
        return sizes.lent

    def _run_step(self, step: Any, sizes: _Sizes) -> None:
        if not isinstance(step, AtenCall):
            self._run_kernels(step, sizes)
        elif self._aten_seconds is None:
            self._run_aten(step, sizes)
        else:
            begin = time.perf_counter()
            self._run_aten(step, sizes)
            self._aten_seconds[id(step)] += time.perf_counter() - begin

    def _run_in_spans(self, step: Any, sizes: _Sizes) -> None:
        if isinstance(step, NativePlan):
            step.run_by_call(self._bases, self._symbols, self.threads, torch.profiler.record_function)
        elif isinstance(step, AtenCall):
            with torch.profiler.record_function(f"llmopt::aten {step.op}"):
                self._run_aten(step, sizes)
        else:  # a GPU's kernels have names of their own
            self._run_kernels(step, sizes)

    @property
    def last_sizes(self) -> dict[str, int]:
        """The value of each of the program's symbols in the latest call."""
        return {symbol.name: int(self._symbols[i]) for i, symbol in enumerate(self.program.symbols)}

    def profile(self, on: bool) -> None:
        """Adds up the time of each step of the program from now on, or stops doing so; see `step_seconds`."""
        self._aten_seconds = defaultdict(float) if on else None
        for plan in self.native_plans:
            plan.profile(on)

    def step_seconds(self) -> list[float]:
        """Seconds of each step of the program, in order, since `profile(True)`."""
        found: list[float] = []
        for step in self._steps:
            found += (
                step.seconds.tolist()
                if isinstance(step, NativePlan)
                else [(self._aten_seconds or {}).get(id(step), 0.0)]
            )
        return found

    def _sizes_of(self, arguments: Sequence[Any]) -> _Sizes:
        """The sizes of this call: what was computed for them before serves again."""
        numbers = []
        for symbol in self.program.symbols:
            source = arguments[symbol.index]
            numbers.append(int(source if symbol.dim < 0 else source.shape[symbol.dim]))
        key = tuple(numbers)
        sizes = self._sizes.get(key)
        if sizes is None:
            if len(self._sizes) >= _MAX_SIZES:
                self._sizes.clear()
            sizes = self._sizes[key] = _Sizes({s.name: n for s, n in zip(self.program.symbols, key, strict=True)})
        self._symbols[: len(key)] = key
        return sizes

    def _run_kernels(self, step: Any, sizes: Mapping[str, int]) -> None:
        step.run(self._bases, self._symbols, self.threads)

    def _run_aten(self, call: AtenCall, sizes: _Sizes) -> None:
        namespace, name, overload = call.op.split(".")
        op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        args, kwargs = (
            [self._resolve(a, sizes) for a in call.args],
            {k: self._resolve(v, sizes) for k, v in call.kwargs.items()},
        )
        result = op(*args, **kwargs)
        for slot, item in zip(call.values, result if isinstance(result, list | tuple) else [result], strict=True):
            if slot < 0:
                continue
            value = self.program.values[slot]
            strides = tuple(sizes.at(s) for s in value.strides)
            if item.stride() != strides and item.numel() > 1:
                item = torch.empty_strided(item.shape, strides, dtype=item.dtype, device=item.device).copy_(item)
            self._tensors[slot] = item
            self._bases[slot + 1] = item.data_ptr()

    def _resolve(self, arg: Any, sizes: _Sizes) -> Any:
        if isinstance(arg, View):
            tensor = self._tensors[arg.value]
            shape = [sizes.at(s) for s in arg.sizes]
            strides = [sizes.at(s) for s in arg.strides]
            offset = sizes.at(arg.offset)
            if offset == 0 and list(tensor.shape) == shape and list(tensor.stride()) == strides:
                return tensor
            return torch.as_strided(tensor, shape, strides, tensor.storage_offset() + offset)
        if isinstance(arg, Size):
            return sizes.at(arg.index)
        if isinstance(arg, list):
            return [self._resolve(a, sizes) for a in arg]
        return arg

    def _finish(self, arguments: Sequence[Any], sizes: _Sizes) -> list[Any]:
        """Writes new values back into mutated arguments, then makes the results.

        A result that looks at such a value becomes a view of the argument, as it would be in eager mode.
        """
        moved: dict[int, int] = {}
        for index, view in self.program.mutations:
            arguments[index].copy_(self._resolve(view, sizes))
            if view.offset == 0:
                moved[view.value] = index
        results = []
        for result in self.program.results:
            if isinstance(result, View) and result.value in moved:
                target = arguments[moved[result.value]]
                value = self.program.values[result.value]
                if list(target.stride()) == [sizes.at(s) for s in value.strides]:
                    self._tensors[result.value] = target
            results.append(self._resolve(result, sizes))
        return results
