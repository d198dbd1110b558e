"""The formats of a quantized KV cache: bytes by hand, error bounds, rows that cannot be stored, and pages."""

from __future__ import annotations

import pytest
import torch

from llmopt.compiler.kv_formats import (
    KV_CACHE_DTYPES,
    code_bytes,
    dequantize_rows,
    hadamard,
    load_pages,
    quantize_rows,
    rotation_block,
    row_bytes,
    store_rows,
)
from llmopt.compiler.step import CacheSpec

FORMATS = [name for name in KV_CACHE_DTYPES if name != "auto"]
SIZES = (1, 2, 17, 24, 32, 64, 80, 96, 128)


def test_int8_by_hand() -> None:
    codes, scale = quantize_rows(torch.tensor([12.7, -12.7, 0.26, 0.0]), "int8")
    assert scale.item() == torch.tensor(0.1).bfloat16().item()
    assert codes.view(torch.int8).tolist() == [127, -127, 3, 0]


def test_fp8_by_hand() -> None:
    codes, scale = quantize_rows(torch.tensor([448.0, -448.0, 1.0, 0.0, 2**-9]), "fp8")
    assert scale.item() == 1.0
    assert codes.tolist() == [0x7E, 0xFE, 0x38, 0x00, 0x01]


def test_int4_by_hand() -> None:
    """Odd sizes are not rotated, so the levels show: element i and i + 16 share a byte, the row is padded to 32."""
    row = torch.arange(17.0)
    row[16] = 15.0
    codes, parameters = quantize_rows(row, "int4")
    assert parameters.tolist() == [1.0, 0.0]
    assert codes.tolist() == [0xF0, *range(1, 16)]


def test_rotation_is_its_own_inverse_but_for_a_factor() -> None:
    for size in SIZES:
        x = torch.randn(3, size, dtype=torch.float64)
        torch.testing.assert_close(hadamard(hadamard(x)), x * rotation_block(size))
    block = hadamard(torch.eye(8, dtype=torch.float64))
    assert block.abs().eq(1).all() and torch.equal(block, block.T)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_half_a_step(name: str, size: int) -> None:
    x = torch.randn(50, size) * torch.logspace(-6, 6, 50)[:, None] + torch.randn(50, 1)
    codes, parameters = quantize_rows(x, name)
    assert codes.dtype == torch.uint8 and codes.shape == (50, code_bytes(name, size))
    assert codes.shape[-1] + 2 * parameters.shape[-1] == row_bytes(name, size)
    error = (dequantize_rows(codes, parameters, name, size) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    if name == "int8":
        bound = largest * (0.5 / 127 + 2**-8)
        assert (error <= largest / 127 * 0.51).float().mean() > 0.99
    elif name == "fp8":
        bound = torch.maximum(x.abs() * 2**-4, largest * 2**-18) + largest * 2**-8
        assert (error <= torch.maximum(x.abs() * 2**-4, largest * 2**-18) * 1.01).float().mean() > 0.99
    else:  # the levels are those of the rotated row; its least value is rounded
        turned = hadamard(x)
        step = (turned.amax(-1, keepdim=True) - turned.amin(-1, keepdim=True)) / 15
        levels = step / 2 + turned.abs().amax(-1, keepdim=True) * 2**-8
        assert (error.square().mean(-1, keepdim=True).sqrt() <= levels / rotation_block(size) ** 0.5 * 1.01).all()
        bound = levels
    assert (error <= bound).all()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_are_not_finite_are_stored_as_nan(name: str) -> None:
    x = torch.randn(4, 32)
    x[0, 3], x[1, 5], x[2, 7] = torch.nan, torch.inf, -torch.inf
    codes, parameters = quantize_rows(x, name)
    back = dequantize_rows(codes, parameters, name, 32)
    assert back[:3].isnan().all() and back[3].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_zero_is_stored_exactly(name: str) -> None:
    codes, parameters = quantize_rows(torch.zeros(2, 64), name)
    assert not dequantize_rows(codes, parameters, name, 64).any()


def test_one_large_channel_does_not_ruin_int4() -> None:
    """What the rotation is for: without it, the other channels would all fall on one level or two."""
    x = torch.randn(200, 64)
    x[:, 11] = 30.0
    others = [i for i in range(64) if i != 11]
    error = (dequantize_rows(*quantize_rows(x, "int4"), "int4", 64) - x)[:, others].square().mean().sqrt()
    assert error < 0.5 < 30 / 15 / 12**0.5


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_pages_keep_what_is_stored_around_a_new_row(name: str) -> None:
    groups, block_size, size = 3, 5, 24
    width = size if name == "auto" else row_bytes(name, size)
    cache = torch.zeros(4, groups, block_size, width, dtype=torch.float32 if name == "auto" else torch.uint8)
    rows = torch.randn(20, groups, size)
    for slot in torch.randperm(20):
        store_rows(cache, slot[None] // block_size, slot[None] % block_size, rows[slot][None], name)
    back = load_pages(cache, torch.arange(4), name, size)
    if name == "auto":
        assert torch.equal(back, rows)
    else:
        assert torch.equal(back, dequantize_rows(*quantize_rows(rows, name), name, size))


def test_how_many_tokens_fit() -> None:
    specs = {name: CacheSpec(0, 8, 64, 64, torch.bfloat16, 0, name) for name in KV_CACHE_DTYPES}
    tokens = {name: (1 << 30) // spec.bytes_per_token() for name, spec in specs.items()}
    assert tokens["int8"] >= 1.9 * tokens["auto"] and tokens["fp8"] == tokens["int8"]
    assert tokens["int4"] >= 3.5 * tokens["auto"]
    assert specs["int4"].bytes_per_token() == 8 * 2 * 36
    assert {s.storage_dtype for s in specs.values()} == {torch.bfloat16, torch.uint8}
