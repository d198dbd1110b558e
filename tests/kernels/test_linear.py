"""linear.h against a float64 product, on fresh random inputs.

The bound is the textbook one for a sum of K products in float32, gamma_K * (|x| @ |W|^T + |b|), plus half a unit in the
last place of the type that is stored: no kernel that sums in float32 and rounds once can exceed it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half the distance between neighbours, relative: what one rounding costs; and the smallest normal number, below which
# it is absolute.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


def run_linear(
    x: torch.Tensor,
    segments: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    out_dtype: torch.dtype | None = None,
    out_stride: int | None = None,
    threads: int = 2,
    variant: str = "host",
) -> torch.Tensor:
    rows, k = x.shape
    total = sum(w.shape[0] for w, _ in segments)
    out_dtype = out_dtype or x.dtype
    out = torch.full((rows, out_stride or total), float("nan"), dtype=out_dtype)
    types = CPP_TYPE[x.dtype] if out_dtype == x.dtype else f"{CPP_TYPE[x.dtype]}, {CPP_TYPE[out_dtype]}"
    run_kernel(
        "linear.h",
        f"linear<{types}>",
        [x, out, *itertools.chain.from_iterable(segments)],
        [rows, k, x.stride(0), out.stride(0), len(segments), *(w.shape[0] for w, _ in segments)],
        threads=threads,
        variant=variant,
    )
    assert out[:, total:].isnan().all(), "wrote beyond the row"
    return out[:, :total]


def check(x: torch.Tensor, segments: Sequence[tuple[torch.Tensor, torch.Tensor | None]], out: torch.Tensor) -> None:
    weight = torch.cat([w for w, _ in segments]).double()
    bias = torch.cat([torch.zeros(w.shape[0]) if b is None else b for w, b in segments]).double()
    expected = x.double() @ weight.T + bias
    magnitude = x.double().abs() @ weight.abs().T + bias.abs()
    bound = (x.shape[1] + 8) * 2.0**-24 * magnitude
    bound += HALF_ULP[out.dtype] * (expected.abs() + bound).clamp_min(TINY[out.dtype])
    excess = ((out.double() - expected).abs() - bound).max()
    assert excess <= 0, f"{tuple(x.shape)} x {tuple(weight.shape)}: {excess} over the bound"


def sample(
    rows: int, k: int, sizes: Sequence[int], dtype: torch.dtype, bias: Sequence[bool], slack: int = 0
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor | None]]]:
    x = torch.randn(rows, k + slack).to(dtype)[:, :k]
    segments = [
        (torch.randn(n, k).to(dtype), torch.randn(n).to(dtype) if has else None)
        for n, has in zip(sizes, bias, strict=True)
    ]
    return x, segments


@pytest.mark.parametrize("variant", ["host", "portable", "avx512_bf16_emulated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_count_and_depth(dtype: torch.dtype, variant: str) -> None:
    # Both regimes, every size of the last tile, every remainder of K by a vector and by a pair.
    for rows, k in itertools.product([*range(1, 41), *range(65, 78), 300], [1, 3, 7, 32, 100, 257]):
        n = [1, 5, 17, 33, 130][(rows + k) % 5]
        x, segments = sample(rows, k, [n], dtype, [rows % 2 == 0], slack=rows % 3)
        check(x, segments, run_linear(x, segments, out_stride=n + k % 4, threads=1 + rows % 2, variant=variant))


@pytest.mark.parametrize("variant", ["host", "avx512_bf16_emulated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 13, 37, 71, 600])
def test_segments(dtype: torch.dtype, variant: str, rows: int) -> None:
    for sizes in ([1], [5, 17], [33, 1, 130], [64, 16, 16], [3] * 9):
        for k, threads in ((31, 1), (600, 2)):
            x, segments = sample(rows, k, sizes, dtype, [i % 2 == 0 for i in range(len(sizes))], slack=5)
            check(x, segments, run_linear(x, segments, threads=threads, variant=variant))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_float_output_is_not_rounded(dtype: torch.dtype, rows: int) -> None:
    x, segments = sample(rows, 70, [21, 40], dtype, [True, False])
    out = run_linear(x, segments, out_dtype=torch.float32)
    check(x, segments, out)
    assert not torch.equal(out.to(dtype).float(), out)


@pytest.mark.parametrize("variant", ["host", "avx512_bf16_emulated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads_or_neighbours(dtype: torch.dtype, variant: str) -> None:
    for rows in (6, 150):
        x, segments = sample(rows, 999, [70, 9], dtype, [True, False])
        whole = run_linear(x, segments, threads=2, variant=variant)
        assert torch.equal(whole, run_linear(x, segments, threads=1, variant=variant))
        half = rows // 2
        assert torch.equal(whole[half:], run_linear(x[half:], segments, threads=2, variant=variant))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 29])
def test_not_finite_numbers_stay_where_they_are(dtype: torch.dtype, rows: int) -> None:
    x, segments = sample(rows, 45, [23], dtype, [True])
    weight, bias = segments[0]
    assert bias is not None
    weight[4, 44] = float("inf")
    weight[9, 0] = float("nan")
    bias[20] = float("-inf")
    x[rows - 1, 3] = float("nan")
    out = run_linear(x, segments)
    expected = x.double() @ weight.double().T + bias.double()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert torch.equal(out[out.isinf()].double(), expected[expected.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_weights(dtype: torch.dtype) -> None:
    k, n = 77, 19
    storage = torch.randn(n * k + 1).to(dtype)
    weight = storage[1:].view(n, k)
    for rows in (1, 20):
        x, _ = sample(rows, k, [], dtype, [])
        check(x, [(weight, None)], run_linear(x, [(weight, None)]))


def test_rows_too_long_for_scratch() -> None:
    # One staged row alone would overflow the worker's scratch.
    k = (4 << 20) // 4 + 3
    x, segments = sample(2, k, [3], torch.float32, [True])
    check(x, segments, run_linear(x, segments))


def test_more_panels_than_fit_in_scratch() -> None:
    x, segments = sample(550, 300, [1700, 1000], torch.float32, [True, False])
    check(x, segments, run_linear(x, segments, threads=1))


def test_more_workers_than_work() -> None:
    for rows in (1, 30, 70):
        x, segments = sample(rows, 40, [3], torch.float32, [True])
        check(x, segments, run_linear(x, segments, threads=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_sum_is_the_bias(dtype: torch.dtype) -> None:
    for rows, threads in itertools.product((1, 5, 70, 600), (1, 2)):
        x, segments = sample(rows, 0, (7, 19), dtype, (True, False))
        bias = segments[0][1]
        assert bias is not None
        expected = torch.cat((bias, torch.zeros(19, dtype=dtype))).expand(rows, 26)
        assert torch.equal(run_linear(x, segments, threads=threads), expected)
