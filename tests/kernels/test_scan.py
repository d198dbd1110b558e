"""cumsum of rows."""

from __future__ import annotations

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel

CPP = {**CPP_TYPE, torch.int64: "std::int64_t", torch.int32: "std::int32_t", torch.bool: "bool"}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.int64, torch.int64),
        (torch.int32, torch.int64),
        (torch.bool, torch.int64),
        (torch.int64, torch.int32),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_cumsum(source: torch.dtype, target: torch.dtype) -> None:
    for rows, cols, threads in [(1, 1, 1), (3, 17, 2), (5, 300, 2)]:
        x = (torch.randn(rows, cols + 2) * 3).to(source)[:, 1 : cols + 1]
        out = torch.zeros(rows, cols + 1, dtype=target)
        run_kernel(
            "scan.h", f"cumsum<{CPP[source]}, {CPP[target]}>", [x, out], [rows, cols, x.stride(0), cols + 1],
            threads=threads,
        )  # fmt: skip
        torch.testing.assert_close(out[:, :cols], x.cumsum(-1, dtype=target))
        assert not out[:, cols].any(), "wrote past the row"
