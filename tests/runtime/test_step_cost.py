"""What a decode step costs beside its kernels, in counts that do not depend on the machine."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from models.zoo import build
from torch.utils._python_dispatch import TorchDispatchMode

from llmopt import SamplingParams
from llmopt.codegen.cpu.native import KernelError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.step_program import StepBatch, StepProgram


class _Ops(TorchDispatchMode):
    """Lists the ATen ops that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@functools.cache
def _compiled() -> StepProgram:
    """What every test's own step program is made of."""
    return ModelEngine(build("llama"), Options(), Report()).program()


def _ready() -> tuple[StepProgram, KVCache, StepBatch]:
    """A program that has run its shapes before, its cache, and one token to decode at position 10."""
    compiled = _compiled()
    program = StepProgram(compiled.program, compiled.caches, compiled.block_size)
    program.bind(compiled.executable.weights)
    cache = program.new_cache(8)
    for tensor in cache.tensors:
        tensor.zero_()
    batch = StepBatch.build([[5]], [10], [cache.allocate(64)], program.block_size)
    program(batch, cache)
    return program, cache, batch


def test_a_decode_step_allocates_nothing() -> None:
    program, cache, batch = _ready()
    executable = program.executable
    (plan,) = executable.native_plans  # one foreign call a step
    held = executable._arena.data_ptr(), plan._scratch._address
    lent = program(batch, cache, lend=True)
    with _Ops() as ops:
        logits = program(batch, cache, lend=True)
    assert ops.called == []
    assert logits.data_ptr() == lent.data_ptr()
    assert (executable._arena.data_ptr(), plan._scratch._address) == held
    assert logits.shape == (1, 131)


def test_a_batch_may_change_in_place() -> None:
    """What its tensors hold counts, whatever ran in between, and so do the weights of the moment."""
    program, cache, batch = _ready()
    other = StepBatch.build([[7, 8]], [0], [cache.allocate(16)], program.block_size)

    def fresh() -> torch.Tensor:
        copied = StepBatch(*(t.clone() if t is not None else None for t in vars(batch).values()))  # type: ignore[arg-type]
        return program(copied, cache)

    seen = []
    for token in (5, 9, 120):
        batch.input_ids[0] = token
        logits = program(batch, cache, lend=True)
        again = program(batch, cache, lend=True)
        assert again is logits
        seen.append(logits.clone())
        torch.testing.assert_close(seen[-1], fresh(), rtol=0, atol=0)
        if token == 9:
            program(other, cache, lend=True)
    assert not torch.equal(seen[0], seen[1])
    program(batch, cache, lend=True)
    bound = program.executable.weights
    program.bind([weight * 1.5 for weight in bound])
    scaled = program(batch, cache, lend=True).clone()
    torch.testing.assert_close(scaled, fresh(), rtol=0, atol=0)
    assert not torch.equal(scaled, seen[-1])
    batch.input_ids[0] = 100_000
    for _ in range(2):
        with pytest.raises(KernelError):
            program(batch, cache, lend=True)
    batch.input_ids[0] = 9
    program.bind(bound)
    torch.testing.assert_close(program(batch, cache, lend=True), seen[1], rtol=0, atol=0)


def test_a_batch_of_another_cache_is_no_repetition() -> None:
    program, cache, batch = _ready()
    empty = program.new_cache(8)
    for full, zero in zip(cache.tensors, empty.tensors, strict=True):
        full.normal_()
        zero.zero_()
    program(batch, cache)
    for _ in range(2):
        logits = program(batch, cache, lend=True).clone()
    assert not torch.equal(program(batch, empty, lend=True), logits)
    cache.tensors[0].fill_(3.0)
    assert not torch.equal(program(batch, cache, lend=True), logits)


def test_a_step_finds_the_largest_logits() -> None:
    program, cache, _ = _ready()
    blocks = cache.allocate(64)
    for count in (1, 40, 3):  # more rows than there was room for, and then fewer
        batch = StepBatch.build([list(range(count))], [0], [blocks], program.block_size, all_logits=True)
        for _ in range(2):
            logits = program(batch, cache, lend=True)
            found = program.largest(logits)
            assert found is not None
            assert found == (logits.amax(-1).tolist(), logits.argmax(-1).tolist())
        assert program.largest(logits.clone()) is None


def test_the_largest_logits_stay_while_others_use_the_program() -> None:
    """As the lent logits do: a beam search may step between the engine's step and its choice of tokens."""
    program, cache, _ = _ready()
    blocks = cache.allocate(64)
    mine, others = (
        StepBatch.build([tokens], [0], [blocks], program.block_size, all_logits=True)
        for tokens in ([5, 3, 8], list(range(20, 60)))
    )
    for _ in range(2):  # at first taken in, then made again
        logits = program(mine, cache, lend=True)
        expected = logits.amax(-1).tolist(), logits.argmax(-1).tolist()
        unlent = program(others, program.new_cache(64))
        assert program.largest(unlent) is None
        assert program.largest(logits) == expected
        assert expected == (logits.amax(-1).tolist(), logits.argmax(-1).tolist())


@pytest.mark.parametrize("prompt_embeds", [False, True])
def test_a_steady_decode_step_of_an_engine(prompt_embeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the kernels runs in PyTorch, and Python does little for each request."""
    options = Options.make({"max_num_seqs": 8, "enable_prompt_embeds": prompt_embeds})
    core = ModelEngine(build("llama"), options, Report()).core()
    params = SamplingParams(temperature=0.0, max_tokens=40)
    for row in range(8):
        core.add_request([row + 1, *range(32 + row % 4)], params)
    for _ in range(8):
        core.step()
    batches = []
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    run = StepProgram.__call__

    def watched(program: StepProgram, batch: StepBatch, cache: KVCache, *, lend: bool) -> torch.Tensor:
        batches.append(batch)
        return run(program, batch, cache, lend=lend)

    monkeypatch.setattr(StepProgram, "__call__", watched)
    with _Ops() as ops:
        for _ in range(20):
            sys.setprofile(count)
            try:
                core.step()
            finally:
                sys.setprofile(None)
    # Pages of 16 tokens are begun meanwhile: the batch has room for them.
    assert ops.called == [] and len(set(map(id, batches))) == 1
    assert calls < 20 * 200


def test_results_are_fresh_unless_they_are_lent() -> None:
    program, cache, batch = _ready()
    with _Ops() as ops:
        fresh = program(batch, cache)
    assert ops.called == ["aten.empty.memory_format"] * 2 + [
        "aten.empty_strided.default"
    ]  # with the largest of each row
    assert program(batch, cache).data_ptr() != fresh.data_ptr()
    lent = program(batch, cache, lend=True)
    assert lent.data_ptr() != fresh.data_ptr()
    torch.testing.assert_close(lent, fresh, rtol=0, atol=0)


def test_a_decode_step_runs_little_python() -> None:
    """A call is 0.1 to 0.5 us, so that these many stay far below 100 us; more layers add none."""
    program, cache, batch = _ready()
    calls: list[str] = []

    def count(frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        program(batch, cache)
    finally:
        sys.setprofile(None)
    assert len(calls) < 200, calls


def test_what_a_shape_needs_is_computed_once() -> None:
    """Sizes change from call to call; the numbers of one set of sizes must not answer for another."""
    program, cache, _ = _ready()
    blocks = cache.allocate(64)
    expected = {}
    for _ in range(2):
        for count in (1, 7, 3):
            batch = StepBatch.build([list(range(count))], [0], [blocks], program.block_size, all_logits=True)
            # The largest comes in the middle: what was lent before must move with the memory.
            logits = program(batch, cache)
            lent = program(batch, cache, lend=True)
            assert logits.shape == lent.shape == (count, 131)
            torch.testing.assert_close(logits, expected.setdefault(count, logits.clone()), rtol=0, atol=0)
            torch.testing.assert_close(lent, logits, rtol=0, atol=0)
