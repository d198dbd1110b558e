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


def every_other(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def halves(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = q.chunk(2, -1)
    cos, sin = cos[:, None, :, :8], sin[:, None, :, :8]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def pairs(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None, :, ::2], sin[:, None, :, ::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def heads_behind(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, cos, sin = q.transpose(1, 2).contiguous(), cos[:, :, None], sin[:, :, None]
    return q * cos + rotate_half(q) * sin


def split(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = q.split([12, 4], -1)
    cos, sin = (t[:, None, :, :6].repeat_interleave(2, -1) for t in (cos, sin))
    return torch.cat([turned * cos + every_other(turned) * sin, passed], -1)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], bool, int]] = {
    "interleaved": (lambda q, cos, sin: q * cos[:, None] + every_other(q) * sin[:, None], True, 16),
    "halves": (halves, False, 16),
    "pairs": (pairs, True, 16),
    "heads behind": (heads_behind, False, 16),
    "interleaved, partial, by a split": (split, True, 12),
    "without a batch": (lambda q, cos, sin: q * cos[0] + rotate_half(q) * sin[0], False, 16),
    "without an axis of heads": (lambda q, cos, sin: q * cos + rotate_half(q) * sin, False, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    function, is_interleaved, rotary = SPELLINGS[name]
    result = rewrite(RaiseRope(), function, Q.to(dtype), COS.to(dtype), SIN.to(dtype))
    (node,) = nodes_of(result.after, llmopt_ops.rope.default)
    assert node.args[3] is is_interleaved
    assert tensor(node).shape == (1, 7, 4, 16) and tensor(node.args[1]).shape == (1, 7, rotary)
    assert not result.count("aten.neg") and not result.count("aten.stack") and not result.count("aten.sub.Tensor")


def test_one_token_of_symbolic_batch() -> None:
    """Where the length is 1, the axis of heads is told by the other sizes."""
    q, cos, sin = torch.randn(3, 4, 1, 16), torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    result = rewrite(RaiseRope(), rope, q, cos, sin, marked=[(0, 0), (1, 0), (2, 0)])
    (node,) = nodes_of(result.after, llmopt_ops.rope.default)
    assert tuple(tensor(node).shape)[1:] == (1, 4, 16)


OTHER = "the rotated half belongs to another tensor"


def other_sign(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos[:, None] + torch.cat((q[..., 8:], -q[..., :8]), -1) * sin[:, None]


def uneven(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos[:, None] + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin[:, None]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, cos, sin: q * cos[:, None] + every_other(rotate_half(q)) * sin[:, None], OTHER),
        (
            lambda q, cos, sin: torch.cat(
                (
                    q[..., :8] * cos[:, None, :, :8] - q[..., 8:] * sin[:, None, :, :8],
                    q[..., 8:] * cos[:, None, :, :8] - q[..., :8] * sin[:, None, :, :8],
                ),
                -1,
            ),
            None,
        ),
        (other_sign, None),
        (uneven, None),
        (lambda q, cos, sin: q * cos[:, None] - rotate_half(q) * sin[:, None], None),
        (
            lambda q, cos, sin: torch.add(q * cos[:, None], rotate_half(q) * sin[:, None], alpha=2),
            "the sum has a factor",
        ),
        (
            lambda q, cos, sin: q.cos() * cos[:, None] + rotate_half(q) * sin[:, None],
            OTHER,
        ),
        (
            lambda q, cos, sin: q[0] * cos + rotate_half(q[0]) * sin,
            "x is not of four dimensions, or cos or sin is none that broadcasts over heads",
        ),
        (
            lambda q, cos, sin: q * cos[:, None, :, :1] + rotate_half(q) * sin[:, None, :, :1],
            "cos and sin have another size than x",
        ),
        (
            lambda q, cos, sin: q * cos[..., :1].clone()[:, None] + rotate_half(q) * sin[..., :1].clone()[:, None],
            "cos and sin have another size than x",
        ),
        (
            lambda q, cos, sin: q * cos[:, :1].clone()[:, None] + rotate_half(q) * sin[:, :1].clone()[:, None],
            "cos and sin are not shared by the heads",
        ),
        (
            lambda q, cos, sin: q * cos.double()[:, None] + rotate_half(q) * sin.double()[:, None],
            "cos and sin differ in shape, or from x in dtype",
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
