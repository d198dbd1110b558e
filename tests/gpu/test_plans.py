"""Whole models planned for a GPU on fake CUDA tensors: everything has a kernel, as step and as backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.devices import inverting, lower_for_cuda, to_cuda
from graphs.capturing import catch
from kernels.loop_programs import trace
from models.zoo import VOCABULARY, ZOO, build

from llmopt.codegen.lower import lower
from llmopt.codegen.program import Program
from llmopt.codegen.program_json import from_json, to_json
from llmopt.codegen.target import device_of
from llmopt.codegen.triton.templates import TEMPLATES
from llmopt.compilation import compile_step
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import fake_mode, placeholders, refresh_values
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND, InsertLora, step_pipeline
from llmopt.runtime.executable import kernel_source
from llmopt.tracing import trace_forward


def models(*fast: str) -> list[Any]:
    """All models of the zoo, of which only some run without `slow`: tracing is what takes the time here."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


def logits_of(model: Any) -> Any:
    """The model's forward without a cache, as `compiler/step.py` wants it."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def check(program: Program) -> None:
    assert program.target == "cuda"
    assert [(call.op, call.reason) for call in program.fallbacks] == []
    for kernel in program.kernels:
        if kernel.template != "loop":
            assert kernel.template in TEMPLATES
        compile(kernel_source(kernel, target="cuda"), kernel.template, "exec")


@pytest.mark.slow
def test_step_with_adapters() -> None:
    templates = {kernel.template for kernel in step_program("gpt2", InsertLora()).kernels}
    assert "lora" in templates


@pytest.mark.parametrize("name", models("llama", "mixtral"))
def test_step(name: str) -> None:
    program = step_program(name)
    templates = {kernel.template for kernel in program.kernels}
    assert {"attention", "kv_write", "linear", "embedding"} <= templates
    again = from_json(to_json(program))
    assert again == program and again.target == "cuda"


def step_program(name: str, lora: InsertLora | None = None) -> Program:
    """The checked step program of a model."""
    captured, _ = trace_forward(logits_of(build(name, torch.bfloat16)), 128)
    to_cuda(captured.graph)
    for node, weight in zip(captured.graph.find_nodes(op="placeholder"), captured.weights, strict=True):
        node.meta["weight"] = weight
    with inverting():
        run_pipeline(captured.graph, step_pipeline(16, lora=lora), Options())
    program = lower_for_cuda(captured.graph).program
    check(program)
    return program


def test_a_graph_over_two_gpus_is_refused() -> None:
    graph = to_cuda(trace(lambda x, y: [x + 1, y * 2], torch.randn(4, 8), torch.randn(4, 8), static=[-1]).graph)
    assert device_of(graph) == torch.device("cuda", 0)
    second = placeholders(graph)[-1]
    with fake_mode(graph):
        second.meta["val"] = torch.empty((4, 8), device=torch.device("cuda", 1))
    refresh_values(graph)
    with pytest.raises(UnsupportedError, match="lies on cuda:1, other tensors on cuda:0"):
        lower(graph)


def test_no_program_for_a_gpu_is_batch_invariant() -> None:
    captured, _ = trace_forward(logits_of(build("llama")), 128)
    to_cuda(captured.graph)
    with pytest.raises(UnsupportedError, match="batch_invariant"):
        compile_step(captured, Options(batch_invariant=True))


@pytest.mark.parametrize("name", models("bloom"))
def test_backend(name: str) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    caught = catch(logits_of(build(name, torch.bfloat16)), ids, dynamic=True)
    to_cuda(caught.graph)
    with inverting():
        run_pipeline(caught.graph, BACKEND, Options())
    check(lower_for_cuda(caught.graph, caught.captured.mutations).program)
