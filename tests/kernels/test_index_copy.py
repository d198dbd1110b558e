"""index_copy along a middle dimension."""

from __future__ import annotations

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel

from llmopt.codegen.cpu.native import KernelError


def index_copy(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, threads: int = 2) -> torch.Tensor:
    out = torch.zeros_like(x)
    outer, n, inner = x.shape
    run_kernel("index_copy.h", f"index_copy<{CPP_TYPE[x.dtype]}>", [x, index, source, out],
               [outer, n, inner, len(index)], threads=threads)  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_index_copy(dtype: torch.dtype) -> None:
    for outer, n, inner, m, threads in [(1, 1, 1, 1, 1), (5, 17, 3, 4, 2), (2, 9, 16, 9, 2), (3, 4, 8, 0, 1)]:
        x, source = torch.randn(outer, n, inner).to(dtype), torch.randn(outer, m, inner).to(dtype)
        index = torch.randperm(n)[:m]
        assert torch.equal(index_copy(x, index, source, threads), x.index_copy(1, index, source))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_outside_is_an_error(wrong: int) -> None:
    with pytest.raises(KernelError):
        index_copy(torch.zeros(2, 4, 3), torch.tensor([0, wrong]), torch.zeros(2, 2, 3))
