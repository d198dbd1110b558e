"""Kernels compiled for batch invariance: a row's bits are the same whatever number of rows it is computed with."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel
from kernels.test_attention import Batch, Rule, assert_near, make_batch, paged_reference, run_paged

from llmopt.codegen.cpu.limits import kernel_plan
from llmopt.codegen.cpu.native import ABSENT, PUSH, SCRATCH_BYTES, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.templates import HEADERS, source_of
from llmopt.codegen.cpu.toolchain import KERNEL_FOLDER, build_library
from llmopt.codegen.program import KernelSpec

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


# Puts out[0] = bytes of scratch that a product and the block for its epilogue take together.
TAKEN = """
namespace {
struct Span { const char* scratch; std::int64_t most; };
void block(const void* state, const llmopt::Block& b) {
  Span* span = *static_cast<Span* const*>(state);
  const char* end = static_cast<const char*>(b.values) + b.rows * b.stride * static_cast<std::int64_t>(sizeof(ELEMENT));
  if (end - span->scratch > span->most) span->most = end - span->scratch;
}
}
LLMOPT_KERNEL(taken) {
  Span span{worker.scratch, 0}, *const state = &span;
  const llmopt::Epilogue epilogue{block, &state};
  product({args.tensors + 1, args.ints, args.floats, &epilogue}, worker);
  *args.tensor<std::int64_t>(0) = span.most;
}
"""


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_rows_and_their_epilogue_fit_the_scratch(dtype: torch.dtype) -> None:
    """Short rows are many at a time, and the epilogue's block has a row for each."""
    source = source_of(KernelSpec("linear", (CPP_TYPE[dtype],)), "product", True) + TAKEN
    source = source.replace("ELEMENT", CPP_TYPE[dtype])
    for rows, k in [(20000, 8), (12000, 16), (5, 8), (300, 3000), (3, 300000)]:
        taken, weight = torch.zeros(1, dtype=torch.int64), torch.randn(96, k).to(dtype)
        operands = [taken, torch.randn(rows, k).to(dtype), None, weight, None]
        kernel_plan(source, "taken", operands, [rows, k, k, 0, 1, 96])(threads=1)
        assert 0 < int(taken) <= SCRATCH_BYTES


@pytest.mark.parametrize("templates", [*itertools.permutations(("linear", "grouped_linear"))], ids=" ".join)
def test_kernels_of_one_library(templates: tuple[str, ...]) -> None:
    """They share functions, of which the linker keeps one: whichever it is, every kernel's rows are independent."""
    arguments = {"linear": ("float",), "grouped_linear": ("float", "std::int64_t")}
    library = build_library([source_of(KernelSpec(t, arguments[t]), f"k_{t}", True) for t in templates])
    k, n, rows = 512, 64, 64
    x, weight, outs = torch.randn(rows, k), torch.randn(1, n, k), []
    for template, count in itertools.product(templates, (rows, 1)):
        out = torch.full((rows, n), torch.nan)
        linear = template == "linear"
        tensors = [x, out, weight, None] if linear else [x, weight, torch.tensor([count]), out]
        ints = [count, k, k, n, 1, n] if linear else [count, k, n, 1, k, n]
        operands = tuple(ABSENT if t is None else TensorOperand(i) for i, t in enumerate(tensors))
        plan = NativePlan(library, [NativeCall(f"k_{template}", operands, tuple((PUSH, i) for i in ints), ())])
        plan.run([0 if t is None else t.data_ptr() for t in tensors], [], 1)
        outs.append(out[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_every_template_that_asks_is_told() -> None:
    """The headers say which those are: a source without kBatchInvariant in it is compiled the same in both modes."""
    for template, header in HEADERS.items():
        text, seen = "", {header}
        todo = [header]
        while todo:
            text += (part := (KERNEL_FOLDER / todo.pop()).read_text())
            todo += (new := set(re.findall(r'#include "(.*)"', part)) - seen)
            seen |= new
        told = "LLMOPT_BATCH_INVARIANT 1" in source_of(KernelSpec(template, ()), "k", True)
        assert told == ("kBatchInvariant" in text), template
        assert "LLMOPT_BATCH_INVARIANT" not in source_of(KernelSpec(template, ()), "k", False)


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
