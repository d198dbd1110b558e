"""embedding: a gather, so equal to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError

INDEX_TYPE = {torch.int64: "std::int64_t", torch.int32: "std::int32_t"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
@pytest.mark.parametrize("index", INDEX_TYPE, ids=str)
def test_embedding(dtype: torch.dtype, index: torch.dtype, variant: str) -> None:
    for n, dim, threads in itertools.product((1, 2, 7), (1, 5, 64), (1, 2)):
        table = torch.randn(11, dim).to(dtype)
        ids = torch.randint(0, 11, (n,), dtype=index)
        out = torch.zeros(n, dim + 1, dtype=dtype)
        run_kernel("embedding.h", f"embedding<{CPP_TYPE[dtype]}, {INDEX_TYPE[index]}>", [ids, table, out],
                   [n, dim, 11, dim + 1], threads=threads, variant=variant)  # fmt: skip
        assert torch.equal(out[:, :dim], table[ids])
        assert not out[:, dim:].any(), "wrote past the row"


@pytest.mark.parametrize("bad", [-1, 11, 1 << 40])
def test_id_outside_the_table_is_refused(bad: int) -> None:
    table, out = torch.randn(11, 6), torch.full((3, 6), 7.0)
    with pytest.raises(KernelError, match="index out of range"):
        run_kernel("embedding.h", "embedding<float, std::int64_t>", [torch.tensor([3, bad, 10]), table, out],
                   [3, 6, 11, 6])  # fmt: skip
    assert torch.equal(out, torch.stack((table[3], torch.zeros(6), table[10])))
