"""A sum and the norm of it become one op with two results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import randomise
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor, nn

from llmopt.passes.fuse_residual_norm import FuseResidualNorm

X, RESIDUAL = torch.randn(2, 3, 8), torch.randn(2, 3, 8)


class Block(nn.Module):
    """The middle of a decoder layer: the sum goes on as the next residual."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        total = x + residual
        return [self.norm(total) * 2, total - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "op"), [(nn.RMSNorm(8, 1e-5), "rms"), (nn.LayerNorm(8), "layer")])
def test_norms_of_sums(norm: nn.Module, op: str, dtype: torch.dtype) -> None:
    model = randomise(Block(norm)).to(dtype)
    args = X.to(dtype), RESIDUAL.to(dtype)
    result = rewrite(FuseResidualNorm(), model, *args)
    assert result.report.matched == 1 and result.count(f"llmopt.add_{op}_norm") == 1
    assert not result.count(f"llmopt.{op}_norm") and not result.count("aten.add.Tensor")
    assert f"llmopt.add_{op}_norm" not in ops_when_disabled(FuseResidualNorm(), model, *args)


def test_golden() -> None:
    assert_golden(
        rewrite(FuseResidualNorm(), randomise(Block(nn.LayerNorm(8))), X, RESIDUAL),
        """\
arg_0: f32[2, 3, 8]
arg_1: f32[2, 3, 8]
arg_2: f32[8]
arg_3: f32[8]
add: f32[2, 3, 8] = aten.add.Tensor(arg_0, arg_1)
layer_norm: f32[2, 3, 8] = llmopt.layer_norm.default(add, arg_2, arg_3, 1e-05)
mul: f32[2, 3, 8] = aten.mul.Tensor(layer_norm, 2)
sub: f32[2, 3, 8] = aten.sub.Tensor(add, 1)
return [mul, sub]
---
arg_0: f32[2, 3, 8]
arg_1: f32[2, 3, 8]
arg_2: f32[8]
arg_3: f32[8]
add_layer_norm: (f32[2, 3, 8], f32[2, 3, 8]) = llmopt.add_layer_norm.default(arg_0, arg_1, arg_2, arg_3, 1e-05)
getitem: f32[2, 3, 8] = getitem(add_layer_norm, 0)
getitem_1: f32[2, 3, 8] = getitem(add_layer_norm, 1)
mul: f32[2, 3, 8] = aten.mul.Tensor(getitem, 2)
sub: f32[2, 3, 8] = aten.sub.Tensor(getitem_1, 1)
return [mul, sub]""",
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, r: F.layer_norm(x, (8,)) + r, "the input is no sum"),
        (lambda x, r: F.layer_norm(torch.add(x, r, alpha=2), (8,)), "the input is no sum"),
        (lambda x, r: F.layer_norm(x + r[:1], (8,)), "the addends differ in shape or dtype"),
        (lambda x, r: F.layer_norm(x + 1.0, (8,)), "the addends differ in shape or dtype"),
    ],
)
def test_must_not_fire(function: Callable[..., Any], reason: str) -> None:
    must_not_fire(FuseResidualNorm(), reason, function, X, RESIDUAL)


def test_the_second_norm_of_a_sum_reads_the_first_ones_sum() -> None:
    """A parallel block norms one sum twice: only one of the norms may add."""

    def function(x: Tensor, residual: Tensor) -> Tensor:
        total = x + residual
        return F.layer_norm(total, (8,)) * F.layer_norm(total, (8,), eps=1e-3)

    result = rewrite(FuseResidualNorm(), function, X, RESIDUAL)
    assert result.report.matched <= 1
