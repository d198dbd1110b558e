"""Kernels as named spans in `torch.profiler`, and times of every step of a program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llmopt.codegen.cpu.native import KernelError, NativePlan
from llmopt.compilation import compile_backend
from llmopt.compiler.options import Options
from llmopt.runtime.compiled import CompiledGraph


class Small(nn.Module):
    """Two linears, an activation, and an op without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return torch.linalg.matrix_exp(y[:, : y.shape[0]])


def compiled(model: nn.Module, *inputs: Tensor) -> tuple[CompiledGraph, list[Tensor]]:
    found: list[tuple[CompiledGraph, list[Tensor]]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        found.append((compile_backend(gm, example_inputs, Options())[0], list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return found[0]


def test_every_kernel_is_a_span_of_its_own() -> None:
    model, x = Small(), torch.randn(5, 16)
    graph, arguments = compiled(model, x)
    quiet = graph(arguments)[0]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loud = graph(arguments)[0]
    torch.testing.assert_close(loud, quiet, rtol=0, atol=0)
    names = [event.key for event in seen.key_averages() if event.key.startswith("llmopt::")]
    assert "llmopt::llmopt.linear [linear<float>]" in names
    assert any(name.startswith("llmopt::aten aten.linalg_matrix_exp") for name in names)
    spans = [event for event in seen.events() if event.name.startswith("llmopt::")]
    assert len(spans) == len(graph.executable.program.steps)
    with torch.no_grad():
        torch.testing.assert_close(loud, model(x))


def test_without_a_profiler_a_plan_is_one_call() -> None:
    graph, arguments = compiled(Small(), torch.randn(5, 16))
    calls: list[str] = []
    run, by_call = NativePlan.run, NativePlan.run_by_call
    try:
        NativePlan.run = lambda self, *a: (calls.append("run"), run(self, *a))[1]  # type: ignore[method-assign]
        NativePlan.run_by_call = lambda self, *a: (calls.append("by call"), by_call(self, *a))[1]  # type: ignore[method-assign]
        graph(arguments)
        quiet = list(calls)
        calls.clear()
        with profile(activities=[ProfilerActivity.CPU]):
            graph(arguments)
    finally:
        NativePlan.run, NativePlan.run_by_call = run, by_call  # type: ignore[method-assign]
    assert quiet == ["run"] * len(graph.executable.native_plans)
    assert calls == ["by call"] * len(graph.executable.native_plans)


def test_times_of_every_step() -> None:
    graph, arguments = compiled(Small(), torch.randn(5, 16))
    executable = graph.executable
    graph(arguments)
    assert set(executable.step_seconds()) == {0.0}
    executable.profile(True)
    graph(arguments)
    once = executable.step_seconds()
    graph(arguments)
    twice = executable.step_seconds()
    executable.profile(False)
    assert len(once) == len(executable.program.steps)
    assert all(a > 0 for a in once) and all(b > a for a, b in zip(once, twice, strict=True))
    graph(arguments)
    assert set(executable.step_seconds()) == {0.0}


def test_a_refusing_kernel_is_named_by_its_call_under_a_profiler() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.table(ids) + torch.tanh(x)

    graph, arguments = compiled(Table(), torch.tensor([1, 2]), torch.randn(2, 8))
    bad = [torch.tensor([1, 9]) if a.dtype == torch.int64 else a for a in arguments]
    failures = []
    for active in (False, True):
        with pytest.raises(KernelError) as error:
            if active:
                with profile(activities=[ProfilerActivity.CPU]):
                    graph(bad)
            else:
                graph(bad)
        failures.append((error.value.failure, error.value.call))
    assert failures[0] == failures[1]
