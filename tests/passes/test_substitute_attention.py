"""Attention in the spellings that models use, and softmaxes that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.rewriting import Rewritten, assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.compiler.graph import nodes_of, placeholders, tensor, to_expr
from llmopt.compiler.verify import compare_graphs
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.substitute_attention import SubstituteAttention

S, H, G, D = 9, 4, 2, 8
Q, K, V = torch.randn(1, H, S, D), torch.randn(1, G, S, D), torch.randn(1, G, S, D)
LENGTHS = [(0, 2), (1, 2), (2, 2)]
SCALE = 0.3


def repeat_kv(x: Tensor) -> Tensor:
    batch, groups, length, size = x.shape
    return x[:, :, None].expand(batch, groups, H // groups, length, size).reshape(batch, H, length, size)


def causal_mask(length: int, window: int = 0) -> Tensor:
    i = torch.arange(length)
    seen = i[None, :] <= i[:, None]
    return seen & (i[None, :] > i[:, None] - window) if window else seen


def own_position(length: int) -> Tensor:
    i = torch.arange(length)
    return i[None, :] == i[:, None]


def additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)


def sdpa_interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal_mask(q.shape[2])[None, None]
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask, scale=SCALE)


def sdpa_additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = additive(causal_mask(q.shape[2], 4)).to(q.dtype)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


def eager(q: Tensor, k: Tensor, v: Tensor, cap: float = 0.0, window: int = 0) -> Tensor:
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE
    if cap:
        scores = torch.tanh(scores / cap) * cap
    scores = scores + additive(causal_mask(q.shape[2], window))[None, None].to(q.dtype)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v))


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager(q, k, v, 2.0, 3)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeat_kv(k).mT / D**0.5
    scores = torch.where(causal_mask(q.shape[2]), scores, torch.finfo(scores.dtype).min)
    return F.softmax(scores, -1) @ repeat_kv(v)


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ repeat_kv(k).mT / D**0.5).masked_fill(~causal_mask(q.shape[2], 3), -torch.inf)
    return F.softmax(scores, -1) @ repeat_kv(v)


def low_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeat_kv(k).mT / D**0.5
    scores = torch.where(causal_mask(q.shape[2]).logical_not(), torch.finfo(scores.dtype).min, scores)
    return F.softmax(scores, -1) @ repeat_kv(v)


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ repeat_kv(k).mT, -1) @ repeat_kv(v)


# name -> (function, causal, scale, softcap, window)
SPELLINGS: dict[str, tuple[Callable[..., Tensor], bool, float, float, int]] = {
    "sdpa": (sdpa, True, D**-0.5, 0.0, 0),
    "sdpa, repeat_interleave": (sdpa_interleaved, True, D**-0.5, 0.0, 0),
    "sdpa, grouped": (sdpa_gqa, True, D**-0.5, 0.0, 0),
    "sdpa, boolean mask": (sdpa_mask, True, SCALE, 0.0, 0),
    "sdpa, additive mask": (sdpa_additive, True, D**-0.5, 0.0, 4),
    "softmax": (eager, True, SCALE, 0.0, 0),
    "softmax with a cap and a window": (capped, True, SCALE, 2.0, 3),
    "softmax of filled scores": (filled, True, D**-0.5, 0.0, 0),
    "softmax of scores under masked_fill": (masked_fill, True, D**-0.5, 0.0, 3),
    "the low number first": (low_first, True, D**-0.5, 0.0, 0),
    "no mask": (bidirectional, False, 1.0, 0.0, 0),
}


def attention_of(result: Rewritten) -> Any:
    (node,) = nodes_of(result.after, llmopt_ops.attention.default)
    return node


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    function, causal, scale, softcap, window = SPELLINGS[name]
    result = rewrite(SubstituteAttention(), function, *(t.to(dtype) for t in (Q, K, V)), marked=LENGTHS)
    assert result.report.matched == 1 and not result.report.notes
    node = attention_of(result)
    assert node.args[3:5] == (None, causal)
    assert node.args[5] == pytest.approx(scale) and node.args[6] == pytest.approx(softcap) and node.args[7] == window
    assert int(tensor(node.args[1]).shape[2]) == G, "keys are taken from before the repetition"
    assert not result.count("aten.softmax.int") and not result.count("aten.arange")


@pytest.mark.parametrize("name", ["sdpa", "softmax"])
def test_disabled(name: str) -> None:
    assert "llmopt.attention" not in ops_when_disabled(SubstituteAttention(), SPELLINGS[name][0], Q, K, V)


def test_golden() -> None:
    assert_golden(
        rewrite(SubstituteAttention(), capped, Q, K, V, marked=LENGTHS),
        """\
arg_0: Sym(s0)
arg_1: f32[1, 2, s0, 8]
arg_2: Sym(s0)
arg_3: f32[1, 4, s0, 8]
arg_4: f32[1, 2, s0, 8]
unsqueeze: f32[1, 2, 1, s0, 8] = aten.unsqueeze.default(arg_1, 2)
expand: f32[1, 2, 2, s0, 8] = aten.expand.default(unsqueeze, [1, 2, 2, arg_2, 8])
clone: f32[1, 2, 2, s0, 8] = aten.clone.default(expand, memory_format=torch.contiguous_format)
view: f32[1, 4, s0, 8] = aten.view.default(clone, [1, 4, arg_2, 8])
transpose: f32[1, 4, 8, s0] = aten.transpose.int(view, 2, 3)
matmul: f32[1, 4, s0, s0] = aten.matmul.default(arg_3, transpose)
mul: f32[1, 4, s0, s0] = aten.mul.Tensor(matmul, 0.3)
div: f32[1, 4, s0, s0] = aten.div.Tensor(mul, 2.0)
tanh: f32[1, 4, s0, s0] = aten.tanh.default(div)
mul_1: f32[1, 4, s0, s0] = aten.mul.Tensor(tanh, 2.0)
arange: i64[s0] = aten.arange.default(arg_2, device=cpu, pin_memory=False)
unsqueeze_1: i64[1, s0] = aten.unsqueeze.default(arange, 0)
unsqueeze_2: i64[s0, 1] = aten.unsqueeze.default(arange, 1)
le: b8[s0, s0] = aten.le.Tensor(unsqueeze_1, unsqueeze_2)
sub: i64[s0, 1] = aten.sub.Tensor(unsqueeze_2, 3)
gt: b8[s0, s0] = aten.gt.Tensor(unsqueeze_1, sub)
bitwise_and: b8[s0, s0] = aten.bitwise_and.Tensor(le, gt)
where: f32[s0, s0] = aten.where.Scalar(bitwise_and, 0.0, -3.4028234663852886e+38)
unsqueeze_3: f32[1, s0, s0] = aten.unsqueeze.default(where, 0)
unsqueeze_4: f32[1, 1, s0, s0] = aten.unsqueeze.default(unsqueeze_3, 1)
add: f32[1, 4, s0, s0] = aten.add.Tensor(mul_1, unsqueeze_4)
softmax: f32[1, 4, s0, s0] = aten.softmax.int(add, -1, torch.float32)
unsqueeze_5: f32[1, 2, 1, s0, 8] = aten.unsqueeze.default(arg_4, 2)
expand_1: f32[1, 2, 2, s0, 8] = aten.expand.default(unsqueeze_5, [1, 2, 2, arg_2, 8])
clone_1: f32[1, 2, 2, s0, 8] = aten.clone.default(expand_1, memory_format=torch.contiguous_format)
view_1: f32[1, 4, s0, 8] = aten.view.default(clone_1, [1, 4, arg_2, 8])
matmul_1: f32[1, 4, s0, 8] = aten.matmul.default(softmax, view_1)
return [matmul_1]
---
arg_0: Sym(s0)
arg_1: f32[1, 2, s0, 8]
arg_2: Sym(s0)
arg_3: f32[1, 4, s0, 8]
arg_4: f32[1, 2, s0, 8]
transpose: f32[1, s0, 4, 8] = aten.transpose.int(arg_3, 1, 2)
transpose_1: f32[1, s0, 2, 8] = aten.transpose.int(arg_1, 1, 2)
transpose_2: f32[1, s0, 2, 8] = aten.transpose.int(arg_4, 1, 2)
attention: f32[1, s0, 4, 8] = llmopt.attention.default(transpose, transpose_1, transpose_2, None, True, 0.3, 2.0, 3, None, None)
transpose_3: f32[1, 4, s0, 8] = aten.transpose.int(attention, 1, 2)
return [transpose_3]""",  # noqa: E501
    )


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Bloom: heads in the batch, the bias as the addend of the product, minima filled in."""
    length = q.shape[2]
    slopes = 2.0 ** -torch.arange(1, H + 1)
    bias = (slopes[:, None] * torch.arange(length)[None, :])[:, None, :]
    k = repeat_kv(k).reshape(H, length, D).transpose(1, 2)
    scores = torch.baddbmm(bias, q.reshape(H, length, D), k, beta=1.0, alpha=SCALE).view(1, H, length, length)
    weights = F.softmax(scores + additive(causal_mask(length)), dim=-1).view(H, length, length)
    return torch.bmm(weights, repeat_kv(v).reshape(H, length, D))


def test_alibi() -> None:
    node = attention_of(rewrite(SubstituteAttention(), alibi, Q, K, V, marked=LENGTHS))
    assert node.args[4:8] == (True, SCALE, 0.0, 0)
    assert node.args[8].args[0] == pytest.approx([0.5, 0.25, 0.125, 0.0625])


def test_a_mask_of_data_stays_an_operand() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    mask = torch.rand(1, 1, S, S) > 0.3
    for given in (mask, torch.randn(1, H, S, S)):
        result = rewrite(SubstituteAttention(), model, Q, K, V, given)
        node = attention_of(result)
        assert node.args[3].op == "placeholder" and node.args[4] is False
        assert result.report.notes == ["mask kept as an operand: the mask depends on data"]


def test_the_lower_triangle_of_a_buffer() -> None:
    """As models write it that keep a mask of ones and zeros: true means hidden."""

    def model(q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> Tensor:
        scores = (q @ repeat_kv(k).mT) * SCALE
        scores = scores.masked_fill(ones[:, :, : q.shape[2], : q.shape[2]] == 0, -torch.inf)
        return F.softmax(scores, -1) @ repeat_kv(v)

    result = rewrite(SubstituteAttention(), model, Q, K, V, torch.ones(1, 1, 32, 32).tril(), marked=LENGTHS)
    node = attention_of(result)
    assert tensor(node.args[3]).dtype == torch.bool and node.args[4:6] == (False, SCALE)
    assert result.report.notes == ["mask kept as an operand: the mask depends on data"]


def test_a_rule_beside_a_mask_of_data() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = torch.where(seen | own_position(q.shape[2]), q @ repeat_kv(k).mT, torch.finfo(q.dtype).min)
        return F.softmax(scores + additive(causal_mask(q.shape[2], 4)), -1) @ repeat_kv(v)

    node = attention_of(rewrite(SubstituteAttention(), model, Q, K, V, torch.rand(1, 1, S, S) > 0.3))
    assert tensor(node.args[3]).dtype == torch.float32, "a finite number is not -inf"
    assert (node.args[4], node.args[7]) == (True, 4)


def test_several_masks_of_data_are_one_operand() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        own = own_position(S)
        scores = (q @ repeat_kv(k).mT + bias).masked_fill(hidden & ~own, -torch.inf) + bias[:, :1]
        return F.softmax(torch.where(seen | own, scores, -1e9), -1) @ repeat_kv(v)

    hidden, seen = torch.rand(1, 1, S, S) > 0.6, torch.rand(1, 1, 1, S) > 0.3
    result = rewrite(SubstituteAttention(), model, Q, K, V, hidden, torch.randn(1, H, S, S), seen)
    assert tensor(attention_of(result).args[3]).shape == (1, H, S, S)


def test_masks_of_flattened_heads_are_unflattened() -> None:
    """Heads lie in the batch, and so they do in the mask: with two sequences it is not `[H, S, S]`."""

    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.reshape(2 * H, S, D) for t in (q, k, v))
        return torch.bmm(F.softmax(torch.baddbmm(bias, q, k.mT), -1), v).reshape(2, H, S, D)

    q, k, v = (torch.randn(2, H, S, D) for _ in range(3))
    for first in (2 * H, 1):
        node = attention_of(rewrite(SubstituteAttention(), model, q, k, v, torch.randn(first, 1, S)))
        assert tuple(tensor(node.args[3]).shape) == ((2, H, 1, S) if first > 1 else (1, 1, S))


def test_a_mask_without_a_rule_stays_an_operand() -> None:
    def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        mask = (i[None, :] <= i[:, None]) & (i[None, :] // 4 == i[:, None] // 4)
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    result = rewrite(SubstituteAttention(), chunked, Q, K, V, marked=LENGTHS)
    assert attention_of(result).args[3] is not None
    assert result.report.notes[0].startswith("mask kept as an operand: no rule")


def test_heads_of_different_groups_stay_repeated() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), v, is_causal=True)

    node = attention_of(rewrite(SubstituteAttention(), model, Q, K, torch.randn(1, H, S, D)))
    assert [int(tensor(n).shape[2]) for n in node.args[:3]] == [H, H, H]


def test_values_of_another_width() -> None:
    result = rewrite(SubstituteAttention(), sdpa, Q, K, torch.randn(1, G, S, 5))
    assert tuple(tensor(attention_of(result)).shape) == (1, S, H, 5)


def test_a_sum_that_leads_back_through_many_layers() -> None:
    """Each layer is read twice by the next: there are 2 ** 40 ways from the softmax to the input."""

    def router(x: Tensor) -> Tensor:
        for _ in range(40):
            x = x + x.sin()
        return F.softmax(x + x.cos(), -1)

    must_not_fire(SubstituteAttention(), "softmax of something that is not q @ k^T", router, torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-2e4, -1e9])
def test_a_query_that_sees_nothing_gives_the_mean(fill: float, dtype: torch.dtype) -> None:
    """Where what is hidden gets a finite number, as the padding in front of a short sequence does."""

    def model(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
        scores = (q @ repeat_kv(k).mT + bias).masked_fill(hidden, max(fill, torch.finfo(q.dtype).min))
        return F.softmax(scores.float(), -1).to(q.dtype) @ repeat_kv(v)

    args = [t.to(dtype) for t in (Q, K, V)]
    hidden = torch.arange(S) > torch.arange(S)[:, None] + 1
    hidden[2:4] = True
    for bias in (torch.zeros((), dtype=dtype), torch.randn(S, dtype=dtype)):
        result = rewrite(SubstituteAttention(), model, *args, hidden, bias)
        assert result.report.matched == 1
        compare_graphs(result.before, result.after, in_order(result.before, *args, hidden, bias), "attention", 1.0)


def in_order(graph: Any, *args: Tensor) -> list[Tensor]:
    """Arguments of distinct shapes or dtypes in the order of the graph's placeholders."""
    left = list(args)
    found = []
    for node in placeholders(graph):
        index = next(i for i, t in enumerate(left) if t.shape == tensor(node).shape and t.dtype == tensor(node).dtype)
        found.append(left.pop(index))
    return found


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q.float() @ repeat_kv(k).float().mT * SCALE, -1).to(v.dtype) @ repeat_kv(v)


def upcast_before_repetition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.float() @ repeat_kv(k.float()).transpose(2, 3) * SCALE
    return F.softmax(scores + additive(causal_mask(S)), -1).to(v.dtype) @ repeat_kv(v)


def upcast_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q.float() @ repeat_kv(k).transpose(2, 3).float() * SCALE, -1).to(v.dtype) @ repeat_kv(v)


@pytest.mark.parametrize("function", [upcast, upcast_before_repetition, upcast_transposed])
def test_scores_in_float32(function: Callable[..., Tensor]) -> None:
    """The operands come from before the conversion: the op computes scores in float32 anyway."""
    result = rewrite(SubstituteAttention(), function, *(t.bfloat16() for t in (Q, K, V)))
    node = attention_of(result)
    assert {tensor(n).dtype for n in (node, *node.args[:3])} == {torch.bfloat16}
    assert [int(tensor(n).shape[2]) for n in node.args[:3]] == [H, G, G]


def test_operands_of_two_types_are_widened() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ repeat_kv(k).mT, -1).to(v.dtype) @ repeat_kv(v)

    node = attention_of(rewrite(SubstituteAttention(), model, Q, K, V.bfloat16()))
    assert {tensor(n).dtype for n in (node, *node.args[:3])} == {torch.float32}


def test_sizes_that_must_be_equal_become_one() -> None:
    """Keys and values of two caches: each length is a symbol of its own until attention takes both."""
    k, v = torch.randn(1, H, S + 1, D), torch.randn(1, H, S + 1, 5)
    model = F.scaled_dot_product_attention
    node = attention_of(rewrite(SubstituteAttention(), model, Q, k, v, marked=[(0, 2), (1, 2), (2, 2)]))
    assert to_expr(tensor(node.args[1]).shape[1]) == to_expr(tensor(node.args[2]).shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * SCALE
    return F.softmax(scores if mask is None else scores + mask, -1) @ v


def spread(x: Tensor, batch: int, length: int) -> Tensor:
    """Repeats heads, and with them the batch or the sequence."""
    return x[:, :, None].expand(batch, G, H // G, length, D).reshape(batch, H, length, D)


B3, B1, ONE = (3, H, S, D), (1, H, S, D), (1, 1, S, D)
EIGHT = ((2, 4, 8, D), (2, 4, 8, D), (2, 8, 8, D))  # heads of queries and keys, and the other way round


@pytest.mark.parametrize(
    ("function", "shapes", "reason"),
    [
        (attend, (B1, B3, B3), "queries, keys and values broadcast"),
        (attend, (B3, B1, B1), "queries, keys and values broadcast"),
        (attend, (B3, B3, B1), "queries, keys and values broadcast"),
        (attend, (ONE, B1, B1), "queries, keys and values broadcast"),
        (attend, (B1, B1, ONE), "queries, keys and values broadcast"),
        (attend, (B1, ONE, B1), "queries, keys and values broadcast"),
        (F.scaled_dot_product_attention, (B1, B3, B3), "queries, keys and values broadcast"),
        (attend, (B1, B1, B1, (3, 1, S, S)), "scores are not [B, H, S, L]"),
        (lambda q, k, v: F.softmax(q @ k.mT, -1).view(2, 8, 4, 8) @ v, EIGHT, "queries, keys and values broadcast"),
        (
            lambda q, k, v, m: F.softmax(((q @ k.mT).view(1, 2, 2, S, S) + m).view(1, H, S, S), -1) @ v,
            (B1, B1, B1, (1, 2, 1, S, S)),
            "scores are not [B, H, S, L]",
        ),
    ],
)
def test_operands_that_broadcast_stay(
    function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], reason: str
) -> None:
    must_not_fire(SubstituteAttention(), reason, function, *map(torch.randn, shapes))


@pytest.mark.parametrize(("batch", "length"), [(3, S), (1, 2 * S)])
def test_only_heads_are_taken_from_before_a_repetition(batch: int, length: int) -> None:
    first = torch.randn(1, G, S if batch > 1 else 1, D)
    model = lambda q, k, v: attend(q, spread(k, batch, length), spread(v, batch, length))  # noqa: E731
    node = attention_of(rewrite(SubstituteAttention(), model, torch.randn(batch, H, S, D), first, first * 2))
    assert [tuple(tensor(n).shape) for n in node.args[1:3]] == [(batch, length, H, D)] * 2


def test_one_head_of_keys_and_values_is_shared() -> None:
    k, v = torch.randn(1, 1, S, D), torch.randn(1, 1, S, D)
    assert int(tensor(attention_of(rewrite(SubstituteAttention(), attend, Q, k, v)).args[1]).shape[2]) == 1


@pytest.mark.parametrize(
    ("function", "dtype", "reason"),
    [
        (attend, torch.float64, "the op computes in float32"),
        (F.scaled_dot_product_attention, torch.float64, "the op computes in float32"),
        (
            lambda q, k, v: F.softmax((q @ k.mT * 3).int().float(), -1) @ v,
            torch.float32,
            "scores are rounded more coarsely than the result",
        ),
        (
            lambda q, k, v: F.softmax((q @ k.mT).bfloat16().float(), -1) @ v,
            torch.float32,
            "scores are rounded more coarsely than the result",
        ),
        (
            lambda q, k, v: (F.softmax(q @ k.mT, -1) * 1).int().float() @ v,
            torch.float32,
            "scores are rounded more coarsely than the result",
        ),
        (
            lambda q, k, v: F.softmax(q @ k.mT + (q[..., :1] > 0), -1) @ v,
            torch.float32,
            "softmax of something that is not q @ k^T",
        ),
    ],
)
def test_types_that_the_op_does_not_have(function: Callable[..., Any], dtype: torch.dtype, reason: str) -> None:
    must_not_fire(SubstituteAttention(), reason, function, *(torch.randn(B1, dtype=dtype) for _ in range(3)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, k, v: F.softmax(q, 1) @ q.mT, "softmax over another dimension than the last"),
        (lambda q, k, v: F.softmax(q, -1) * 2, "softmax of something that is not q @ k^T"),
        (lambda q, k, v: F.softmax(q @ q.mT, -1) * 2, "softmax is not multiplied by values"),
        (lambda q, k, v: (w := F.softmax(q @ q.mT, -1)) @ q + w.sum(), "softmax is not multiplied by values"),
        (lambda q, k, v: q.mT @ F.softmax(q @ q.mT, -1), "softmax is not multiplied by values"),
        (lambda q, k, v: F.softmax(q @ q.reshape(1, H, D, S), -1) @ q, "the second factor is not k^T"),
        (
            lambda q, k, v: F.softmax((q @ q.mT + 1.5) * 2 + q[..., :1], -1) @ q,
            "softmax of something that is not q @ k^T",
        ),
        (
            lambda q, k, v: F.softmax((q @ q.mT + causal_mask(S) * 1.0) * 2, -1) @ q,
            "a mask inside a scale or a softcap",
        ),
        (
            lambda q, k, v: F.softmax(torch.tanh((q @ q.mT + additive(causal_mask(S))) / 2) * 2, -1) @ q,
            "a mask inside a scale or a softcap",
        ),
        (
            lambda q, k, v: F.softmax(torch.where(causal_mask(S), q @ q.mT, 0.0), -1) @ q,
            "softmax of something that is not q @ k^T",
        ),
        (
            lambda q, k, v: F.softmax(torch.tanh(q @ q.mT / 3) * 2, -1) @ q,
            "softmax of something that is not q @ k^T",
        ),
        (lambda q, k, v: F.softmax(q[0, 0] @ q[0, 0].mT, -1) @ q[0, 0], "q, k, v are not [B, H, S, D]"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[0], q[0], q[0]), "q, k, v are not [B, H, S, D]"),
    ],
)
def test_near_misses(function: Callable[..., Any], reason: str) -> None:
    must_not_fire(SubstituteAttention(), reason, function, Q, K, V)


def test_dropout_stays() -> None:
    """Not compared with itself: it is random."""
    from graphs.rewriting import prepared

    from llmopt.compiler.options import Options
    from llmopt.compiler.pass_manager import PassContext

    caught = prepared(
        SubstituteAttention(), lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True), Q
    )
    report = SubstituteAttention().run(caught.graph, PassContext(Options()))
    assert report.matched == 0 and report.skipped["attention with dropout"] == 1
