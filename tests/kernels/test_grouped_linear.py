"""grouped_linear.h against float64: empty groups, few and many rows, rows behind the last group, ends that are none."""

from __future__ import annotations

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError

# Sums of k products of order 1 / k, then one rounding to the storage type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
END_TYPE = {torch.int32: "std::int32_t", torch.int64: "std::int64_t"}

# Rows, ends of the groups, N, K
SHAPES = [
    (7, (2, 2, 7), 5, 33),
    (90, (0, 80, 83), 19, 64),  # rows enough for gemm, and rows behind the last group
    (4, (0, 0), 3, 8),
    (0, (0, 0), 3, 8),
    (3, (3,), 130, 7),
]


def run(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, variant: str, threads: int) -> torch.Tensor:
    groups, n, k = weights.shape
    out = torch.full((x.shape[0], n + 2), float("nan"), dtype=x.dtype)
    run_kernel(
        "grouped_linear.h", f"grouped_linear<{CPP_TYPE[x.dtype]}, {END_TYPE[ends.dtype]}>", [x, weights, ends, out],
        [x.shape[0], k, n, groups, x.stride(0), out.stride(0)], threads=threads, variant=variant,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_grouped_linear(dtype: torch.dtype, variant: str) -> None:
    for number, (rows, ends, n, k) in enumerate(SHAPES):
        x = torch.randn(rows, k + 3).to(dtype)[:, :k]
        weights = (torch.randn(len(ends), n, k) / k**0.5).to(dtype)
        where = torch.tensor(ends, dtype=list(END_TYPE)[number % 2])
        expected = torch.zeros(rows, n, dtype=torch.float64)
        for group, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            expected[begin:end] = x[begin:end].double() @ weights[group].double().mT
        for threads in (1, 2, 3):
            out = run(x, weights, where, variant, threads)
            error = (out[:, :n].double() - expected).abs()
            assert error.numel() == 0 or bool((error <= TOLERANCE[dtype] * (1 + expected.abs())).all())
            assert bool(out[:, n:].isnan().all()), "nothing is written between the rows"


@pytest.mark.parametrize("ends", [(2, 1), (0, 8), (-1, 3)])
def test_ends_are_checked(ends: tuple[int, ...]) -> None:
    x, weights = torch.randn(7, 8), torch.randn(2, 3, 8)
    with pytest.raises(KernelError):
        run(x, weights, torch.tensor(ends), "host", 2)
