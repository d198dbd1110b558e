"""Barriers between kernel calls: none is missing where workers could meet in memory, and none is added for nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from graphs.capturing import catch
from graphs.tiny_programs import bert_forward, llama_step
from torch import Tensor

from llmopt.codegen.index import evaluate
from llmopt.codegen.lower import lower
from llmopt.codegen.program import KernelCall, Program
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND

WIDTHS = (32, 100, 160, 200)


def _program(function: object, arguments: Sequence[Tensor], dynamic: bool) -> tuple[Program, dict[str, int]]:
    """The backend's program, and what its symbols stand for on these arguments."""
    caught = catch(function, *arguments, dynamic=dynamic)  # type: ignore[arg-type]
    run_pipeline(caught.graph, BACKEND, Options())
    program = lower(caught.graph, caught.captured.mutations).program
    given = caught.arguments
    return program, {s.name: given[s.index] if s.dim < 0 else given[s.index].shape[s.dim] for s in program.symbols}


def _races(program: Program, sizes: dict[str, int]) -> list[str]:
    """Calls with no barrier between them of which one may write what the other has not done with.

    A computed value is written by the first call that touches it. So two that lie in the same place are a race, and so
    is one that is written and then read.
    """
    spans = []
    for value in program.values:
        start = evaluate(value.offset, sizes)
        size = math.prod(evaluate(n, sizes) for n in value.sizes) * value.dtype.itemsize
        spans.append((start, start + size) if value.kind == "arena" else (0, 0))
    found, seen = [], set()
    since: list[tuple[int, set[int], set[int]]] = []  # calls since the last barrier: what they touch, and write first
    for number, step in enumerate(program.steps):
        if not isinstance(step, KernelCall):
            since = []
            continue
        touched = {t.value for t in step.tensors if t is not None and program.values[t.value].kind != "weight"}
        made = {v for v in touched if program.values[v].kind in ("arena", "output")} - seen
        seen |= made
        for other, theirs, written in since:
            for a in theirs:
                for b in touched:
                    overlap = max(spans[a][0], spans[b][0]) < min(spans[a][1], spans[b][1])
                    if (a == b and a in written) or (a != b and overlap):
                        found.append(f"call {number} on value {b} and call {other} on value {a}")
        since = [] if step.sync_after else [*since, (number, touched, made)]
    return found


def _random(seed: int) -> tuple[object, list[Tensor]]:
    """A function with many values of different sizes whose lives end at different times, and its arguments."""
    pick = random.Random(seed)
    kinds = [pick.choice(["product", "product", "softmax", "copy", "sum"]) for _ in range(pick.randint(4, 12))]
    weights = [torch.randn(32, pick.choice(WIDTHS)) for _ in kinds]
    places = [pick.randrange(1 << 16) for _ in kinds]

    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        values = [x]
        for kind, weight, place in zip(kinds, weights, places, strict=True):
            old = values[place % len(values)]
            if kind == "product":
                values.append(old[:, :32] @ weight)
            elif kind == "softmax":
                values.append(torch.softmax(old @ old.t(), -1))
            elif kind == "copy":
                values.append(torch.softmax(x @ weight.contiguous(), -1))
            else:
                values.append((old * 2).sum(0, keepdim=True) + old)
        return [values[-1] @ values[-1].t(), values[places[0] % len(values)].sum()]

    return function, [torch.randn(64, 32), *weights]


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_barrier_is_missing_in_random_programs(dynamic: bool) -> None:
    for seed in range(12):
        function, arguments = _random(seed)
        program, sizes = _program(function, arguments, dynamic)
        assert _races(program, sizes) == [], seed


def test_a_value_that_begins_inside_another_ones_memory_waits_for_it() -> None:
    def function(x: Tensor, w: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.softmax(x @ w, -1)
        second = y @ v.contiguous()  # its copy of v lands within x @ w
        return first @ first.t(), second @ second.t()

    arguments = [torch.randn(64, 32), torch.randn(32, 200), torch.randn(64, 32), torch.randn(32, 100)]
    program, sizes = _program(function, arguments, False)
    assert _races(program, sizes) == []


def _barriers(program: Program) -> int:
    return sum(step.sync_after for step in program.steps if isinstance(step, KernelCall))


@pytest.mark.slow
def test_a_layer_has_no_more_barriers_than_before_places_were_compared() -> None:
    """A layer of a Llama has 11 calls, one of a BERT 7."""
    assert _barriers(llama_step(2)) - _barriers(llama_step(1)) == 10
    assert _barriers(bert_forward(2)) - _barriers(bert_forward(1)) == 7
