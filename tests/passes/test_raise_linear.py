"""Products with weights under any name, how several of one input are merged, and gated activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import randomise
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmopt.compiler.graph import nodes_of, tensor
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.merge_linears import MergeLinears
from llmopt.passes.raise_gated_act import RaiseGatedAct
from llmopt.passes.raise_linear import RaiseLinear

X = torch.randn(2, 5, 8)


class Products(nn.Module):
    """One weight stored `[N, K]`, one `[K, N]`."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return torch.mm(x.reshape(-1, 8), self.v), torch.addmm(self.b, x.reshape(-1, 8), self.v)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "linear without bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_linear(name: str, dtype: torch.dtype) -> None:
    result = rewrite(RaiseLinear(), randomise(MODULES[name]()).to(dtype), X.to(dtype))
    assert result.report.matched == 1 and result.count("llmopt.linear") == 1
    (node,) = nodes_of(result.after, llmopt_ops.linear.default)
    ((weight,), (bias,)) = node.args[1:]
    assert tensor(weight).is_contiguous() and tuple(tensor(weight).shape) == (6, 8)
    assert (bias is None) == ("without" in name)
    assert ("aten.t" in result.targets()) == (name == "conv1d")


def test_mm_and_addmm() -> None:
    result = rewrite(RaiseLinear(), Products(), X)
    assert result.report.matched == 2 and result.count("llmopt.linear") == 2
    assert not {"aten.mm", "aten.addmm"} & set(result.targets())


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseLinear(), randomise(Conv1D(6, 8)), X),
        """\
arg_0: f32[2, 5, 8]
arg_1: f32[6]
arg_2: f32[8, 6]
view: f32[10, 8] = aten.view.default(arg_0, [-1, 8])
addmm: f32[10, 6] = aten.addmm.default(arg_1, view, arg_2)
view_1: f32[2, 5, 6] = aten.view.default(addmm, [2, 5, 6])
return [view_1]
---
arg_0: f32[2, 5, 8]
arg_1: f32[6]
arg_2: f32[8, 6]
view: f32[10, 8] = aten.view.default(arg_0, [-1, 8])
t: f32[6, 8] = aten.t.default(arg_2)
clone: f32[6, 8] = aten.clone.default(t, memory_format=torch.contiguous_format)
linear: f32[10, 6] = llmopt.linear.default(view, [clone], [arg_1])
view_1: f32[2, 5, 6] = aten.view.default(linear, [2, 5, 6])
return [view_1]""",
    )


def test_disabled() -> None:
    assert "llmopt.linear" not in ops_when_disabled(RaiseLinear(), randomise(nn.Linear(8, 6)), X)


class Twisted(Products):
    """Products that are no linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, 8)
        if self.kind == "computed":
            return torch.mm(rows, rows.t())
        if self.kind == "beta":
            return torch.addmm(self.b, rows, self.v, beta=0.5)
        if self.kind == "alpha":
            return torch.addmm(self.b, rows, self.v, alpha=2.0)
        return torch.addmm(torch.mm(rows.tanh(), rows.t())[:, :6], rows, self.v)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("computed", "the second factor is computed"),
        ("beta", "addmm with alpha or beta"),
        ("alpha", "addmm with alpha or beta"),
        ("matrix", "the bias has not one number for each output"),
    ],
)
def test_near_misses(kind: str, reason: str) -> None:
    must_not_fire(RaiseLinear(), reason, Twisted(kind), X)


@pytest.mark.parametrize("bias", [(1,), (), (5, 6)])
def test_a_bias_that_broadcasts_stays(bias: tuple[int, ...]) -> None:
    reason = "the bias has not one number for each output"
    must_not_fire(RaiseLinear(), reason, F.linear, X[0], torch.randn(6, 8), torch.randn(bias))
    if bias == (1,):
        products = Products()
        products.b = nn.Parameter(torch.randn(1))
        result = rewrite(RaiseLinear(), products, X)
        assert result.report.skipped[reason] == 1 and result.report.matched == 1


def test_vectors_are_not_matrices() -> None:
    must_not_fire(RaiseLinear(), "operands are not matrices", nn.Linear(8, 6), torch.randn(8))


# ---- merge_linears -------------------------------------------------------------------------------------------------


class Qkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x).cos(), self.k(x).sin(), self.v(x)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_one_input_are_merged(dtype: torch.dtype) -> None:
    result = rewrite(MergeLinears(), randomise(Qkv()).to(dtype), X.to(dtype))
    assert result.report.matched == 1
    (node,) = nodes_of(result.after, llmopt_ops.linear.default)
    assert [tuple(tensor(w).shape) for w in node.args[1]] == [(12, 8), (4, 8), (4, 8)]
    assert [bias is None for bias in node.args[2]] == [False, True, False]
    assert result.count("aten.cat") == 1 and not result.count("aten.clone"), "nothing is concatenated or copied"


def test_merge_golden() -> None:
    assert_golden(
        rewrite(MergeLinears(), randomise(Qkv()), X),
        """\
arg_0: f32[12, 8]
arg_1: f32[12]
arg_2: f32[2, 5, 8]
arg_3: f32[4, 8]
arg_4: f32[4, 8]
arg_5: f32[4]
linear: f32[2, 5, 12] = llmopt.linear.default(arg_2, [arg_0], [arg_1])
cos: f32[2, 5, 12] = aten.cos.default(linear)
linear_1: f32[2, 5, 4] = llmopt.linear.default(arg_2, [arg_3], [None])
sin: f32[2, 5, 4] = aten.sin.default(linear_1)
linear_2: f32[2, 5, 4] = llmopt.linear.default(arg_2, [arg_4], [arg_5])
cat: f32[2, 5, 20] = aten.cat.default([cos, sin, linear_2], -1)
return [cat]
---
arg_0: f32[12, 8]
arg_1: f32[12]
arg_2: f32[2, 5, 8]
arg_3: f32[4, 8]
arg_4: f32[4, 8]
arg_5: f32[4]
linear: f32[2, 5, 20] = llmopt.linear.default(arg_2, [arg_0, arg_3, arg_4], [arg_1, None, arg_5])
slice: f32[2, 5, 12] = aten.slice.Tensor(linear, 2, 0, 12)
slice_1: f32[2, 5, 4] = aten.slice.Tensor(linear, 2, 12, 16)
slice_2: f32[2, 5, 4] = aten.slice.Tensor(linear, 2, 16, 20)
cos: f32[2, 5, 12] = aten.cos.default(slice)
sin: f32[2, 5, 4] = aten.sin.default(slice_1)
cat: f32[2, 5, 20] = aten.cat.default([cos, sin, slice_2], -1)
return [cat]""",
    )


def test_not_merged_when_disabled() -> None:
    assert ops_when_disabled(MergeLinears(), randomise(Qkv()), X).count("llmopt.linear") == 3


def test_other_inputs_are_not_merged() -> None:
    class Chain(Qkv):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)[..., :8] + self.q(x.cos())[..., :8]

    must_not_fire(MergeLinears(), None, randomise(Chain()), X)


def test_a_weight_that_comes_too_late_is_left_out() -> None:
    class Late(Qkv):
        def forward(self, x: Tensor) -> Tensor:
            first = self.q(x)
            return F.linear(x, first.mean((0, 1))[:8].expand(3, 8).cos()).sum() + first

    must_not_fire(MergeLinears(), "weight is computed after the first product", randomise(Late()), X)


# ---- raise_gated_act -----------------------------------------------------------------------------------------------

ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (F.silu, "silu"),
    "gelu": (F.gelu, "gelu_erf"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "relu": (F.relu, "relu"),
}
GATE, UP = torch.randn(3, 10), torch.randn(3, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTS)
def test_gated_activation(name: str, dtype: torch.dtype) -> None:
    act, word = ACTS[name]
    for function in (lambda g, u: act(g) * u, lambda g, u: u * act(g)):
        result = rewrite(RaiseGatedAct(), function, GATE.to(dtype), UP.to(dtype))
        assert result.targets() == ["llmopt.gated_act"]
        (node,) = nodes_of(result.after, llmopt_ops.gated_act.default)
        assert node.args[2] == word
        assert "llmopt.gated_act" not in ops_when_disabled(RaiseGatedAct(), function, GATE, UP)


def test_gate_and_up_of_one_product() -> None:
    def chunked(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    assert rewrite(RaiseGatedAct(), chunked, torch.randn(3, 20)).count("llmopt.gated_act") == 1


def test_gated_golden() -> None:
    assert_golden(
        rewrite(RaiseGatedAct(), lambda g, u: F.silu(g) * u, GATE, UP),
        """\
arg_0: f32[3, 10]
arg_1: f32[3, 10]
silu: f32[3, 10] = aten.silu.default(arg_0)
mul: f32[3, 10] = aten.mul.Tensor(silu, arg_1)
return [mul]
---
arg_0: f32[3, 10]
arg_1: f32[3, 10]
gated_act: f32[3, 10] = llmopt.gated_act.default(arg_0, arg_1, silu)
return [gated_act]""",
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda g, u: F.silu(g) + u, "the activation is not a factor"),
        (lambda g, u: F.silu(g), "the activation is not a factor"),
        (lambda g, u: (y := F.silu(g)) * u + y, "the activation has several users"),
        (lambda g, u: F.silu(g) * u[:1], "the other factor has another shape or dtype"),
        (lambda g, u: F.silu(g) * 2.0, "the other factor has another shape or dtype"),
        (lambda g, u: F.silu(g) * u.double(), "the other factor has another shape or dtype"),
        (lambda g, u: (y := F.silu(g)) * y, "the other factor has another shape or dtype"),
        (lambda g, u: torch.sigmoid(g) * u, None),
    ],
)
def test_gated_near_misses(function: Callable[..., Any], reason: str | None) -> None:
    must_not_fire(RaiseGatedAct(), reason, function, GATE, UP)
