"""Loops whose index is read from memory: against eager, and checked before anything is addressed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.loop_programs import check

from llmopt.backend import REPORT
from llmopt.codegen.cpu.native import KernelError
from llmopt.codegen.loops.gathers import SOURCES
from llmopt.codegen.loops.operations import OPERATIONS
from llmopt.codegen.loops.serialize import kernel_from_json, kernel_to_json

GATHERS: dict[str, Callable[..., Any]] = {
    "gather": lambda x, i, j: x.gather(1, i),
    "gather_last": lambda x, i, j: x.gather(-1, i.clamp(max=3)) + 1,
    "index_select": lambda x, i, j: x.index_select(1, j),
    "rows": lambda x, i, j: x[j % 5],
    "middle": lambda x, i, j: x[:, j] * 2,
    "from_the_end": lambda x, i, j: x[:, -1 - j],
    "last": lambda x, i, j: x[..., j],
    "pairs": lambda x, i, j: x[j[:, None] % 5, j],
    "apart": lambda x, i, j: x[j % 5, :, j],
    "apart_broadcast": lambda x, i, j: x[j[:, None] % 5, :, j],
    "all": lambda x, i, j: x[j % 5, j, j],
    "int32": lambda x, i, j: x[:, j.to(torch.int32)],
    "of_a_view": lambda x, i, j: x.transpose(0, 1)[j] + 1,
    "of_a_slice": lambda x, i, j: x[1:, :, 2:][:, j],
    "of_something_computed": lambda x, i, j: x.exp()[:, j],
    "of_a_constant": lambda x, i, j: torch.arange(7, device=x.device)[j] + j,
    "of_a_gather": lambda x, i, j: x[:, j][:, j % 4],
    "by_a_gather": lambda x, i, j: x[:, j[j % 4]],
    "beyond_the_range": lambda x, i, j: x[torch.arange(x.shape[0]) - 1],
    "partly_ranges": lambda x, i, j: x[:, torch.arange(x.shape[1])],
    "summed": lambda x, i, j: x.gather(1, i).sum(-1),
    "embedding": lambda x, i, j: torch.nn.functional.embedding(j, x[0].double()),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in GATHERS
        for dtype in (torch.float32, torch.bfloat16, torch.int64)
        if dtype != torch.int64 or name != "of_something_computed"  # exp of integers is a float
    ],
    ids=str,
)
def test_gather(name: str, dtype: torch.dtype) -> None:
    x = torch.randint(-50, 50, (5, 7, 12)).to(dtype) / (1 if dtype == torch.int64 else 8)
    indices = [(torch.randint(0, 7, (5, 3, 12)), torch.randint(0, 7, (n,))) for n in (4, 6)]
    check(GATHERS[name], x.to(dtype), *indices[0], again=[[x.to(dtype), *indices[1]]])


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (lambda x, i: x[i] + 1, [0, 5]),
        (lambda x, i: x[i] + 1, [0, -6]),
        (lambda x, i: x.index_select(0, i), [-1, 2]),
        (lambda x, i: x.gather(0, i[:, None]), [5, 0]),
        (lambda x, i: x[:0][i] + 1, [0, 0]),
    ],
)
def test_an_index_outside_is_an_error(function: Callable[..., Any], index: list[int]) -> None:
    compiled = torch.compile(function, backend="llmopt", options={"fallback": "error"})
    with pytest.raises(KernelError, match="out of range"), torch.no_grad():
        compiled(torch.randn(5, 3), torch.tensor(index))


@pytest.mark.parametrize("outside", [5, -6])
def test_a_kernel_checks_its_bounds(outside: int) -> None:
    """The same of the loop alone: also in Triton's interpreter, where no model is compiled."""
    x = torch.randn(5, 3)
    program = check(lambda x, i: x[i] + 1, x, torch.tensor([0, 4]))
    with pytest.raises(KernelError, match="out of range"):
        program(x, torch.tensor([0, outside]))


def test_kernels_of_gathers_are_written_and_read() -> None:
    program = check(lambda x, i: x[i.clamp(min=0)] * 2, torch.randn(5, 3), torch.tensor([0, 4]))
    for group in program.plan.groups:
        assert kernel_from_json(kernel_to_json(group.kernel)) == group.kernel


SCATTERS: dict[str, Callable[..., Any]] = {
    "value": lambda x, i: x.scatter(-1, i, 2.5),
    "zeros": lambda x, i: torch.zeros_like(x).scatter(-1, i, 1.0).bool().logical_not() * x,
    "source": lambda x, i: x.scatter(-1, i, (x + 100)[..., :4]),
    "middle": lambda x, i: x.scatter(1, (i % 7)[:, :3, :1].expand(-1, -1, 12), 3.0),
    "larger source": lambda x, i: x.scatter(-1, i[..., :2], x * 2),
    "of integers": lambda x, i: x.long().scatter(-1, i, 7),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_scatter(name: str) -> None:
    places = lambda rows: torch.rand(rows, 7, 12).topk(4).indices  # noqa: E731
    again = [[torch.randn(3, 7, 12), places(3)]]
    check(SCATTERS[name], torch.randn(5, 7, 12), places(5), again=again, static=(-1, -2))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, i: x.scatter(0, i.repeat(3, 1), 1.0), "of up to"),
        (lambda x, i: x.scatter(0, i[:, :2], 1.0), "a part of the other dimensions"),
    ],
)
@torch.no_grad()
def test_scatters_that_stay_with_aten(function: Callable[..., Any], reason: str) -> None:
    torch._dynamo.reset()
    x, index = torch.randn(20, 3), torch.randint(0, 20, (9, 3))
    assert torch.equal(torch.compile(function, backend="llmopt")(x, index), function(x, index))
    assert [fallback for graph in REPORT.graphs for fallback in graph.fallbacks if reason in fallback.reason]


def test_every_gather_has_a_handler() -> None:
    assert SOURCES.keys() <= OPERATIONS.keys()
