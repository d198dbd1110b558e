"""Runs one kernel instance on tensors, without a graph: what the tests of the C++ templates stand on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from llmopt.codegen.cpu.native import ABSENT, PUSH, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.toolchain import LEVELS, InstructionSet, build_library, host_level

CPP_TYPE = {torch.float32: "float", torch.bfloat16: "llmopt::bf16", torch.float16: "llmopt::f16"}

# What can be run here: the host's own level, the portable code, and the AVX-512 paths on emulated vectors.
VARIANTS: dict[str, tuple[InstructionSet, dict[str, int]]] = {
    "host": (host_level(), {}),
    "portable": (LEVELS[-1], {}),
    "avx512_bf16_emulated": (host_level(), {"LLMOPT_VECTOR_BYTES": 64, "LLMOPT_BF16_DOT": 1}),
}


def run_kernel(
    header: str,
    call: str,
    tensors: Sequence[torch.Tensor | None],
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    *,
    threads: int = 2,
    variant: str = "host",
    defines: Mapping[str, int] | None = None,
) -> None:
    """Calls `llmopt::{call}(args, worker)` from `header` on the given operands, in place.

    Example: `run_kernel("linear.h", "linear<float>", [x, out, weight, None], [rows, k, ...])`.
    """
    absent = [t is None for t in tensors]
    plan_for(header, call, len(tensors), ints, floats, variant, absent, defines).run(
        [t.data_ptr() if t is not None else 0 for t in tensors], [], threads
    )


def plan_for(
    header: str,
    call: str,
    num_tensors: int,
    ints: Sequence[int],
    floats: Sequence[float],
    variant: str = "host",
    absent: Sequence[bool] | None = None,
    extra_defines: Mapping[str, int] | None = None,
) -> NativePlan:
    """The encoded call of `run_kernel`, for timing loops that must not compile or encode anew."""
    entry = "k_" + hashlib.sha256(f"{header}{call}".encode()).hexdigest()[:16]
    source = f'#include "{header}"\nLLMOPT_KERNEL({entry}) {{ llmopt::{call}(args, worker); }}\n'
    level, defines = VARIANTS[variant]
    library = build_library([source], level, {**defines, **(extra_defines or {})})
    absent = absent or [False] * num_tensors
    operands = tuple(ABSENT if gone else TensorOperand(i) for i, gone in enumerate(absent))
    native = NativeCall(entry, operands, tuple((PUSH, int(i)) for i in ints), tuple(map(float, floats)))
    return NativePlan(library, [native])
