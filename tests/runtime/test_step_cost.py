"""What a decode step costs beside its kernels, in counts that do not depend on the machine."""

from __future__ import annotations

import sys
from typing import Any

import torch
from models.zoo import build
from torch.utils._python_dispatch import TorchDispatchMode

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


def _ready() -> tuple[StepProgram, KVCache, StepBatch]:
    """A program that has run its shapes once, its cache, and one token to decode at position 10."""
    program = ModelEngine(build("llama"), Options(), Report()).program()
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
    held = executable._arena.data_ptr(), plan._scratch.ctypes.data
    lent = program(batch, cache, lend=True)
    with _Ops() as ops:
        logits = program(batch, cache, lend=True)
    assert ops.called == []
    assert logits.data_ptr() == lent.data_ptr()
    assert (executable._arena.data_ptr(), plan._scratch.ctypes.data) == held
    assert logits.shape == (1, 131)


def test_results_are_fresh_unless_they_are_lent() -> None:
    program, cache, batch = _ready()
    with _Ops() as ops:
        fresh = program(batch, cache)
    assert ops.called == ["aten.empty_strided.default"]
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
