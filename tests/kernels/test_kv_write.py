"""kv_write: a scatter, so equal to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError
from llmopt.codegen.cpu.templates import KV_FORMATS
from llmopt.compiler.kv_formats import page_parts, row_bytes, store_rows

# Every dtype on this machine, and the other instruction sets in one of them.
FEWER = [(dtype, "host") for dtype in CPP_TYPE] + [(torch.float32, name) for name in VARIANTS if name != "host"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_kv_write(dtype: torch.dtype, variant: str) -> None:
    cases = itertools.product((1, 5, 37), ((1, 1, 1), (2, 64, 64), (3, 17, 9)), (1, 3, 16), (1, 2))
    for tokens, (heads, dim, v_dim), block_size, threads in cases:
        num_blocks = -(-tokens // block_size) + 3
        merged = torch.randn(tokens, heads, dim + v_dim).to(dtype)
        k, v = merged[..., :dim], merged[..., dim:]
        slots = torch.randperm(num_blocks * block_size)[:tokens]
        slots[tokens // 2] = -1
        k_cache = torch.randn(num_blocks, heads, block_size, dim).to(dtype)
        v_cache = torch.randn(num_blocks, heads, block_size, v_dim).to(dtype)
        expected = k_cache.clone(), v_cache.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[0][slot // block_size, :, slot % block_size] = k[token]
                expected[1][slot // block_size, :, slot % block_size] = v[token]
        ints = [tokens, heads, dim, v_dim, block_size, num_blocks, *k.stride()[:2], *v.stride()[:2]]
        run_kernel("kv_write.h", f"kv_write<{CPP_TYPE[dtype]}>", [k, v, slots, k_cache, v_cache], ints,
                   threads=threads, variant=variant)  # fmt: skip
        assert torch.equal(k_cache, expected[0])
        assert torch.equal(v_cache, expected[1])


@pytest.mark.parametrize(("dtype", "variant"), FEWER, ids=str)
@pytest.mark.parametrize("name", KV_FORMATS)
def test_quantized_rows(dtype: torch.dtype, name: str, variant: str) -> None:
    """The bytes of the reference, whatever the rows: large and tiny, ties, zeros, and what cannot be stored."""
    cases = itertools.product((1, 37), ((1, 1, 1), (2, 64, 64), (3, 17, 9), (1, 80, 96)), (3, 16), (1, 2))
    for tokens, (heads, dim, v_dim), block_size, threads in cases:
        num_blocks = -(-tokens // block_size) + 3
        merged = torch.randn(tokens, heads, dim + v_dim) * torch.logspace(-9, 4, tokens)[:, None, None]
        merged[::5] = (merged[::5] * 8).round() / 16  # many ties
        merged = merged.to(dtype)
        if tokens > 8:
            merged[3], merged[5, 0, 0], merged[7, 0, dim] = 0.0, torch.nan, torch.inf
        k, v = merged[..., :dim], merged[..., dim:]
        slots = torch.randperm(num_blocks * block_size)[:tokens]
        caches = [
            torch.randint(0, 127, (num_blocks, heads, block_size, row_bytes(name, size)), dtype=torch.uint8)
            for size in (dim, v_dim)
        ]
        expected = [cache.clone() for cache in caches]
        for cache, rows in zip(expected, (k, v), strict=True):
            store_rows(cache, slots // block_size, slots % block_size, rows, name)
        ints = [tokens, heads, dim, v_dim, block_size, num_blocks, *k.stride()[:2], *v.stride()[:2]]
        call = f"kv_write<{CPP_TYPE[dtype]}, {KV_FORMATS[name]}>"
        run_kernel("kv_write.h", call, [k, v, slots, *caches], ints, threads=threads, variant=variant)
        for cache, want, size in zip(caches, expected, (dim, v_dim), strict=True):
            (codes, parameters), (want_codes, want_parameters) = (page_parts(c, name, size) for c in (cache, want))
            assert torch.equal(codes, want_codes)
            # Which of the NaNs it is, is left open.
            mine, theirs = (p.contiguous().view(torch.bfloat16) for p in (parameters, want_parameters))
            assert torch.equal(mine.nan_to_num(-1.0), theirs.nan_to_num(-1.0))


def test_every_fp8_tie_and_neighbour_rounds_as_pytorch_rounds() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles, middles * (1 + 2**-23), middles * (1 - 2**-23)]).float()
    rows = torch.cat([points, -points])[:, None, None]
    rows = torch.cat([rows, torch.full_like(rows, 448.0)], -1)  # so that the scale is one
    count = len(rows)
    caches = [torch.zeros(count, 1, 1, row_bytes("fp8", 2), dtype=torch.uint8) for _ in range(2)]
    run_kernel("kv_write.h", "kv_write<float, llmopt::f8e4m3>", [rows, rows, torch.arange(count), *caches],
               [count, 1, 2, 2, 1, count, 2, 2, 2, 2])  # fmt: skip
    assert torch.equal(caches[0][:, 0, 0, 0], rows[:, 0, 0].to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("slot", [32, 1 << 40, -2])
def test_slot_outside_the_cache_is_refused(slot: int) -> None:
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 8)
    slots = torch.tensor([31, slot, 0])
    with pytest.raises(KernelError, match="index out of range"):
        run_kernel("kv_write.h", "kv_write<float>", [k, v, slots, k_cache, v_cache], [3, 2, 8, 8, 16, 2, 16, 8, 16, 8])
    assert torch.equal(k_cache[1, :, 15], k[0])
    assert torch.equal(v_cache[0, :, 0], v[2])
    assert k_cache.count_nonzero() == 32, "the refused token was written"
