"""The largest element of each row: the first of equals, NaN above all, whoever searches which part."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.largest import largest_kernel
from llmopt.runtime.sampling import blocks


def largest(x: torch.Tensor, threads: int = 2, variant: str = "host") -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    values, places = torch.full((rows,), 5e30), torch.full((rows,), -7)
    sizes = [rows, cols, x.stride(0)]
    run_kernel(
        "largest.h", f"largest<{CPP_TYPE[x.dtype]}>", [x, values, places], sizes, threads=threads, variant=variant
    )
    return values, places


def first_largest(x: torch.Tensor) -> tuple[list[float], list[int]]:
    """By Python, element by element."""
    values, places = [], []
    for row in x.double().tolist():
        place = next((i for i, value in enumerate(row) if value != value), None)
        places.append(row.index(max(row)) if place is None else place)
        values.append(row[places[-1]])
    return values, places


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_largest(dtype: torch.dtype, variant: str) -> None:
    shapes = itertools.product((1, 2, 3, 7), (1, 5, 31, 1023, 1024, 1025, 5003), (1, 2, 3))
    for rows, cols, threads in shapes:
        x = torch.randn(rows, cols + 3).to(dtype)
        x[:, cols:] = 1e4  # beyond the row
        values, places = largest(x[:, :cols], threads, variant)
        assert (values.tolist(), places.tolist()) == first_largest(x[:, :cols])


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_equal_ones_infinities_and_nan(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    generator = torch.Generator().manual_seed(1)
    for trial in range(60):
        cols = int(torch.randint(1, 5000, (1,), generator=generator))
        x = -torch.rand(3, cols, generator=generator).to(dtype) - 1
        for row, number in itertools.product(range(3), range(4)):
            place = int(torch.randint(0, cols, (1,), generator=generator))
            x[row, place] = [-0.0, 0.0, 7.0, 7.0, inf, inf, -inf, nan, nan][(trial + row * number) % 9]
        if trial % 10 == 0:
            x[0] = -inf
        if trial % 10 == 1:
            x[1] = nan
        expected = [[nan_to_text(v) for v in first_largest(x)[0]], first_largest(x)[1]]
        for threads in (1, 2, 3):
            values, places = largest(x, threads)
            assert [[nan_to_text(v) for v in values.tolist()], places.tolist()] == expected


def nan_to_text(value: float) -> float | str:
    return "nan" if value != value else value


def test_a_nan_with_a_sign() -> None:
    for dtype, bits in ((torch.bfloat16, -0x40), (torch.float16, -0x200)):
        x = torch.randn(2, 3000).to(dtype)
        x.view(torch.int16)[1, 1777] = bits
        values, places = largest(x)
        assert values.isnan().tolist() == [False, True] and places[1] == 1777


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_outside_of_a_program(dtype: torch.dtype) -> None:
    kernel = largest_kernel(dtype)
    assert kernel is not None
    for rows, cols in ((1, 1), (40, 33), (3, 128256), (17, 5000)):
        x = torch.randn(rows, cols + 5).to(dtype)
        assert kernel(x.data_ptr(), rows, cols, x.stride(0)) == first_largest(x[:, :cols])
        assert blocks.largest_numbers(x, cols) == first_largest(x[:, :cols])


def test_where_there_is_none() -> None:
    assert largest_kernel(torch.float64) is None
    x = torch.randn(4, 6)
    assert blocks.largest_numbers(x.t(), 4) is None
    assert blocks.largest_numbers(x.to("meta"), 6) is None
    values, places = blocks.largest(x.t())
    assert (values.tolist(), places.tolist()) == first_largest(x.t())
