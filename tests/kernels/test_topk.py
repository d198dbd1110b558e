"""topk and softmax of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

TOLERANCE = {torch.float32: (3e-6, 1e-9), torch.bfloat16: (4e-3, 1e-7), torch.float16: (6e-4, 6e-8)}


def topk(
    x: torch.Tensor, k: int, threads: int = 2, variant: str = "host", in_order: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    values, indices = torch.empty(rows, k, dtype=x.dtype), torch.empty(rows, k, dtype=torch.int64)
    sizes = [rows, cols, k, x.stride(0), int(in_order)]
    run_kernel("topk.h", f"topk<{CPP_TYPE[x.dtype]}>", [x, values, indices], sizes, threads=threads, variant=variant)
    return values, indices


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_topk(dtype: torch.dtype, variant: str) -> None:
    for rows, cols, threads in itertools.product((1, 3), (1, 9, 100, 5003), (1, 2)):
        x = torch.randn(rows, cols + 3).to(dtype)[:, :cols]
        for k in sorted({1, min(cols, 2), min(cols, 50), cols}):
            values, indices = topk(x, k, threads, variant)
            assert torch.equal(values, x.topk(k).values)
            assert torch.equal(x.gather(1, indices), values)
            assert torch.equal(indices, x.topk(k).indices), "the same of several equal values as PyTorch takes"
            assert torch.equal(topk(x, k, threads, variant, False)[1], x.topk(k, sorted=False).indices)


@pytest.mark.parametrize("seed", range(8))
def test_equal_values_are_chosen_as_pytorch_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for cols, k, kinds in itertools.product((3, 8, 33, 200, 1000), (1, 2, 5, 8), (2, 3, 20, 100)):
        if k <= cols:
            x = torch.randint(0, kinds, (5, cols), generator=generator).float()
            x[x == 0] = float("-inf")
            assert torch.equal(topk(x, k)[1], x.topk(k).indices)


def test_none_of_each_row() -> None:
    """The indices may have no memory then."""
    values, indices = topk(torch.randn(3, 20), 0)
    assert values.shape == indices.shape == (3, 0)


def test_values_may_be_left_out() -> None:
    x, indices = torch.randn(3, 20), torch.empty(3, 4, dtype=torch.int64)
    run_kernel("topk.h", "topk<float>", [x, None, indices], [3, 20, 4, 20, 1])
    assert torch.equal(indices, x.topk(4).indices)


def test_topk_orders_nan_infinities_and_zeros() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, nan, -inf, inf, 1.0, nan, -1.0, inf, -0.0, 0.0, 5e-45, -5e-45]])
    for k in range(1, 14):
        assert torch.equal(topk(x, k)[1], x.topk(k).indices)
    later = torch.zeros(1, 100)
    later[0, 77] = nan
    assert torch.equal(topk(later, 2)[1], later.topk(2).indices)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_softmax(dtype: torch.dtype, variant: str) -> None:
    for (rows, cols), threads, out_type in itertools.product(
        ((1, 1), (1, 7), (5, 64), (3, 1003)), (1, 2), dict.fromkeys((dtype, torch.float32))
    ):
        x = (torch.randn(rows, cols + 1) * 5).to(dtype)[:, :cols]
        out = torch.zeros(rows, cols + 2, dtype=out_type)
        run_kernel("topk.h", f"softmax<{CPP_TYPE[dtype]}, {CPP_TYPE[out_type]}>", [x, out],
                   [rows, cols, x.stride(0), out.stride(0)], threads=threads, variant=variant)  # fmt: skip
        rtol, atol = TOLERANCE[out_type]
        torch.testing.assert_close(out[:, :cols].double(), x.double().softmax(-1), rtol=rtol, atol=atol)
        assert not out[:, cols:].any(), "wrote past the row"


def test_softmax_of_infinities_is_pytorchs() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1e4, -1e4, 0.0], [-inf, 2.0, 2.0], [-inf, -inf, -inf], [inf, 0.0, 0.0], [nan, 0.0, 1.0]])
    out = torch.empty_like(x)
    run_kernel("topk.h", "softmax<float, float>", [x, out], [5, 3, 3, 3])
    torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)
