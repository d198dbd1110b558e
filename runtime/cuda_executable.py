"""Runs a Program on a GPU: launches its Triton kernels one after the other on the current stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.codegen.cpu.native import KernelError
from llmopt.codegen.index import evaluate
from llmopt.codegen.program import KernelCall, Operand, Program
from llmopt.codegen.triton.launch import Device, Launch, run
from llmopt.codegen.triton.loops import loop_launches
from llmopt.codegen.triton.templates import launches
from llmopt.compiler.errors import InputError
from llmopt.runtime.executable import Executable

Tensor = torch.Tensor


@dataclass(frozen=True)
class DeviceCalls:
    """Neighbouring kernel calls of a program."""

    calls: tuple[KernelCall, ...]


class CudaExecutable(Executable):
    """A Program for "cuda" made runnable. Results are fresh tensors on the device; nothing waits for the GPU but the
    check of indices at the end of a call, which is left out while a CUDA graph is captured.

    Args:
        program: what to run.
        device: where; None for the current CUDA device. A CPU device serves Triton's interpreter.

    Raises ToolchainError when triton cannot be imported.
    """

    def __init__(self, program: Program, device: torch.device | None = None) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        self.status = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.properties = Device()
        if self.device.type == "cuda":
            self.properties = Device(torch.cuda.get_device_properties(self.device).multi_processor_count)
        self.weights_version = 0
        self.launched = 0
        super().__init__(program)
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)

    def _build(self) -> list[Any]:
        steps: list[Any] = []
        pending: list[KernelCall] = []
        for step in [*self.program.steps, None]:
            if isinstance(step, KernelCall):
                pending.append(step)
                continue
            if pending:
                steps.append(DeviceCalls(tuple(pending)))
                pending = []
            if step is not None:
                steps.append(step)
        return steps

    def bind(self, weights: Sequence[Tensor]) -> None:
        """As for the CPU; what was captured with other weights must be captured again (`weights_version`)."""
        before = [None if w is None else w.data_ptr() for w in self.weights]
        for weight in weights:
            if weight.device != self.device:
                raise InputError(f"the program runs on {self.device}, a weight lies on {weight.device}")
        super().bind(weights)
        if before != [w.data_ptr() for w in self.weights]:
            self.weights_version += 1

    def __call__(self, arguments: Sequence[Any], *, lend: bool = False) -> list[Any]:
        """Runs the program on its arguments, on the current stream.

        Raises KernelError when a kernel met an index out of range, such as a token id outside the table. While a CUDA
        graph is captured nothing is checked: the one who replays it calls `check`.
        """
        # Triton launches on the current device.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self._capturing():
                return self._in_graph(arguments)
            results = super().__call__(arguments, lend=lend)
            self.check()
        return results

    def _in_graph(self, arguments: Sequence[Any]) -> list[Any]:
        """A call that is captured, whoever captures it: all that it allocates is the graph's own, the arena too.

        The common one is replaced by a larger one when it must, which a graph would not know of.
        """
        arena, self._arena = self._arena, self._arena.new_empty(0)
        try:
            return super().__call__(arguments)
        finally:
            self._arena = arena

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def check(self) -> None:
        """Waits for the kernels and raises KernelError when one of them met an index out of range."""
        if self.status.item():
            self.status.zero_()
            raise KernelError(1, -1, "a kernel on the GPU")

    def _run_kernels(self, step: Any, sizes: Mapping[str, int]) -> None:
        for call in step.calls:
            made = self.plan(call, sizes)
            self.launched += len(made)
            run(made)

    def plan(self, call: KernelCall, sizes: Mapping[str, int]) -> list[Launch]:
        """The launches of one call on the present operands."""
        spec = self.program.kernels[call.kernel]
        tensors = [None if t is None else self._operand(t, sizes) for t in call.tensors]
        ints = [evaluate(i, sizes) for i in call.ints]
        if spec.loop is not None and spec.product is None:
            return loop_launches(spec.loop, [t for t in tensors if t is not None], ints, self.status)
        place = (self.status, self.properties, spec.loop)
        return launches(spec.template, spec.arguments, tensors, ints, call.floats, *place)

    def _operand(self, operand: Operand, sizes: Mapping[str, int]) -> Tensor:
        """A flat tensor that begins with the operand's first element and ends where the memory behind it ends.

        How far a kernel reads is said by sizes and strides.
        """
        value = self.program.values[operand.value]
        start = evaluate(operand.offset, sizes)
        if value.kind == "arena":
            memory = self._arena
            start += -memory.data_ptr() % 64 + evaluate(value.offset, sizes)
        else:
            memory = self._tensors[operand.value]
            start += memory.storage_offset() * memory.element_size()
        storage = memory.untyped_storage()
        count = (storage.nbytes() - start) // value.dtype.itemsize
        flat = torch.empty(0, dtype=value.dtype, device=memory.device)
        return flat.set_(storage, start // value.dtype.itemsize, (count,), (1,))


def make_executable(
    program: Program, threads: int = 0, device: torch.device | None = None, huge_pages: bool = False
) -> Executable:
    """The executable for a program's target; `device` concerns GPUs alone (None: the current one), the rest the CPU."""
    return CudaExecutable(program, device) if program.target == "cuda" else Executable(program, threads, huge_pages)
