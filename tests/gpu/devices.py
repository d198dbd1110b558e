"""Graphs captured on the CPU, moved to a GPU that need not exist, and programs of such graphs run without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from llmopt.codegen.lower import Lowered, lower
from llmopt.codegen.triton.launch import Launch
from llmopt.compiler.graph import fake_mode, is_tensor, placeholders, refresh_values
from llmopt.runtime.cuda_executable import CudaExecutable

CUDA = torch.device("cuda", 0)


def inverting() -> Any:
    """Python's `~` asks for the device in C++, which a PyTorch without CUDA refuses; the op behind it does not."""
    return mock.patch.object(FakeTensor, "__invert__", lambda self: torch.bitwise_not(self))


# KV formats that the GPU kernels refuse, with a reason.
QUANTIZED = {"int8", "fp8", "int4"}


def is_refused(sample: Sequence[Any]) -> bool:
    """Whether an op's sample asks for what no GPU kernel computes yet."""
    return any(item in QUANTIZED for item in sample if isinstance(item, str))


@inverting()
def to_cuda(graph: fx.Graph) -> fx.Graph:
    """The graph as it is captured from a model on a GPU: all its values are fake CUDA tensors."""
    mode = fake_mode(graph)

    def moved(argument: Any) -> Any:
        return CUDA if isinstance(argument, torch.device) else argument

    for node in placeholders(graph):
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            with mode:
                node.meta["val"] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=CUDA)
    for node in graph.nodes:
        node.args = torch.utils._pytree.tree_map(moved, node.args)
        node.kwargs = torch.utils._pytree.tree_map(moved, node.kwargs)
    refresh_values(graph)
    return graph


@inverting()
def lower_for_cuda(graph: fx.Graph, mutations: Sequence[int] = ()) -> Lowered:
    """The CUDA program of a graph captured on the CPU."""
    on_gpu = any(is_tensor(n) and n.meta["val"].is_cuda for n in placeholders(graph))
    lowered = lower(graph if on_gpu else to_cuda(graph), mutations)
    assert lowered.program.target == "cuda"
    return lowered


def interpreted(lowered: Lowered, arguments: Sequence[Any]) -> list[Any]:
    """Runs a CUDA program on CPU tensors in Triton's interpreter; all arguments are the graph's, weights among them.

    Only in a process with TRITON_INTERPRET=1.
    """
    executable = CudaExecutable(lowered.program, torch.device("cpu"))
    return executable(arguments)


def planned_launches(lowered: Lowered, arguments: Sequence[Any]) -> list[Launch]:
    """All launches of a program whose steps need no results of earlier ones, without running anything."""
    executable = CudaExecutable(lowered.program, torch.device("cpu"))
    found: list[Launch] = []

    def keep(step: Any, sizes: Any) -> None:
        for call in step.calls:
            found.extend(executable.plan(call, sizes))

    executable._run_kernels = keep  # type: ignore[method-assign]
    executable(arguments)
    return found
