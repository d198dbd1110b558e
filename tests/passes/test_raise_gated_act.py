"""A gate's activation times the other half, in every activation of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.compiler.graph import nodes_of
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.raise_gated_act import RaiseGatedAct

GATE, UP = torch.randn(2, 3, 8), torch.randn(2, 3, 8)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (swiglu, "silu"),
        (lambda gate, up: up * F.silu(gate), "silu"),
        (lambda gate, up: F.gelu(gate) * up, "gelu_erf"),
        (lambda gate, up: F.gelu(gate, approximate="tanh") * up, "gelu_tanh"),
        (lambda gate, up: F.relu(gate) * up, "relu"),
    ],
)
def test_activations(function: Callable[..., Tensor], name: str, dtype: torch.dtype) -> None:
    args = GATE.to(dtype), UP.to(dtype)
    result = rewrite(RaiseGatedAct(), function, *args)
    assert result.report.matched == 1
    (node,) = nodes_of(result.after, llmopt_ops.gated_act.default)
    assert node.args[2] == name
    assert "llmopt.gated_act" not in ops_when_disabled(RaiseGatedAct(), function, *args)


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseGatedAct(), swiglu, GATE, UP),
        """\
arg_0: f32[2, 3, 8]
arg_1: f32[2, 3, 8]
silu: f32[2, 3, 8] = aten.silu.default(arg_0)
mul: f32[2, 3, 8] = aten.mul.Tensor(silu, arg_1)
return [mul]
---
arg_0: f32[2, 3, 8]
arg_1: f32[2, 3, 8]
gated_act: f32[2, 3, 8] = llmopt.gated_act.default(arg_0, arg_1, silu)
return [gated_act]""",
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda gate, up: F.silu(gate) + up, "the activation is not a factor"),
        (lambda gate, up: F.silu(gate) * up + F.silu(gate).sum(), "the activation has several users"),
        (lambda gate, up: F.silu(gate) * up[:, :, :1], "the other factor has another shape or dtype"),
        (lambda gate, up: F.silu(gate) * 2.0, "the other factor has another shape or dtype"),
        (lambda gate, up: torch.tanh(gate) * up, None),
    ],
)
def test_must_not_fire(function: Callable[..., Any], reason: str | None) -> None:
    must_not_fire(RaiseGatedAct(), reason, function, GATE, UP)
