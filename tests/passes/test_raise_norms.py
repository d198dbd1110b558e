"""Norms in the spellings that models use, and what only looks like one."""

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
from llmopt.passes.fuse_residual_norm import FuseResidualNorm
from llmopt.passes.raise_norms import RaiseNorms

X, W, B = torch.randn(2, 5, 16), torch.randn(16), torch.randn(16)
EPS = 1e-5


def llama(x: Tensor, w: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return w * y.to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + w.float())).type_as(x)


def squared_by_product(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    return (torch.rsqrt((y * y).mean(dim=2, keepdim=True) + EPS) * y).to(x.dtype) * w


def without_weight(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def wide_weight(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (w.float() * y).to(x.dtype)


def t5(x: Tensor, w: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return w * y.to(x.dtype)


def power(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.pow(y.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).type_as(x)


def quotient(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    return w * (y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).to(x.dtype)


# name -> (function, weight offset, cast first in bfloat16, whether there is a weight)
RMS: dict[str, tuple[Callable[..., Tensor], float, bool, bool]] = {
    "llama": (llama, 0.0, True, True),
    "gemma": (gemma, 1.0, False, True),
    "product": (squared_by_product, 0.0, True, True),
    "no weight": (without_weight, 0.0, False, False),
    "wide weight": (wide_weight, 0.0, False, True),
    "t5": (t5, 0.0, True, True),
    "power": (power, 0.0, False, True),
    "quotient": (quotient, 0.0, True, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str, dtype: torch.dtype) -> None:
    function, offset, cast_first, weighted = RMS[name]
    result = rewrite(RaiseNorms(), function, X.to(dtype), W.to(dtype))
    assert result.targets() == ["llmopt.rms_norm"] and result.report.matched == 1
    (node,) = nodes_of(result.after, llmopt_ops.rms_norm.default)
    assert node.args[2:4] == (EPS, offset)
    assert (node.args[1] is not None) is weighted
    if dtype != torch.float32:  # in float32 there is nothing to round
        assert node.args[4] is cast_first


@pytest.mark.parametrize("name", RMS)
def test_rms_norm_of_symbolic_sizes(name: str) -> None:
    assert rewrite(RaiseNorms(), RMS[name][0], X, W, marked=[(0, 0), (0, 1)]).count("llmopt.rms_norm") == 1


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseNorms(), llama, X.bfloat16(), W.bfloat16()),
        """\
arg_0: bf16[2, 5, 16]
arg_1: bf16[16]
_to_copy: f32[2, 5, 16] = aten._to_copy.default(arg_0, dtype=torch.float32)
pow: f32[2, 5, 16] = aten.pow.Tensor_Scalar(_to_copy, 2)
mean: f32[2, 5, 1] = aten.mean.dim(pow, [-1], True)
add: f32[2, 5, 1] = aten.add.Tensor(mean, 1e-05)
rsqrt: f32[2, 5, 1] = aten.rsqrt.default(add)
mul: f32[2, 5, 16] = aten.mul.Tensor(_to_copy, rsqrt)
_to_copy_1: bf16[2, 5, 16] = aten._to_copy.default(mul, dtype=torch.bfloat16)
mul_1: bf16[2, 5, 16] = aten.mul.Tensor(arg_1, _to_copy_1)
return [mul_1]
---
arg_0: bf16[2, 5, 16]
arg_1: bf16[16]
rms_norm: bf16[2, 5, 16] = llmopt.rms_norm.default(arg_0, arg_1, 1e-05, 0.0, True)
return [rms_norm]""",
    )


def test_disabled() -> None:
    for function, args in ((llama, (X, W)), (layer, (X, W, B))):
        targets = ops_when_disabled(RaiseNorms(), function, *args)
        assert not [t for t in targets if t.startswith("llmopt")]


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (16,), w, b, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_atens_own_norms(dtype: torch.dtype) -> None:
    x, w, b = (t.to(dtype) for t in (X, W, B))
    assert rewrite(RaiseNorms(), layer, x, w, b).targets() == ["llmopt.layer_norm"]
    assert rewrite(RaiseNorms(), lambda x: F.layer_norm(x, (16,)), x).targets() == ["llmopt.layer_norm"]
    result = rewrite(RaiseNorms(), lambda x, w: F.rms_norm(x, (16,), w), x, w)
    (node,) = nodes_of(result.after, llmopt_ops.rms_norm.default)
    assert node.args[2] == torch.finfo(torch.float32).eps
    # Small inputs, where epsilon decides.
    torch.testing.assert_close(
        node.target(x / 1000, w, *node.args[2:]), F.rms_norm(x / 1000, (16,), w), rtol=2e-2, atol=0
    )


def cohere(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    mean = y.mean(-1, keepdim=True)
    y = (y - mean) * torch.rsqrt((y - mean).pow(2).mean(-1, keepdim=True) + EPS)
    return (w.float() * y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_written_out(dtype: torch.dtype) -> None:
    result = rewrite(RaiseNorms(), cohere, (X + 3).to(dtype), W.to(dtype))
    assert result.targets() == ["llmopt.layer_norm"]


def _changed(change: str) -> Callable[[Tensor, Tensor], Tensor]:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        square = y.pow(3) if change == "power" else y.abs() * y if change == "product" else y.pow(2)
        mean = square.mean(1, keepdim=True) if change == "dim" else square.mean(-1, keepdim=True)
        root = torch.rsqrt(mean) if change == "no eps" else torch.rsqrt(mean + EPS)
        if change == "other factor":
            return (root * (y + 1)).to(x.dtype) * w
        if change == "used twice":
            return ((y * root).to(x.dtype) * w) + root.to(x.dtype)
        return (y * root).to(x.dtype) * w if change != "stays wide" else y * root * w.float()

    return norm


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("power", "mean of something that is not x^2"),
        ("product", "mean of something that is not x^2"),
        ("dim", "mean over other dimensions than the last"),
        ("no eps", "rsqrt of something that is not mean(x^2) + eps"),
        ("other factor", "x is not multiplied by the root"),
        ("used twice", "x is not multiplied by the root"),
        ("stays wide", "the result is not converted back to the input's type"),
    ],
)
def test_near_misses(change: str, reason: str) -> None:
    must_not_fire(RaiseNorms(), reason, _changed(change), X.bfloat16(), W.bfloat16())


def test_statistics_in_low_precision_stay() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    must_not_fire(RaiseNorms(), "statistics are not in float32", norm, X.bfloat16())


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (lambda x: rms((x * 3).int().float()), (X,)),
        (lambda x: rms(x.float()), (X.double(),)),
        (lambda x, w: rms(x) * w.half(), (X, W)),
        (lambda x, w: rms(x) * w.float(), (X, torch.arange(16))),
        (lambda x, w: rms(x) * (w + 0.5), (X, torch.arange(16))),
        (lambda x, w: rms(x) * torch.add(w, 1.0, alpha=2), (X, W)),
    ],
)
def test_what_changes_the_values_stays_in_front(function: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    """Conversions that round, of x and of the weight, and sums with alpha."""
    result = rewrite(RaiseNorms(), function, *args)
    (node,) = nodes_of(result.after, llmopt_ops.rms_norm.default)
    assert all(n.op == "call_function" for n in node.all_input_nodes if n is not node.args[0] or len(args) == 1)
    assert node.args[3] == 0.0


def test_a_rounded_input_is_no_wider_one() -> None:
    reason = "the result is not converted back to the input's type"
    must_not_fire(RaiseNorms(), reason, lambda x: rms(x.bfloat16().float()), X)


@pytest.mark.parametrize(("x", "w"), [(X, W[:1]), (X[..., :1], W)])
def test_factors_that_broadcast_are_no_weight(x: Tensor, w: Tensor) -> None:
    result = rewrite(RaiseNorms(), lambda x, w: rms(x) * w, x, w)
    (node,) = nodes_of(result.after, llmopt_ops.rms_norm.default)
    assert node.args[1] is None and result.count("aten.mul.Tensor") == 1


def test_epsilon_with_a_factor_stays() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=2))

    must_not_fire(RaiseNorms(), "rsqrt of something that is not mean(x^2) + eps", norm, X)


def test_layer_norms_that_no_op_computes() -> None:
    must_not_fire(RaiseNorms(), "normalises more than one dimension", lambda x: F.layer_norm(x, (5, 16)), X)
    must_not_fire(RaiseNorms(), "the op computes in float32", lambda x: F.rms_norm(x, (16,)), X.double())
    must_not_fire(RaiseNorms(), "weight of another dtype", lambda x, w: F.rms_norm(x, (16,), w), X.bfloat16(), W)


# ---- fuse_residual_norm --------------------------------------------------------------------------------------------


def residual_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return llama(h, w), h


def residual_layer(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x + r
    return layer(h, w, w) * 2 + h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "target"),
    [(residual_rms, "llmopt.add_rms_norm"), (residual_layer, "llmopt.add_layer_norm")],
)
def test_residual(function: Callable[..., Any], target: str, dtype: torch.dtype) -> None:
    args = tuple(t.to(dtype) for t in (X, torch.randn_like(X), W))
    result = rewrite(FuseResidualNorm(), function, *args)
    assert result.report.matched == 1 and result.count(target) == 1
    assert result.targets()[:3] == [target, "<built-in function getitem>", "<built-in function getitem>"]
    targets = ops_when_disabled(FuseResidualNorm(), function, *args)
    assert target not in targets and target.replace("add_", "") in targets


def test_residual_golden() -> None:
    assert_golden(
        rewrite(FuseResidualNorm(), residual_rms, X, torch.randn_like(X), W),
        """\
arg_0: f32[2, 5, 16]
arg_1: f32[2, 5, 16]
arg_2: f32[16]
add: f32[2, 5, 16] = aten.add.Tensor(arg_0, arg_1)
rms_norm: f32[2, 5, 16] = llmopt.rms_norm.default(add, arg_2, 1e-05, 0.0, True)
return [rms_norm, add]
---
arg_0: f32[2, 5, 16]
arg_1: f32[2, 5, 16]
arg_2: f32[16]
add_rms_norm: (f32[2, 5, 16], f32[2, 5, 16]) = llmopt.add_rms_norm.default(arg_0, arg_1, arg_2, 1e-05, 0.0, True)
getitem: f32[2, 5, 16] = getitem(add_rms_norm, 0)
getitem_1: f32[2, 5, 16] = getitem(add_rms_norm, 1)
return [getitem, getitem_1]""",
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, r, w: llama(x * r, w), "the input is no sum"),
        (lambda x, r, w: llama(x, w), "the input is no sum"),
        (lambda x, r, w: llama(torch.add(x, r, alpha=2), w), "the input is no sum"),
        (lambda x, r, w: llama(x + 1.5, w), "the addends differ in shape or dtype"),
        (lambda x, r, w: llama(x + w, w), "the addends differ in shape or dtype"),
    ],
)
def test_residual_near_misses(function: Callable[..., Any], reason: str) -> None:
    must_not_fire(FuseResidualNorm(), reason, function, X, torch.randn_like(X), W)


def test_two_norms_of_one_sum_add_once() -> None:
    def parallel(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return llama(h, w) * 2, layer(h, v, v) * 3

    result = rewrite(FuseResidualNorm(), parallel, X, torch.randn_like(X), W, B)
    assert result.report.matched == 0 and result.report.skipped["the sum has another norm"] == 2
    assert result.count("aten.add.Tensor") == 1
