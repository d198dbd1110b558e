"""A Program: what code generation produces. Plain data, from which the runtime builds and runs native code.

Nothing in here refers to Dynamo, FX or the model. Kernels are specifications (a template with arguments, or a loop in
the loop IR), not source text, so a program read from a file cannot bring code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llmopt.codegen.index import Index
from llmopt.codegen.loops.ir import LoopKernel


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: a template of the program's target with its arguments, or (template "loop") a fused loop.

    With another template `loop` is what follows on its results before they are stored (`loops/epilogue.py`).
    """

    template: str
    arguments: tuple[str, ...] = ()
    loop: LoopKernel | None = None

    @property
    def product(self) -> KernelSpec | None:
        """The kernel behind an epilogue, None where there is no epilogue."""
        return None if self.loop is None or self.template == "loop" else KernelSpec(self.template, self.arguments)


@dataclass(frozen=True)
class Value:
    """A tensor of the program.

    kind: "input" (an argument of the call), "weight" (bound once), "arena" (lives within one call), "output" (a fresh
        tensor that the caller or an ATen op sees), "runtime" (whatever tensor an ATen op returned).
    sizes, strides: in elements; for arena values only their product matters.
    offset: byte offset in the arena, for kind "arena".
    """

    kind: str
    name: str
    dtype: torch.dtype
    sizes: tuple[Index, ...] = ()
    strides: tuple[Index, ...] = ()
    offset: Index = 0


@dataclass(frozen=True)
class Operand:
    """A tensor operand of a kernel: `values[value]` from a byte offset on."""

    value: int
    offset: Index = 0


@dataclass(frozen=True)
class KernelCall:
    """One call of `kernels[kernel]`; None is an absent operand. `origin` says which op it computes, for reports."""

    kernel: int
    tensors: tuple[Operand | None, ...]
    ints: tuple[Index, ...]
    floats: tuple[float, ...]
    sync_after: bool
    origin: str


@dataclass(frozen=True)
class View:
    """A strided look at a value, for ATen ops and results: offset, sizes and strides in elements."""

    value: int
    offset: Index
    sizes: tuple[Index, ...]
    strides: tuple[Index, ...]


@dataclass(frozen=True)
class Size:
    """A number that depends on sizes, for ATen ops and results."""

    index: Index


@dataclass(frozen=True)
class AtenCall:
    """An op without a kernel, run by PyTorch.

    values: for each element of the result (one if it is no tuple) its position in the program's values, or -1.
    reason: why no kernel computes it.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: tuple[int, ...]
    reason: str
    location: str | None = None


@dataclass(frozen=True)
class SymbolSource:
    """Where the value of a symbol comes from: dimension `dim` of input `index`, or the integer input itself (-1)."""

    name: str
    index: int
    dim: int


@dataclass
class Program:
    """A compiled graph.

    inputs: positions in `values` of the arguments, None for an argument that is a number.
    weights: positions in `values` of the weights, in the order in which they are bound.
    steps: kernel calls and ATen calls, in order; neighbouring kernel calls run as one native call.
    results: what the call returns: a View, a Size, or a constant that stands for itself.
    mutations: (argument, view of its new value) for arguments that the caller's code writes to.
    arena_bytes: size of the memory that a call needs besides its results.
    batch_invariant: whether kernels are compiled so that a row's result has, to the bit, nothing to do with other rows.
    target: the kind of device that it runs on, "cpu" or "cuda".
    """

    symbols: list[SymbolSource]
    values: list[Value]
    inputs: list[int | None]
    weights: list[int]
    kernels: list[KernelSpec]
    steps: list[KernelCall | AtenCall]
    results: list[Any]
    mutations: list[tuple[int, View]] = field(default_factory=list)
    arena_bytes: Index = 0
    batch_invariant: bool = False
    target: str = "cpu"

    @property
    def fallbacks(self) -> list[AtenCall]:
        """The ops that no kernel covers."""
        return [step for step in self.steps if isinstance(step, AtenCall)]
