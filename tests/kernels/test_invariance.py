"""Kernels compiled for batch invariance: a row's bits are the same whatever number of rows it is computed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel
from kernels.test_attention import Batch, Rule, assert_near, make_batch, paged_reference, run_paged

Tensor = torch.Tensor
INVARIANT = {"LLMOPT_BATCH_INVARIANT": 1}


def run_linear(x: Tensor, weights: Sequence[Tensor], threads: int, defines: dict[str, int]) -> Tensor:
    (rows, k), sizes = x.shape, [len(w) for w in weights]
    out = torch.full((rows, sum(sizes)), torch.nan, dtype=x.dtype)
    operands = [t for w in weights for t in (w, None)]
    ints = [rows, k, k, sum(sizes), len(sizes), *sizes]
    call = f"linear<{CPP_TYPE[x.dtype]}>"
    run_kernel("linear.h", call, [x, out, *operands], ints, threads=threads, defines=defines)
    return out


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_linear(dtype: torch.dtype) -> None:
    """The last shape has rows of which only a few fit into the scratch at once."""
    for rows, k, sizes in [(70, 257, (33, 20)), (40, 64, (5,)), (30, 40000, (9,))]:
        x = torch.randn(rows, k).to(dtype)
        weights = [(torch.randn(n, k) * k**-0.5).to(dtype) for n in sizes]
        whole = run_linear(x, weights, 2, INVARIANT)
        expected = x.double() @ torch.cat(weights).double().T
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(whole.double(), expected, rtol=tolerance, atol=tolerance)
        for first, last, threads in [(0, 1, 1), (3, 5, 2), (7, 20, 3), (1, rows, 1)]:
            assert torch.equal(run_linear(x[first:last], weights, threads, INVARIANT), whole[first:last])


def test_linear_without_it_depends_on_the_number_of_rows() -> None:
    x, weight = torch.randn(70, 257), torch.randn(33, 257)
    assert not torch.equal(run_linear(x, [weight], 1, {})[:1], run_linear(x[:1], [weight], 1, {}))


def part(batch: Batch, first: int, last: int) -> Batch:
    """The queries [first, last) of the only sequence, as a chunk of its prompt would have them."""
    queries, keys = len(batch.q), int(batch.lengths[0])
    starts, lengths = torch.tensor([0, last - first]).int(), torch.tensor([keys - queries + last]).int()
    return replace(batch, q=batch.q[first:last], starts=starts, lengths=lengths)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (16, 1)])
def test_attention(heads: int, groups: int) -> None:
    for dtype, rule in [(torch.float32, Rule()), (torch.bfloat16, Rule(window=37, softcap=3.0))]:
        batch = make_batch([(90, 700)], heads, groups, 40, 24, dtype)
        whole = run_paged(batch, rule, 2, defines=INVARIANT)
        assert_near(whole, paged_reference(batch, rule))
        for first, last, threads in [(0, 1, 1), (5, 7, 2), (10, 23, 3), (40, 90, 1)]:
            assert torch.equal(run_paged(part(batch, first, last), rule, threads, defines=INVARIANT), whole[first:last])


def test_attention_without_it_depends_on_the_number_of_queries() -> None:
    batch = make_batch([(90, 700)], 4, 2, 40, 24, torch.float32)
    assert not torch.equal(run_paged(part(batch, 5, 7), Rule()), run_paged(batch, Rule())[5:7])
