"""Products with epilogues as Triton kernels, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu.devices import interpreted, lower_for_cuda
from kernels.loop_programs import trace

from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)

Tensor = torch.Tensor
EPILOGUES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "residual": lambda y, x, row: x[..., :1] + y,
    "silu": lambda y, x, row: F.silu(y),
    "factors and a cast": lambda y, x, row: (y * row - 1).to(torch.float64),
    "only stored": lambda y, x, row: torch.where(row > 0, y, y),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 40), (4, 40), (5, 40), (70, 33), (3, 2100)])
def test_an_epilogue(name: str, dtype: torch.dtype, rows: int, k: int) -> None:
    epilogue = EPILOGUES[name]

    def function(x: Tensor, w: Tensor, other: Tensor, b: Tensor, row: Tensor) -> list[Tensor]:
        y: Any = torch.ops.llmopt.linear(x, [w, other], [b, None])
        return [epilogue(y, x, row)]

    sizes = ((1, rows, k), (37, k), (20, k), (37,), (57,))
    inputs = [(torch.randn(size) / (k**0.5 if len(size) == 2 else 1)).to(dtype) for size in sizes]
    lowered = lower_for_cuda(trace(function, *inputs, static=[-1, -2]).graph)
    (kernel,) = lowered.program.kernels
    assert kernel.product is not None and not lowered.program.fallbacks
    near = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(interpreted(lowered, inputs), function(*inputs), rtol=near, atol=near)


def test_more_weights_than_a_kernel_takes_stay_without() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        return [torch.ops.llmopt.linear(x, [w] * 4, [None] * 4) * 2]

    inputs = [torch.randn(1, 3, 8), torch.randn(5, 8)]
    lowered = lower_for_cuda(trace(function, *inputs, static=[-1, -2]).graph)
    assert [kernel.template for kernel in lowered.program.kernels] == ["linear", "loop"]
    assert any("3 weights at once" in reason for reason in lowered.selection.rejected.values())
    torch.testing.assert_close(interpreted(lowered, inputs), function(*inputs), rtol=1e-5, atol=1e-5)
