"""rms_norm and layer_norm against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

DTYPES = list(CPP_TYPE)
# Rounding of the result (and, CastFirst, of the product before it): two units in the last place of the type.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1.6e-2, 1e-6), torch.float16: (2e-3, 1e-6)}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def summed(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x if residual is None else (x.float() + residual.float()).to(x.dtype)


def rms_reference(s: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: bool) -> torch.Tensor:
    y = s.double() * torch.rsqrt(s.double().pow(2).mean(-1, keepdim=True) + eps)
    if cast:
        y = y.to(s.dtype).double()
    return (y * (weight.double() + offset) if weight is not None else y).to(s.dtype)


def strides(t: torch.Tensor) -> list[int]:
    return [t.stride(0), t.stride(1)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast_first", [True, False])
def test_rms_norm(dtype: torch.dtype, cast_first: bool, variant: str) -> None:
    call = f"rms_norm<{CPP_TYPE[dtype]}, {CPP_TYPE[dtype]}, {str(cast_first).lower()}>"
    shapes = [(1, 1, 1), (1, 1, 2048), (3, 1, 7), (5, 3, 65), (2, 4, 129)]
    for (outer, inner, cols), threads, with_residual in itertools.product(shapes, (1, 2), (False, True)):
        offset = 0.0 if cast_first else 1.0
        # A slice of a wider tensor, as the heads of a merged QKV projection are.
        x = torch.randn(outer, inner + 1, cols + 3)[:, 1:, :cols].mul(3).to(dtype).contiguous()
        wide = torch.zeros(outer, inner + 2, cols + 5, dtype=dtype)
        wide[:, 1:-1, :cols] = x
        view = wide[:, 1:-1, :cols]
        residual = torch.randn(outer * inner, cols).to(dtype) if with_residual else None
        residual_out = torch.empty(outer * inner, cols, dtype=dtype) if with_residual else None
        weight = torch.randn(cols).to(dtype)
        out = torch.zeros(outer, inner, cols + 1, dtype=dtype)
        ints = [outer, inner, cols, *strides(view), *strides(out)]
        tensors = [view, residual, weight, out, residual_out]
        run_kernel("norm.h", call, tensors, ints, [1e-5, offset], threads=threads, variant=variant)
        s = summed(x.reshape(-1, cols), residual)
        expected = rms_reference(s, weight, 1e-5, offset, cast_first).view(outer, inner, cols)
        assert_near(out[..., :cols], expected, dtype)
        assert not out[..., cols:].any(), "wrote past the row"
        if residual_out is not None:
            assert torch.equal(residual_out, s)


def test_rms_norm_cast_first_rounds_twice() -> None:
    """The two orders of rounding are different functions, and each is matched to the bit where float64 decides."""
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    results = {}
    for cast in (True, False):
        out = torch.empty_like(x)
        call = f"rms_norm<llmopt::bf16, llmopt::bf16, {str(cast).lower()}>"
        run_kernel("norm.h", call, [x, None, weight, out, None], [64, 1, 256, 256, 0, 256, 0], [1e-6, 0.0])
        results[cast] = out
        assert (out == rms_reference(x, weight, 1e-6, 0.0, cast)).double().mean() > 0.99
    assert not torch.equal(results[True], results[False])


def test_rms_norm_in_place_without_weight() -> None:
    x = torch.randn(3, 33)
    residual = torch.randn(3, 33)
    expected = rms_reference(x + residual, None, 1e-5, 0.0, False)
    stored = x + residual
    run_kernel("norm.h", "rms_norm<float, float, false>", [x, residual, None, x, residual], [3, 1, 33, 33, 0, 33, 0],
               [1e-5, 0.0])  # fmt: skip
    assert_near(x, expected, torch.float32)
    assert torch.equal(residual, stored)


def test_rms_norm_residual_without_residual_out() -> None:
    x, residual = torch.randn(2, 3, 17).bfloat16(), torch.randn(6, 17).bfloat16()
    out = torch.empty_like(x)
    run_kernel("norm.h", "rms_norm<llmopt::bf16, float, false>", [x, residual, torch.ones(17), out, None],
               [2, 3, 17, 51, 17, 51, 17], [1e-5, 0.5])  # fmt: skip
    expected = rms_reference(summed(x.view(6, 17), residual), torch.ones(17), 1e-5, 0.5, False)
    assert_near(out.view(6, 17), expected, torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype: torch.dtype, variant: str) -> None:
    call = f"layer_norm<{CPP_TYPE[dtype]}, float>"
    for rows, cols, threads in itertools.product((1, 5), (1, 7, 64, 2049), (1, 2)):
        x, residual = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
        for operand, weight, bias in itertools.product(
            (None, residual), (None, torch.randn(cols)), (None, torch.randn(cols))
        ):
            out, residual_out = torch.empty_like(x), torch.empty_like(x) if operand is not None else None
            tensors = [x, operand, weight, bias, out, residual_out]
            ints = [rows, 1, cols, cols, 0, cols, 0]
            run_kernel("norm.h", call, tensors, ints, [1e-5, 0.0], threads=threads, variant=variant)
            s = summed(x, operand)
            expected = torch.nn.functional.layer_norm(
                s.double(),
                (cols,),
                None if weight is None else weight.double(),
                None if bias is None else bias.double(),
                1e-5,
            )
            rtol, atol = TOLERANCE[dtype]
            # Cancellation against the bias leaves an error of the size of the terms, not of their sum.
            torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=max(atol, 5e-6))
            if residual_out is not None:
                assert torch.equal(residual_out, s)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_norm_far_from_zero(variant: str) -> None:
    """Rows around 1000 with a spread of 1: the naive E[x^2] - E[x]^2 in float32 is wrong in the second digit here."""
    x = 1000 + torch.randn(4, 4097)
    naive = (x.pow(2).mean(-1) - x.mean(-1).pow(2)).double()
    exact = x.double().var(-1, unbiased=False)
    assert (naive - exact).abs().max() > 1e-2, "the input does not provoke the cancellation"
    out = torch.empty_like(x)
    run_kernel("norm.h", "layer_norm<float, float>", [x, None, None, None, out, None], [4, 1, 4097, 4097, 0, 4097, 0],
               [1e-5, 0.0], variant=variant)  # fmt: skip
    expected = torch.nn.functional.layer_norm(x.double(), (4097,))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_threads() -> None:
    x = torch.randn(7, 1023)
    outs = []
    for threads in (1, 2):
        out = torch.empty_like(x)
        run_kernel("norm.h", "layer_norm<float, float>", [x, None, None, None, out, None],
                   [7, 1, 1023, 1023, 0, 1023, 0], [1e-5, 0.0], threads=threads)  # fmt: skip
        outs.append(out)
    assert torch.equal(*outs)
