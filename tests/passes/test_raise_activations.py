"""Activations that are written out, in the spellings of transformers and in others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor
from transformers.activations import ACT2FN

from llmopt.compiler.graph import aten, nodes_of
from llmopt.passes.raise_activations import RaiseActivations

X = torch.randn(2, 3, 8)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu_new": (ACT2FN["gelu_new"], lambda x: F.gelu(x, approximate="tanh")),
    "gelu_fast": (ACT2FN["gelu_fast"], lambda x: F.gelu(x, approximate="tanh")),
    "bloom": (
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), F.gelu),
    "sigmoid": (lambda x: x * torch.sigmoid(x), F.silu),
    "exp": (lambda x: x / (1 + torch.exp(-x)), F.silu),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    function, activation = SPELLINGS[name]
    x = X.to(dtype)
    result = rewrite(RaiseActivations(), lambda x: function(x.sin()) + x, x)
    assert result.report.matched == 1
    found = [*nodes_of(result.after, aten.gelu.default, aten.silu.default)]
    assert [str(node.args[0]) for node in found] == ["sin"]
    torch.testing.assert_close(activation(x), function(x), rtol=2e-2, atol=2e-2)
    assert not {"aten.gelu", "aten.silu"} & set(ops_when_disabled(RaiseActivations(), function, x))


def test_several_in_one_graph() -> None:
    """The input of one is computed from the other, and both from products that hold numbers, too."""

    def function(x: Tensor) -> Tensor:
        y = gelu_new(2.0 * x)
        return y * torch.sigmoid(y) + gelu_new(x + 1.0)

    result = rewrite(RaiseActivations(), function, X)
    assert result.report.matched == 3
    assert len([*nodes_of(result.after, aten.gelu.default)]) == 2


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseActivations(), gelu_new, X),
        """\
arg_0: f32[2, 3, 8]
mul: f32[2, 3, 8] = aten.mul.Tensor(arg_0, 0.5)
pow: f32[2, 3, 8] = aten.pow.Tensor_Scalar(arg_0, 3.0)
mul_1: f32[2, 3, 8] = aten.mul.Tensor(pow, 0.044715)
add: f32[2, 3, 8] = aten.add.Tensor(arg_0, mul_1)
mul_2: f32[2, 3, 8] = aten.mul.Tensor(add, 0.7978845608028654)
tanh: f32[2, 3, 8] = aten.tanh.default(mul_2)
add_1: f32[2, 3, 8] = aten.add.Tensor(tanh, 1.0)
mul_3: f32[2, 3, 8] = aten.mul.Tensor(mul, add_1)
return [mul_3]
---
arg_0: f32[2, 3, 8]
gelu: f32[2, 3, 8] = aten.gelu.default(arg_0, approximate=tanh)
return [gelu]""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.0447 * torch.pow(x, 3.0)))),
        lambda x: x * torch.sigmoid(x + x[:, :1]),
        lambda x: x * torch.sigmoid(x.cos()),
        lambda x: torch.tanh(x),
        lambda x: x.float() * torch.sigmoid(x.float().double()).float(),
    ],
    ids=["another factor", "another scale", "another cubic", "two tensors", "of another tensor", "alone", "dtypes"],
)
def test_must_not_fire(function: Callable[..., Any]) -> None:
    must_not_fire(RaiseActivations(), "what it is part of is no activation of the vocabulary", function, X)


def test_steps_that_others_use_stay() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x * gate, gate

    result = rewrite(RaiseActivations(), function, X)
    assert result.report.matched == 1
    assert len([*nodes_of(result.after, aten.sigmoid.default)]) == 1
