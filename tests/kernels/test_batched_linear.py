"""batched_linear.h against float64: batches with shared matrices, strided rows, few and many rows."""

from __future__ import annotations

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

# Sums of k products of order 1 / k, then one rounding to the storage type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# (B0, B1, B2), which of them x and w have, M, N, K
SHAPES = [
    ((1, 1, 1), (1, 1, 1), (1, 1, 1), 3, 5, 7),
    ((1, 2, 3), (1, 2, 3), (1, 2, 3), 1, 9, 64),
    ((2, 3, 2), (2, 1, 2), (1, 3, 1), 50, 19, 33),  # rows enough for gemm
    ((1, 1, 9), (1, 1, 9), (1, 1, 1), 5, 1, 130),
    ((1, 1, 2), (1, 1, 2), (1, 1, 2), 0, 4, 8),
    ((1, 1, 2), (1, 1, 2), (1, 1, 2), 4, 0, 8),
    ((1, 0, 2), (1, 0, 2), (1, 0, 2), 4, 3, 8),
]


def strides(t: torch.Tensor) -> list[int]:
    """Of the batch; 0 where a matrix is shared."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_batched_linear(dtype: torch.dtype, variant: str) -> None:
    for batch, of_x, of_w, m, n, k in SHAPES:
        x = torch.randn(*of_x, m, k + 3).to(dtype)[..., :k]
        w = (torch.randn(*of_w, n, k) / k**0.5).to(dtype)
        out = torch.full((*batch, m, n + 2), float("nan"), dtype=dtype)
        ints = [*batch, m, n, k, *strides(x), *strides(w), *strides(out), x.stride(-2), out.stride(-2)]
        for threads in (1, 2, 3):
            run_kernel("batched_linear.h", f"batched_linear<{CPP_TYPE[dtype]}>", [x, w, out], ints,
                       threads=threads, variant=variant)  # fmt: skip
            expected = x.double() @ w.double().mT
            error = (out[..., :n].double() - expected).abs()
            assert error.numel() == 0 or bool((error <= TOLERANCE[dtype] * (1 + expected.abs())).all())
            assert bool(out[..., n:].isnan().all()), "nothing is written between the rows"
