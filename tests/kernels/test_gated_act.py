"""gated_act against float64, rounded where eager rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel
from torch.nn import functional as F

ACTIVATIONS = {
    "Silu": F.silu,
    "GeluErf": F.gelu,
    "GeluTanh": lambda x: F.gelu(x, approximate="tanh"),
    "Relu": F.relu,
}
# One unit of the type for the result and one where the rounding of act(gate) falls the other way.
TOLERANCE = {torch.float32: (3e-6, 3e-6), torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (2e-3, 1e-5)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act(dtype: torch.dtype, activation: str, variant: str) -> None:
    for rows, cols, threads in itertools.product((1, 2, 5), (1, 33, 200, 1024), (1, 2)):
        merged = (torch.randn(rows, 2 * cols + 1) * 3).to(dtype)
        gate, up = merged[:, :cols], merged[:, cols : 2 * cols]
        out = torch.zeros(rows, cols + 2, dtype=dtype)
        run_kernel("gated_act.h", f"gated_act<{CPP_TYPE[dtype]}, llmopt::{activation}>", [gate, up, out],
                   [rows, cols, gate.stride(0), up.stride(0), out.stride(0)], threads=threads,
                   variant=variant)  # fmt: skip
        expected = ACTIVATIONS[activation](gate.double()).to(dtype).double() * up.double()
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(out[:, :cols].double(), expected, rtol=rtol, atol=atol)
        assert not out[:, cols:].any(), "wrote past the row"


def test_rounds_the_activation_before_the_product() -> None:
    gate, up = torch.randn(64, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    out = torch.empty_like(gate)
    run_kernel("gated_act.h", "gated_act<llmopt::bf16, llmopt::Silu>", [gate, up, out], [64, 512, 512, 512, 512])
    twice, once = F.silu(gate.double()).bfloat16() * up, (F.silu(gate.double()) * up.double()).bfloat16()
    assert (out == twice).double().mean() > 0.99
    assert (out == once).double().mean() < 0.9
