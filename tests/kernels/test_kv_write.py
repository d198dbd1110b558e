"""kv_write: a scatter, so equal to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError


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
