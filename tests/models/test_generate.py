"""The step program against transformers: ragged batches, chunked prefill, and no work outside the native call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models.zoo import (
    ENTRIES,
    FEATURES,
    VOCABULARY,
    ZOO,
    build,
    cases,
    decided_rows,
    eager_logits,
    greedy,
    margin_mismatches,
    prompts,
    reference_generate,
    without,
)
from torch.utils._python_dispatch import TorchDispatchMode

from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.step_program import StepBatch

# 16 and 17, 64 and 65 lie on both sides of a page; 90 is longer than every window of the zoo.
LENGTHS = (1, 2, 17, 33, 64, 90)
NEW_TOKENS = 12
# Longer than any sequence of the zoo.
NO_WINDOW = 4096

# Logits are of order 1 (see zoo): errors of two or three layers of float32 sums in another order.
FLOAT_TOLERANCE = 2e-4
# Largest distance at which two tokens count as tied in bfloat16 (8 bits of mantissa over a few layers), in standard
# deviations of the logits.
BFLOAT_MARGIN = 0.15


@functools.cache
def engine_of(name: str, dtype: torch.dtype = torch.float32, block_size: int = 4) -> ModelEngine:
    """A compiled engine over `build(name, dtype)`, one for all tests. With small pages, steps are small too.

    24 tokens are less than most prompts: they are prefilled in chunks, and share steps with the decodes of others.
    """
    options = {"block_size": 4, "max_num_batched_tokens": 24} if block_size == 4 else {"block_size": block_size}
    return ModelEngine(build(name, dtype), Options.make({**options, "fallback": "error"}), Report())


def generate(engine: ModelEngine, prompt_ids: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy continuations of all prompts as one ragged batch."""
    params = SamplingParams(temperature=0.0, max_tokens=count)
    core = engine.core()
    requests = [core.add_request(prompt, params) for prompt in prompt_ids]
    while core.has_unfinished:
        core.step()
    core.scheduler.check_books()
    assert core.cache.num_free == core.cache.num_blocks
    return [request.generated for request in requests]


def all_logits(engine: ModelEngine, rows: Sequence[Sequence[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of every position of every row, computed `chunk` tokens of each row at a time in ragged batches."""
    program = engine.program()
    cache = program.new_cache(sum(-(-len(row) // program.block_size) for row in rows))
    held = [cache.allocate(len(row)) for row in rows]
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), chunk):
        live = [i for i, row in enumerate(rows) if len(row) > start]
        tokens = [rows[i][start : start + chunk] for i in live]
        batch = StepBatch.build(tokens, [start] * len(live), [held[i] for i in live], program.block_size, True)
        for i, part in zip(live, program(batch, cache).float().split([len(t) for t in tokens]), strict=True):
            parts[i].append(part)
    return [torch.cat(p) for p in parts]


@pytest.mark.parametrize("name", ZOO)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    engine, rows = engine_of(name), prompts(LENGTHS)
    steps = engine.program().num_steps
    assert generate(engine, rows, NEW_TOKENS) == reference_generate(name, rows, NEW_TOKENS)
    assert engine.program().num_steps - steps > NEW_TOKENS, "nothing was prefilled in chunks"
    assert engine.report.graphs[0].fallbacks == []


@pytest.mark.parametrize("name", cases(ZOO, "gemma2"))
def test_greedy_tokens_with_pages_of_16(name: str) -> None:
    engine, rows = engine_of(name, block_size=16), prompts(LENGTHS)
    steps = engine.program().num_steps
    assert generate(engine, rows, NEW_TOKENS) == reference_generate(name, rows, NEW_TOKENS)
    assert engine.program().num_steps - steps == NEW_TOKENS, "all prompts fit into one step"


@pytest.mark.parametrize("chunk", [1, 13, 90])
@pytest.mark.parametrize("name", ZOO)
def test_logits_at_every_position(name: str, chunk: int) -> None:
    """Teacher forcing: by single tokens (decode), in chunks across pages, and whole prompts."""
    rows = prompts(LENGTHS)
    model = build(name)
    for row, logits in zip(rows, all_logits(engine_of(name), rows, chunk), strict=True):
        torch.testing.assert_close(logits, eager_logits(model, row), rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", cases(ZOO, "llama", "bloom", "mixtral"))
def test_bfloat16_chooses_eager_tokens(name: str) -> None:
    model, exact = build(name, torch.bfloat16), build(name)
    engine = engine_of(name, torch.bfloat16)
    rows = prompts(LENGTHS)
    if hasattr(exact.config, "num_experts_per_tok"):
        # Experts are compared up to the first near tie of the router: many short rows instead of a few long ones.
        rows = [row[:count] for row in prompts([12] * 160) if (count := decided_rows(exact, row, BFLOAT_MARGIN))]
        assert sum(map(len, rows)) > 40
    ours, theirs = [], []
    for row, logits in zip(rows, all_logits(engine, rows, 90), strict=True):
        eager, reference = eager_logits(model, row), eager_logits(exact, row)
        assert margin_mismatches(eager, logits, BFLOAT_MARGIN * float(reference.std())) == []
        ours.append(logits - reference)
        theirs.append(eager - reference)
    # No further from float32 than bfloat16 in eager mode is.
    assert torch.cat(ours).square().mean() < 1.5 * torch.cat(theirs).square().mean()


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_a_removed_feature_changes_the_step_program(name: str, feature: str) -> None:
    """The comparison with eager would notice if a pass lost the feature: maimed eager logits are far from ours."""
    (row,) = prompts([40])
    (logits,) = all_logits(engine_of(name), [row], 40)
    maimed = eager_logits(without(name, feature), row)
    assert (logits - maimed).abs().max() > 50 * FLOAT_TOLERANCE
    torch.testing.assert_close(logits, eager_logits(build(name), row), rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize(
    "name", cases((name for name, entry in ENTRIES.items() if "window" in entry.removals), "gemma2")
)
def test_without_its_window_a_model_is_compiled_without_one(name: str) -> None:
    """The window comes from the graph, not from a setting that happens to be right."""

    def shortest(engine: ModelEngine) -> int:
        """The smallest window of any layer; 0 stands for none."""
        return min(spec.window or NO_WINDOW for spec in engine.program().caches)

    engine = ModelEngine(without(name, "window"), Options.make({"block_size": 4}), Report())
    assert shortest(engine_of(name)) <= 16
    assert shortest(engine) >= NO_WINDOW, "the removal leaves no window, or one of 4096"
    (row,) = prompts([60])
    (logits,) = all_logits(engine, [row], 60)
    expected = eager_logits(without(name, "window"), row)
    torch.testing.assert_close(logits, expected, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


def test_prefill_computes_no_padding() -> None:
    model = build("llama")
    model.config.max_position_embeddings = 512
    engine = ModelEngine(model, Options.make(None), Report())
    program = engine.program()
    rows = [[7], torch.randint(0, VOCABULARY, (300,)).tolist()]
    before = program.rows_computed, program.num_steps
    tokens = generate(engine, rows, 1)
    assert (program.rows_computed - before[0], program.num_steps - before[1]) == (301, 1)
    assert tokens == [greedy(model, row, 1) for row in rows]


class CountOps(TorchDispatchMode):
    """Counts every op that reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this Dynamo would run the original Python under the mode, not what it compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ZOO)
def test_a_decode_step_is_one_native_call(name: str) -> None:
    """No op runs on ATen. Around the native call PyTorch allocates the logits, which must be a fresh tensor."""
    engine = engine_of(name)
    program = engine.program()
    cache = program.new_cache(4)
    held = [cache.allocate(8), cache.allocate(8)]
    batch = StepBatch.build([[3], [5]], [0, 0], held, program.block_size)
    program(batch, cache)  # the arena grows here
    executable = program.executable
    inputs = batch.inputs(program.input_names)
    rest: list[torch.Tensor | None] = [None] * (len(program.program.inputs) - len(inputs) - len(cache.tensors))
    rest += [torch.empty(2), torch.empty(2, dtype=torch.int64)]  # the largest logits and their places
    with CountOps() as count:
        torch.zeros(1)
    assert count.ops, "the mode counts nothing"

    with CountOps() as count:
        (logits,) = executable([*inputs, *cache.tensors, *rest])
    assert logits.shape == (2, VOCABULARY)
    assert [op for op in count.ops if "empty" not in op] == []
    assert len(count.ops) == 1
    assert len(executable.native_plans) == 1
    assert executable.program.fallbacks == []
    assert engine.report.graphs[0].fallbacks == []


def test_counting_notices_a_fallback() -> None:
    """The count above could not miss an op that runs on ATen: a program with one shows it."""
    model = torch.nn.Embedding(8, 8)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(model(ids)[:, :1, :1]) + model(ids)

    compiled = torch.compile(forward, backend="llmopt", dynamic=True)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        compiled(ids)
        with CountOps() as count:
            compiled(ids)
    assert any("matrix_exp" in op for op in count.ops)
