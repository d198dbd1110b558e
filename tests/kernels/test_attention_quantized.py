"""Paged attention over quantized pages, against float64 attention over what the pages hold by their reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS
from kernels.test_attention import FEATURES, MIXED, Batch, Rule, assert_near, make_batch, paged_reference, run_paged

from llmopt.codegen.cpu.templates import KV_FORMATS
from llmopt.compiler.kv_formats import dequantize_rows, quantize_rows, row_bytes, store_rows

Tensor = torch.Tensor


def quantized(batch: Batch, name: str) -> Batch:
    """The batch with its keys and values stored in the given format, and as they are read back."""
    block_size = batch.k_cache.shape[2]

    def pages(cache: Tensor, rows: list[Tensor]) -> Tensor:
        blocks, groups, _, size = cache.shape
        # What belongs to no sequence reads as NaN.
        stored = torch.full((blocks, groups, block_size, row_bytes(name, size)), 0xFF, dtype=torch.uint8)
        for table, mine in zip(batch.tables, rows, strict=True):
            place = torch.arange(len(mine))
            store_rows(stored, table[place // block_size].long(), place % block_size, mine, name)
        return stored

    def back(rows: list[Tensor]) -> list[Tensor]:
        return [dequantize_rows(*quantize_rows(x, name), name, x.shape[-1]) for x in rows]

    return replace(
        batch,
        k=back(batch.k),
        v=back(batch.v),
        k_cache=pages(batch.k_cache, batch.k),
        v_cache=pages(batch.v_cache, batch.v),
        kv_dtype=name,
    )


def check(batch: Batch, rule: Rule, threads: int = 2, variant: str = "host") -> None:
    assert_near(run_paged(batch, rule, threads, variant), paged_reference(batch, rule))


# Every dtype on this machine, and the other instruction sets in one of them.
FEWER = [(dtype, "host") for dtype in CPP_TYPE] + [(torch.bfloat16, name) for name in VARIANTS if name != "host"]


@pytest.mark.parametrize(("dtype", "variant"), FEWER, ids=str)
@pytest.mark.parametrize("name", KV_FORMATS)
def test_mixed_batch(name: str, dtype: torch.dtype, variant: str) -> None:
    for heads, groups, dim, v_dim, threads in [(3, 3, 64, 64, 1), (4, 2, 17, 24, 2), (8, 1, 64, 33, 2)]:
        check(quantized(make_batch(MIXED, heads, groups, dim, v_dim, dtype), name), Rule(), threads, variant)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_group_and_head_sizes(name: str) -> None:
    rows = [(1, 130), (2, 75), (33, 33), (4, 6)]
    for heads, groups in [(1, 1), (2, 1), (5, 1), (7, 1), (16, 2)]:
        check(quantized(make_batch(rows, heads, groups, 32, 32, torch.float32), name), Rule())
    for dim, v_dim in [(1, 2), (8, 7), (31, 33), (80, 96), (128, 128), (192, 128), (255, 256), (576, 512)]:
        check(quantized(make_batch(rows, 4, 2, dim, v_dim, torch.float32), name), Rule(scale=dim**-0.5))


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_block_sizes(block_size: int, name: str) -> None:
    rows = [(1, 150), (40, 150), (7, 7)]
    check(quantized(make_batch(rows, 4, 2, 33, 16, torch.bfloat16, block_size), name), Rule())


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, name: str) -> None:
    sequences = [(1, 200), (3, 190), (100, 100), (60, 333), (1, 1)]
    check(quantized(make_batch(sequences, 4, 2, 24, 24, torch.float32), name), FEATURES[feature])


@pytest.mark.parametrize("name", KV_FORMATS)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    batch = quantized(make_batch(MIXED, 4, 2, 40, 40, torch.bfloat16), name)
    whole, bounds = run_paged(batch, Rule()), batch.starts.tolist()
    for threads in (1, 3):
        assert torch.equal(run_paged(batch, Rule(), threads), whole)
    for row in range(len(MIXED)):
        if MIXED[row][0]:
            assert torch.equal(run_paged(batch.select([row]), Rule()), whole[bounds[row] : bounds[row + 1]])


@pytest.mark.parametrize("name", KV_FORMATS)
def test_pages_outside_the_window_are_not_read(name: str) -> None:
    batch = quantized(make_batch([(1, 700), (40, 640)], 2, 1, 16, 16, torch.float32), name)
    rule = Rule(window=50)
    expected = run_paged(batch, rule)
    assert_near(expected, paged_reference(batch, rule))
    batch.tables[0, : (700 - 50) // 16] = -(1 << 30)
    batch.tables[1, : (600 - 50) // 16] = -(1 << 30)
    assert torch.equal(run_paged(batch, rule), expected)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_the_comparison_would_notice_another_scale(name: str) -> None:
    """One percent of scale is far outside the tolerance, and so is what the format itself loses."""
    exact = make_batch([(1, 77), (20, 77)], 4, 2, 64, 64, torch.float32)
    batch = quantized(exact, name)
    with pytest.raises(AssertionError):
        assert_near(run_paged(batch, Rule()), paged_reference(exact, Rule()))
    moved = replace(batch, k=[k * 1.01 for k in batch.k], v=[v * 1.01 for v in batch.v])
    with pytest.raises(AssertionError):
        assert_near(run_paged(batch, Rule()), paged_reference(moved, Rule()))
