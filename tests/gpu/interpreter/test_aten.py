"""ATen ops that have a Triton template - embedding, topk, softmax, cumsum, index_copy - against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.devices import interpreted, lower_for_cuda
from kernels.loop_programs import trace

from llmopt.codegen.cpu.native import KernelError
from llmopt.codegen.program import KernelCall

aten = torch.ops.aten


def run(template: str, function: Callable[..., Any], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What a function gives as a program for a GPU, in which `template` is used and nothing runs on ATen."""

    def listed(*arguments: torch.Tensor) -> list[torch.Tensor]:
        result = function(*arguments)
        return list(result) if isinstance(result, tuple) else [result]

    lowered = lower_for_cuda(trace(listed, *inputs, static=[-1] if template == "topk" else []).graph)
    program = lowered.program
    assert not program.fallbacks, program.fallbacks[0].reason
    used = {program.kernels[step.kernel].template for step in program.steps if isinstance(step, KernelCall)}
    assert template in used
    return interpreted(lowered, inputs)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    near = {torch.bfloat16: 1e-2, torch.float32: 1e-5}.get(expected.dtype, 0.0)
    torch.testing.assert_close(actual, expected, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_embedding(dtype: torch.dtype, index: torch.dtype) -> None:
    table, ids = torch.randn(11, 37).to(dtype), torch.randint(0, 11, (2, 5)).to(index)
    close(run("embedding", aten.embedding, table, ids)[0], table[ids.long()])
    for bad in (-1, 11):
        ids[1, 3] = bad
        with pytest.raises(KernelError, match="out of range"):
            run("embedding", aten.embedding, table, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk(dtype: torch.dtype) -> None:
    x = torch.randn(5, 37).to(dtype)
    x[0, 3], x[1, :] = float("-inf"), float("-inf")
    x[2, 7], x[3] = float("inf"), -x[3].abs()
    values, indices = run("topk", lambda x: aten.topk(x, 6), x)
    assert torch.equal(values, x.float().topk(6).values.to(dtype))
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == 6 for row in indices.tolist()), "an index twice"
    (only,) = run("topk", lambda x: aten.topk(x, 3)[1], x)
    assert torch.equal(x.gather(1, only), values[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 37, 2050])
def test_softmax(columns: int, dtype: torch.dtype) -> None:
    x = (4 * torch.randn(3, columns)).to(dtype)
    if columns > 1:
        x[0, 1] = float("-inf")
    close(run("softmax", lambda x: aten.softmax.int(x, -1), x)[0], x.softmax(-1))


@pytest.mark.parametrize("columns", [1, 37, 1030])
def test_cumsum(columns: int) -> None:
    x = torch.randn(3, columns)
    torch.testing.assert_close(run("cumsum", lambda x: aten.cumsum(x, -1), x)[0], x.cumsum(-1), rtol=1e-4, atol=1e-4)
    for dtype in (torch.int64, torch.int32, torch.bool):
        numbers = torch.randint(0, 2, (3, columns)).to(dtype)
        assert torch.equal(run("cumsum", lambda x: aten.cumsum(x, -1), numbers)[0], numbers.cumsum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_index_copy(dim: int, dtype: torch.dtype) -> None:
    x = (9 * torch.randn(4, 5, 6)).to(dtype)
    shape = [4, 5, 6]
    shape[dim] = 3
    index, source = torch.randperm(x.shape[dim])[:3], (9 * torch.randn(shape)).to(dtype)
    (actual,) = run("index_copy", lambda x, i, s: aten.index_copy(x, dim, i, s), x, index, source)
    assert torch.equal(actual, x.index_copy(dim, index, source))
    index[1] = x.shape[dim]
    with pytest.raises(KernelError, match="out of range"):
        run("index_copy", lambda x, i, s: aten.index_copy(x, dim, i, s), x, index, source)
