"""Kernels and whole models on a GPU: every op against its reference, the zoo token for token. `make test-gpu`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.devices import is_refused
from graphs.one_op import one_op_graph
from models.zoo import VOCABULARY, ZOO, build, prompts, reference_generate

from llmopt.codegen.lower import lower
from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)
from llmopt.compiler.opspec import OPS
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.cuda_executable import CudaExecutable
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.step_batch import StepBatch

pytestmark = pytest.mark.gpu

KERNELS = [name for name in OPS if name != "constant"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(sample: Any) -> Any:
    """A sample with its tensors on the GPU."""
    return torch.utils._pytree.tree_map(lambda a: a.cuda() if isinstance(a, torch.Tensor) else a, sample)


def on_gpu(name: str, sample: Any) -> list[torch.Tensor]:
    """What the op's program gives on a sample that lies on the GPU; nothing in it may run on ATen."""
    graph, tensors = one_op_graph(OPS[name], sample)
    lowered = lower(graph)
    assert lowered.program.target == "cuda" and not lowered.program.fallbacks
    return CudaExecutable(lowered.program)(tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_samples(name: str, dtype: torch.dtype) -> None:
    spec = OPS[name]
    tolerance = spec.tolerances[dtype]
    for sample in spec.samples(dtype, torch.Generator().manual_seed(3)):
        if is_refused(sample):
            continue
        again = copy.deepcopy(sample)
        expected = spec.reference(*again)
        expected = expected if isinstance(expected, tuple) else (expected,)
        given = moved(sample)
        for got, wanted in zip(on_gpu(name, given), expected, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance.rtol, atol=tolerance.atol)
        for got, wanted in zip(given, again, strict=True):
            if isinstance(got, torch.Tensor):  # what the op writes to
                torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("function", [torch.fmod, torch.remainder, torch.floor_divide])
def test_large_quotients(function: Callable[..., torch.Tensor]) -> None:
    """Where a remainder from the rounded quotient would be off by multiples of the divisor."""
    x, y = torch.randn(4096, device="cuda") * 1e8, torch.rand(4096, device="cuda") + 0.1
    compiled = torch.compile(function, backend="llmopt", options={"fallback": "error"})
    torch.testing.assert_close(compiled(x, y), function(x, y), rtol=0, atol=0)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the error over that of the float64 reference; NaN stays NaN, and fails."""
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17, 33, 64, 65, 200, 1000])
def test_linear_at_the_sizes_of_models(rows: int, dtype: torch.dtype) -> None:
    """Streamed, split and tiled products, of one to five weights, with and without bias."""
    for k, sizes in [(2048, (2048, 512, 512)), (8192, (2048,)), (4096, (14336, 14336)), (2049, (65, 1, 300, 77, 5))]:
        x = torch.randn(1, rows, k, device="cuda", dtype=dtype)
        weights = [torch.randn(n, k, device="cuda").mul_(k**-0.5).to(dtype) for n in sizes]
        biases = [torch.randn(n, device="cuda", dtype=dtype) if i % 2 else None for i, n in enumerate(sizes)]
        exact = torch.cat(
            [
                x.double() @ w.double().T + (b.double() if b is not None else 0)
                for w, b in zip(weights, biases, strict=True)
            ],
            -1,
        )
        (actual,) = on_gpu("linear", (x, weights, biases))
        limit = 1e-5 if dtype == torch.float32 else 6e-3 if dtype == torch.bfloat16 else 8e-4
        assert relative_error(actual, exact) < limit, (k, sizes)
        (again,) = on_gpu("linear", (x, weights, biases))
        assert torch.equal(actual, again), "sums in another order: a race, or atomics"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "size"), [(32, 8, 64), (32, 8, 128), (8, 8, 80), (16, 1, 256)])
def test_paged_attention_over_long_contexts(heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    """Decode with split keys, chunks, whole prompts, and all of them in one ragged batch."""
    page = 16
    for queries, lengths in [
        ([1], [3000]),
        ([1] * 9, [1, 15, 16, 17, 700, 4000, 33, 2, 260]),
        ([1, 300, 64], [900, 300, 1500]),
    ]:
        blocks = [-(-n // page) for n in lengths]
        order = torch.randperm(sum(blocks) + 5)
        table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        slots, at = [], 0
        for row, (count, n) in enumerate(zip(queries, lengths, strict=True)):
            table[row, : blocks[row]] = order[at : at + blocks[row]]
            at += blocks[row]
            slots += [int(table[row, p // page]) * page + p % page for p in range(n - count, n)]
        tokens = sum(queries)
        make = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
        starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
        for window, softcap, slopes, sinks in [
            (0, 0.0, None, None),
            (100, 5.0, torch.rand(heads) / 100, torch.randn(heads)),
        ]:
            sample = (
                *(make(1, tokens, h, size) for h in (heads, groups, groups)),
                *(make(sum(blocks) + 5, groups, page, size) for _ in range(2)),
                *(torch.tensor(slots), table, starts, torch.tensor(lengths, dtype=torch.int32)),
                *(size**-0.5, softcap, window, slopes, sinks),
            )
            expected = OPS["paged_attention"].reference(*copy.deepcopy(sample))
            (actual,) = on_gpu("paged_attention", moved(sample))
            error = relative_error(actual.cpu(), expected.double())
            assert error < (1e-5 if dtype == torch.float32 else 8e-3), (queries, window)


@pytest.mark.parametrize("name", ZOO)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    """float32, chunked prefill and padded decode graphs, against transformers on the CPU."""
    options = Options.make({"block_size": 4, "max_num_batched_tokens": 24, "fallback": "error"})
    engine = ModelEngine(build(name).cuda(), options, Report())
    rows = prompts((1, 2, 17, 33, 64, 90))
    params = SamplingParams(temperature=0.0, max_tokens=12)
    generator = engine.generator([len(row) + 12 for row in rows])
    made: dict[int, list[int]] = {}
    for request in generator.run(rows, [params] * len(rows)):
        made[request.index] = request.generated
    assert [made[i] for i in range(len(rows))] == reference_generate(name, rows, 12)
    graphs = engine.program().graphs
    assert graphs is not None and graphs.replays > 0


def test_a_captured_step_gives_what_its_launches_give() -> None:
    engine = ModelEngine(build("llama", torch.bfloat16).cuda(), Options(), Report())
    program = engine.program()
    cache = program.new_cache(16)
    blocks = [cache.allocate(20) for _ in range(3)]
    program(StepBatch.build([[5, 6, 7]] * 3, [0, 0, 0], blocks, program.block_size), cache)
    batch = StepBatch.build([[9], [10], [11]], [3, 3, 3], blocks, program.block_size)
    launched = program.run(batch, cache).cpu()
    for _ in range(3):
        torch.testing.assert_close(program(batch, cache), launched, rtol=2e-2, atol=2e-2)
    assert program.graphs is not None and program.graphs.replays == 3


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_backend_logits_equal_eager(name: str) -> None:
    model = build(name).cuda()
    forward: Any = torch.compile(model.forward, backend="llmopt", dynamic=True, options={"fallback": "error"})
    for batch, length in [(3, 17), (1, 40), (3, 1)]:
        ids = torch.randint(0, VOCABULARY, (batch, length), device="cuda")
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(forward(ids, use_cache=False).logits, expected, rtol=2e-4, atol=2e-4)
