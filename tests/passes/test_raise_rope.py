"""Rotary embeddings of the whole head and of its first dimensions, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.compiler.graph import nodes_of, tensor
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.raise_rope import RaiseRope

Q = torch.randn(1, 4, 7, 16)
COS, SIN = torch.randn(1, 7, 16), torch.randn(1, 7, 16)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin)


def swapped(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return sin[:, None] * rotate_half(q) + cos[:, None] * q


def partial(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = q[..., :12], q[..., 12:]
    return torch.cat([rope(turned, cos[..., :12].clone(), sin[..., :12].clone()), passed], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "rotary"), [(rope, 16), (swapped, 16), (partial, 12)])
def test_rope(function: Callable[..., Tensor], rotary: int, dtype: torch.dtype) -> None:
    args = (Q.to(dtype), COS.to(dtype), SIN.to(dtype))
    result = rewrite(RaiseRope(), function, *args)
    assert result.report.matched == 1 and result.count("llmopt.rope") == 1
    (node,) = nodes_of(result.after, llmopt_ops.rope.default)
    assert tensor(node.args[1]).shape[-1] == rotary and tensor(node).shape[-1] == 16
    assert not result.count("aten.neg") and not result.count("aten.cat")
    assert "llmopt.rope" not in ops_when_disabled(RaiseRope(), function, *args)


def test_a_batch_of_symbolic_length() -> None:
    q, cos, sin = torch.randn(2, 4, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    marked = [(argument, dim) for argument, dims in enumerate([(0, 2), (0, 1), (0, 1)]) for dim in dims]
    result = rewrite(RaiseRope(), rope, q, cos, sin, marked=marked)
    assert result.count("llmopt.rope") == 1


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseRope(), rope, Q, COS, SIN),
        """\
arg_0: f32[1, 7, 16]
arg_1: f32[1, 7, 16]
arg_2: f32[1, 4, 7, 16]
unsqueeze: f32[1, 1, 7, 16] = aten.unsqueeze.default(arg_0, 1)
unsqueeze_1: f32[1, 1, 7, 16] = aten.unsqueeze.default(arg_1, 1)
mul: f32[1, 4, 7, 16] = aten.mul.Tensor(arg_2, unsqueeze)
slice: f32[1, 4, 7, 8] = aten.slice.Tensor(arg_2, 3, 8, 9223372036854775807)
neg: f32[1, 4, 7, 8] = aten.neg.default(slice)
slice_1: f32[1, 4, 7, 8] = aten.slice.Tensor(arg_2, 3, 0, 8)
cat: f32[1, 4, 7, 16] = aten.cat.default([neg, slice_1], -1)
mul_1: f32[1, 4, 7, 16] = aten.mul.Tensor(cat, unsqueeze_1)
add: f32[1, 4, 7, 16] = aten.add.Tensor(mul, mul_1)
return [add]
---
arg_0: f32[1, 7, 16]
arg_1: f32[1, 7, 16]
arg_2: f32[1, 4, 7, 16]
transpose: f32[1, 7, 4, 16] = aten.transpose.int(arg_2, 1, 2)
rope: f32[1, 7, 4, 16] = llmopt.rope.default(transpose, arg_0, arg_1, False)
transpose_1: f32[1, 4, 7, 16] = aten.transpose.int(rope, 1, 2)
return [transpose_1]""",
    )


def interleaved(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
    return q * cos[:, None] + turned * sin[:, None]


def other_sign(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos[:, None] + torch.cat((q[..., 8:], -q[..., :8]), -1) * sin[:, None]


def uneven(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos[:, None] + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin[:, None]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (interleaved, None),
        (other_sign, None),
        (uneven, None),
        (lambda q, cos, sin: q * cos[:, None] - rotate_half(q) * sin[:, None], None),
        (
            lambda q, cos, sin: torch.add(q * cos[:, None], rotate_half(q) * sin[:, None], alpha=2),
            "the sum has a factor",
        ),
        (
            lambda q, cos, sin: q.cos() * cos[:, None] + rotate_half(q) * sin[:, None],
            "the rotated half belongs to another tensor",
        ),
        (lambda q, cos, sin: q * cos + rotate_half(q) * sin, "cos or sin is not [B, 1, S, R]"),
        (
            lambda q, cos, sin: q * cos[:, None, :, :1] + rotate_half(q) * sin[:, None, :, :1],
            "cos or sin is not [B, 1, S, R]",
        ),
        (
            lambda q, cos, sin: q * cos[..., :1].clone()[:, None] + rotate_half(q) * sin[..., :1].clone()[:, None],
            "cos or sin has another size or dtype than x",
        ),
        (
            lambda q, cos, sin: q * cos[:, :1].clone()[:, None] + rotate_half(q) * sin[:, :1].clone()[:, None],
            "cos or sin has another size or dtype than x",
        ),
        (
            lambda q, cos, sin: q * cos.double()[:, None] + rotate_half(q) * sin.double()[:, None],
            "cos or sin has another size or dtype than x",
        ),
    ],
)
def test_near_misses(function: Callable[..., Any], reason: str | None) -> None:
    must_not_fire(RaiseRope(), reason, function, Q, COS, SIN)


def test_another_rest_is_not_swallowed() -> None:
    """Only the dimensions behind the turned ones, unchanged, belong to the op."""

    def model(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rope(q[..., :12], cos[..., :12].clone(), sin[..., :12].clone())
        return torch.cat([turned, q[..., 12:] * 2], -1)

    result = rewrite(RaiseRope(), model, Q, COS, SIN)
    assert result.count("llmopt.rope") == 1 and result.count("aten.cat") == 1
