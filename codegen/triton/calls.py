"""A kernel call with real operands, as the functions that choose its launches see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.triton.launch import Device

# Argument token of a kernel specification -> name in kernels/functions.py.
ACTIVATIONS = {
    "llmopt::Silu": "silu",
    "llmopt::GeluErf": "gelu_erf",
    "llmopt::GeluTanh": "gelu_tanh",
    "llmopt::Relu": "relu",
}


@dataclass(frozen=True)
class Call:
    """One call: operands, ints and floats in the order that the template's planner gives them.

    With an epilogue its buffers, without the product, come before the operands, and its symbols before the ints.
    """

    template: str
    arguments: tuple[str, ...]
    tensors: tuple[Any, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    status: torch.Tensor
    device: Device
    epilogue: LoopKernel | None = None

    def present(self, *tensors: Any) -> tuple[Any, ...]:
        """The tensors with absent ones replaced by `status`, which no kernel reads: Triton wants a pointer."""
        return tuple(self.status if t is None else t for t in tensors)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power(size: int, least: int = 1) -> int:
    """The power of two that holds `size` elements, and at least `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def precision(tensor: torch.Tensor) -> str:
    """PRECISION of a kernel's products: float32 stays float32, for tf32 would lose more than half of the digits."""
    if tensor.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "wide"
    return "ieee"
