"""Activations as epilogues of the products before them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import catch
from torch import nn

from llmopt.codegen.lower import lower
from llmopt.codegen.program import KernelCall, Program
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Silu": F.silu,
    "GeluErf": F.gelu,
    "GeluTanh": lambda x: F.gelu(x, approximate="tanh"),
    "Relu": F.relu,
}


def _program(module: nn.Module, x: torch.Tensor) -> Program:
    caught = catch(module, x, dynamic=True)
    run_pipeline(caught.graph, BACKEND, Options())
    return lower(caught.graph, caught.captured.mutations).program


def _kernels(program: Program) -> list[tuple[str, str]]:
    return [
        (program.kernels[step.kernel].template, program.kernels[step.kernel].arguments[-1:][0])
        if program.kernels[step.kernel].arguments
        else (program.kernels[step.kernel].template, "")
        for step in program.steps
        if isinstance(step, KernelCall)
    ]


class _Feed(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(24, 50), nn.Linear(50, 24), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class _TwiceUsed(_Feed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(self.act(y) + y)


class _Returned(_Feed):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y = self.up(x)
        return y, self.act(y)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_becomes_an_epilogue(act: str) -> None:
    program = _program(_Feed(ACTIVATIONS[act]), torch.randn(2, 5, 24))
    assert _kernels(program) == [("linear", f"llmopt::{act}"), ("linear", "float")]
    (call, _) = program.steps
    assert isinstance(call, KernelCall)
    assert call.origin.startswith("llmopt.linear aten.")


@pytest.mark.parametrize("module", [_TwiceUsed, _Returned])
def test_a_product_that_others_need_keeps_its_value(module: type[_Feed]) -> None:
    kernels = _kernels(_program(module(F.gelu), torch.randn(2, 5, 24)))
    assert kernels[0] == ("linear", "float")
    assert [name for name, _ in kernels].count("loop") == 1


@pytest.mark.parametrize("module", [_Feed, _TwiceUsed, _Returned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(module: type[_Feed], dtype: torch.dtype) -> None:
    model = module(F.gelu).to(dtype).eval()
    compiled = torch.compile(model, backend="llmopt", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 24), (9, 11, 24)):
            x = torch.randn(shape).to(dtype)
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(compiled(x), model(x), rtol=near, atol=near)
