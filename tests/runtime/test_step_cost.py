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
    batch = StepBatch.build([[5]], [10], [cache.allocate(64)], program.block_size)
    program(batch, cache)
    return program, cache, batch


def test_a_decode_step_allocates_its_result_and_nothing_else() -> None:
    program, cache, batch = _ready()
    executable = program.executable
    (plan,) = executable.native_plans  # one foreign call a step
    held = executable._arena.data_ptr(), plan._scratch.ctypes.data
    with _Ops() as ops:
        logits = program(batch, cache)
    assert ops.called == ["aten.empty_strided.default"]
    assert (executable._arena.data_ptr(), plan._scratch.ctypes.data) == held
    assert logits.shape == (1, 131)


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
            logits = program(batch, cache)
            assert logits.shape == (count, 131)
            torch.testing.assert_close(logits, expected.setdefault(count, logits.clone()), rtol=0, atol=0)
