"""The vocabulary: every `llmopt::` op, each with schema, reference, cost, samples and tolerances.

Shapes use B batch, S sequence, T tokens of all requests, H heads, D head size, K and N the inner and outer size of a
product. Anything written `[..., X]` has any number of leading dimensions. References compute in float32 and round where
eager transformers code rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from llmopt.compiler.graph import to_expr
from llmopt.compiler.opspec import SUM_ORDER, Cost, Tolerance, check_sizes, nbytes, numel, register_op

Tensor = torch.Tensor

# The reference follows eager and rounds in the middle; kernels keep float32 until the end.
_FEWER_ROUNDINGS = {
    torch.bfloat16: Tolerance(2.4e-2, 1e-2, "the kernel rounds once where eager rounds up to three times"),
    torch.float16: Tolerance(3e-3, 1e-3, "the kernel rounds once where eager rounds up to three times"),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _randn(rng: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=rng) * scale).to(dtype)


# ---- linear --------------------------------------------------------------------------------------------------------


def _linear_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    for weight, bias in zip(weights, biases, strict=True):
        check_sizes("linear", "a weight", weight, (weight.shape[0], x.shape[-1]))
        check_sizes("linear", "a bias", bias, weight.shape[:1])
    return x.new_empty((*x.shape[:-1], sum(w.shape[0] for w in weights)))


def _linear_cost(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Cost:
    rows = numel(x) / to_expr(x.shape[-1])
    written = rows * sum(to_expr(w.shape[0]) for w in weights) * x.element_size()
    flops = sum((2 * rows * numel(w) for w in weights), sympy.Integer(0))
    return Cost(flops, nbytes(x, *weights, *biases), written)


def _linear_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for rows, k, sizes in [(1, 33, (5,)), (3, 64, (17, 8, 8)), (70, 257, (130,)), (2, 7, (1, 1))]:
        x = _randn(rng, dtype, 1, rows, k)
        weights = [_randn(rng, dtype, n, k, scale=k**-0.5) for n in sizes]
        yield x, weights, [_randn(rng, dtype, n) if i % 2 == 0 else None for i, n in enumerate(sizes)]


@register_op(
    "linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor",
    fake=_linear_fake,
    cost=_linear_cost,
    samples=_linear_samples,
    tolerances=SUM_ORDER,
)
def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`x[..., K]` times each of `weights[N_i, K]` transposed, plus `biases[N_i]`, side by side: `[..., sum N_i]`.

    Several weights in one call are how projections of one input are merged: the input is read once and nothing is
    copied, so the weights stay the user's own tensors.
    """
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


# ---- batched linear ------------------------------------------------------------------------------------------------


def _batch(x: Tensor, weight: Tensor) -> Sequence[int]:
    return torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2])


def _batched_linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    check_sizes("batched_linear", "weight", weight, (*weight.shape[:-1], x.shape[-1]))
    return x.new_empty((*_batch(x, weight), x.shape[-2], weight.shape[-2]))


def _batched_linear_cost(x: Tensor, weight: Tensor) -> Cost:
    rows = sympy.prod(map(to_expr, (*_batch(x, weight), x.shape[-2])))
    n, k = map(to_expr, weight.shape[-2:])
    return Cost(2 * rows * n * k, nbytes(x, weight), rows * n * x.element_size())


def _batched_linear_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    shapes = [
        ((2, 3), (2, 3), 5, 7, 33),
        ((4, 1), (4, 3), 1, 19, 64),
        ((), (5,), 40, 9, 130),
        ((2, 1, 3), (2, 1), 3, 4, 1),
    ]
    for x, weight, m, n, k in shapes:
        yield _randn(rng, dtype, *x, m, k), _randn(rng, dtype, *weight, n, k, scale=k**-0.5)


@register_op(
    "batched_linear(Tensor x, Tensor weight) -> Tensor",
    fake=_batched_linear_fake,
    cost=_batched_linear_cost,
    samples=_batched_linear_samples,
    tolerances=SUM_ORDER,
)
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x[..., M, K]` times `weight[..., N, K]` transposed: `[..., M, N]`, leading dimensions broadcast.

    A product of two computed tensors. Its second factor lies as a weight does, so that one kernel serves both.
    """
    return torch.matmul(x, weight.mT)


# ---- grouped linear ------------------------------------------------------------------------------------------------


def _grouped_linear_fake(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    check_sizes("grouped_linear", "weights", weights, (*weights.shape[:2], x.shape[-1]))
    check_sizes("grouped_linear", "ends", ends, weights.shape[:1])
    return x.new_empty((x.shape[0], weights.shape[1]))


def _grouped_linear_cost(x: Tensor, weights: Tensor, ends: Tensor) -> Cost:
    groups, n, k = map(to_expr, weights.shape)
    rows = to_expr(x.shape[0])
    # A group without rows is not read.
    read = nbytes(x, ends) + nbytes(weights) * sympy.Min(1, rows / groups)
    return Cost(2 * rows * n * k, read, rows * n * x.element_size())


def _grouped_linear_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for counts, n, k in [((0, 1, 2), 5, 33), ((3, 0, 0, 40), 17, 64), ((1,), 130, 7)]:
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        weights = _randn(rng, dtype, len(counts), n, k, scale=k**-0.5)
        yield _randn(rng, dtype, sum(counts), k), weights, ends
    yield _randn(rng, dtype, 9, 20), _randn(rng, dtype, 2, 6, 20, scale=20**-0.5), torch.tensor([2, 6])


@register_op(
    "grouped_linear(Tensor x, Tensor weights, Tensor ends) -> Tensor",
    fake=_grouped_linear_fake,
    cost=_grouped_linear_cost,
    samples=_grouped_linear_samples,
    tolerances=SUM_ORDER,
)
def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows of `x[T, K]` times its own one of `weights[E, N, K]` transposed: `[T, N]`.

    Group e are the rows from `ends[e - 1]` (0 for the first) up to `ends[e]`; ends are int32 or int64, and do not
    decrease. Rows behind the last end give zeros.
    """
    out = x.new_zeros((x.shape[0], weights.shape[1]))
    begin = 0
    for group, end in enumerate(ends.tolist()):
        out[begin:end] = F.linear(x[begin:end], weights[group])
        begin = end
    return out


# ---- normalisation -------------------------------------------------------------------------------------------------


def _norm_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for rows, cols in [(1, 8), (5, 33), (3, 257)]:
        weight = _randn(rng, dtype, cols)
        yield _randn(rng, dtype, 1, rows, cols, scale=3.0), _randn(rng, dtype, 1, rows, cols), weight


def _rms_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for x, _, weight in _norm_samples(dtype, rng):
        yield x, weight, 1e-6, 0.0, True
        yield x, weight, 1e-5, 1.0, False
        yield x, None, 1e-6, 0.0, False


def _check_norm(op: str, x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None = None) -> None:
    check_sizes(op, "residual", residual, x.shape)
    for name, vector in vectors.items():
        check_sizes(op, name, vector, x.shape[-1:])


def _rms_norm_fake(x: Tensor, weight: Tensor | None, *_: Any) -> Tensor:
    _check_norm("rms_norm", x, {"weight": weight})
    return x.new_empty(x.shape)


def _norm_cost(x: Tensor, weight: Tensor | None, *rest: Any) -> Cost:
    bias = rest[0] if isinstance(rest[0], Tensor) else None
    return Cost(4 * numel(x), nbytes(x, weight, bias), nbytes(x))


@register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_first) -> Tensor",
    fake=_rms_norm_fake,
    cost=_norm_cost,
    samples=_rms_samples,
    tolerances=_FEWER_ROUNDINGS,
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool) -> Tensor:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019), computed in float32.

    `y = x * rsqrt(mean(x^2) + eps)`, then times `weight + weight_offset`. With `cast_first`, y is rounded to x's type
    before the product (Llama); else the product is taken in float32 and rounded once (Gemma).
    """
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if cast_first:
        return ((weight + weight_offset) * y.to(x.dtype)).to(x.dtype)
    return (y * (weight.float() + weight_offset)).to(x.dtype)


def _add_rms_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for x, residual, weight in _norm_samples(dtype, rng):
        yield x, residual, weight, 1e-6, 0.0, True
        yield x, residual, weight, 1e-5, 1.0, False


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    _check_norm("add_rms_norm", x, {"weight": weight}, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_norm_cost(x: Tensor, residual: Tensor, weight: Tensor | None, *rest: Any) -> Cost:
    bias = rest[0] if isinstance(rest[0], Tensor) else None
    return Cost(5 * numel(x), nbytes(x, residual, weight, bias), 2 * nbytes(x))


@register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset, bool cast_first)"
    " -> (Tensor, Tensor)",
    fake=_add_rms_norm_fake,
    cost=_add_norm_cost,
    samples=_add_rms_samples,
    tolerances=_FEWER_ROUNDINGS,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`: the sum is rounded to x's type and lives on as the next residual."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset, cast_first), total


def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check_norm("layer_norm", x, {"weight": weight, "bias": bias})
    return x.new_empty(x.shape)


def _layer_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for x, _, weight in _norm_samples(dtype, rng):
        yield x, weight, _randn(rng, dtype, weight.shape[0]), 1e-5
        yield x + 100, None, None, 1e-5


@register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fake=_layer_norm_fake,
    cost=_norm_cost,
    samples=_layer_samples,
    tolerances={
        **_FEWER_ROUNDINGS,
        torch.float32: Tolerance(1e-5, 1e-4, "rows of mean 100 and deviation 3 lose two digits in the difference"),
    },
)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., 2016); statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _check_norm("add_layer_norm", x, {"weight": weight, "bias": bias}, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_layer_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for x, residual, weight in _norm_samples(dtype, rng):
        yield x, residual, weight, _randn(rng, dtype, weight.shape[0]), 1e-5


@register_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    fake=_add_layer_norm_fake,
    cost=_add_norm_cost,
    samples=_add_layer_samples,
    tolerances=_FEWER_ROUNDINGS,
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`(layer_norm(x + residual), x + residual)`."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


# ---- feed-forward --------------------------------------------------------------------------------------------------


def _gated_fake(gate: Tensor, up: Tensor, act: str) -> Tensor:
    check_sizes("gated_act", "up", up, gate.shape)
    return gate.new_empty(gate.shape)


def _gated_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for rows, cols in [(1, 7), (5, 64), (3, 130)]:
        for act in ACTIVATIONS:
            yield _randn(rng, dtype, 1, rows, cols, scale=2.0), _randn(rng, dtype, 1, rows, cols), act
    both = _randn(rng, dtype, 1, 4, 66)
    yield both[..., :33], both[..., 33:], "silu"


@register_op(
    "gated_act(Tensor gate, Tensor up, str act) -> Tensor",
    fake=_gated_fake,
    cost=lambda gate, up, act: Cost(8 * numel(gate), nbytes(gate, up), nbytes(gate)),
    samples=_gated_samples,
    tolerances=_FEWER_ROUNDINGS,
)
def gated_act(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, elementwise over `[..., I]`; act is one of ACTIVATIONS (GLU variants, Shazeer 2020)."""
    return ACTIVATIONS[act](gate) * up


def _moe_fake(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    rows, hidden = x.shape
    experts, inner = gate_up.shape[0], down.shape[2]
    check_sizes("moe", "expert_ids", ids, (rows, ids.shape[-1]))
    check_sizes("moe", "expert_weights", weights, ids.shape)
    check_sizes("moe", "gate_up", gate_up, (experts, 2 * inner, hidden))
    check_sizes("moe", "down", down, (experts, hidden, inner))
    return x.new_empty(x.shape)


def _moe_cost(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Cost:
    slots = numel(ids)
    per_slot = 2 * (numel(gate_up) + numel(down)) / to_expr(gate_up.shape[0])
    # Every expert is read once if each is hit; fewer slots than experts read only that many.
    read = nbytes(x, ids, weights) + nbytes(gate_up, down) * sympy.Min(1, slots / to_expr(gate_up.shape[0]))
    return Cost(slots * per_slot, read, nbytes(x))


def _moe_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for rows, hidden, inter, experts, k in [(1, 16, 24, 4, 2), (9, 33, 17, 5, 3), (70, 32, 24, 4, 1)]:
        ids = torch.stack([torch.randperm(experts, generator=rng)[:k] for _ in range(rows)])
        weights = torch.rand(rows, k, generator=rng).to(dtype)
        gate_up = _randn(rng, dtype, experts, 2 * inter, hidden, scale=hidden**-0.5)
        down = _randn(rng, dtype, experts, hidden, inter, scale=inter**-0.5)
        yield _randn(rng, dtype, rows, hidden), ids, weights, gate_up, down, "silu"


@register_op(
    "moe(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, str act) -> Tensor",
    fake=_moe_fake,
    cost=_moe_cost,
    samples=_moe_samples,
    tolerances={**SUM_ORDER, **_FEWER_ROUNDINGS},
)
def moe(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    """Mixture of experts (Shazeer et al., 2017): each row goes through the gated MLPs of its k experts.

    x `[R, H]`, expert_ids int64 `[R, k]`, expert_weights `[R, k]`, gate_up `[E, 2I, H]` (gate rows first),
    down `[E, H, I]`. Gives `[R, H]`, the weighted sum over the k experts.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        row, slot = (expert_ids == expert).nonzero(as_tuple=True)
        if row.numel() == 0:
            continue
        gate, up = F.linear(x[row], gate_up[expert]).chunk(2, -1)
        y = F.linear(gated_act(gate, up, act), down[expert])
        out.index_add_(0, row, y.float() * expert_weights[row, slot, None].float())
    return out.to(x.dtype)


# ---- position ------------------------------------------------------------------------------------------------------


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    batch, tokens = x.shape[:2]
    check_sizes("rope", "cos", cos, (1 if cos.shape[0] == 1 else batch, tokens, cos.shape[-1]))
    check_sizes("rope", "sin", sin, cos.shape)
    return x.new_empty(x.shape)


def _rope_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for tokens, heads, size, rotary in [(1, 1, 8, 8), (7, 3, 16, 16), (5, 2, 20, 12)]:
        angle = torch.rand(1, tokens, rotary // 2, generator=rng) * 6
        half = torch.cat([angle, angle], -1)
        yield _randn(rng, dtype, 1, tokens, heads, size), half.cos().to(dtype), half.sin().to(dtype), False
        yield _randn(rng, dtype, 3, tokens, heads, size), half.cos().to(dtype), half.sin().to(dtype), False
        pair = angle.repeat_interleave(2, -1)
        yield _randn(rng, dtype, 1, tokens, heads, size), pair.cos().to(dtype), pair.sin().to(dtype), True


@register_op(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    fake=_rope_fake,
    cost=lambda x, cos, sin, interleaved: Cost(3 * numel(x), nbytes(x, cos, sin), nbytes(x)),
    samples=_rope_samples,
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, "two products of order one cancel"),
        torch.bfloat16: Tolerance(2.4e-2, 3e-2, "eager rounds both products, which may cancel; the kernel rounds once"),
        torch.float16: Tolerance(3e-3, 4e-3, "eager rounds both products, which may cancel; the kernel rounds once"),
    },
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of `x[B, S, H, D]` by `cos` and `sin` `[B, S, R]`, R <= D.

    The first R of the D dimensions turn, the rest pass. Pairs are (i, i + R/2), or (2i, 2i + 1) if `interleaved`; cos
    and sin are given for every dimension, as transformers lays them out.
    """
    rotary = cos.shape[-1]
    turned, passed = x[..., :rotary], x[..., rotary:]
    if interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        rotated = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), -1)
    turned = turned * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)
    return torch.cat((turned.to(x.dtype), passed), -1)


# ---- constants -----------------------------------------------------------------------------------------------------


@register_op(
    "constant(float[] values, *, Device? device=None) -> Tensor",
    fake=lambda values, *, device=None: torch.empty(len(values), dtype=torch.float32, device=device),
    cost=lambda values, *, device=None: Cost(sympy.Integer(0), sympy.Integer(0), sympy.Integer(4 * len(values))),
    samples=lambda dtype, rng: iter([([0.5, -1.25],)]),
)
def constant(values: Sequence[float], *, device: torch.device | None = None) -> Tensor:
    """A float32 vector that a pass found (ALiBi slopes); computed once when weights are bound, never in a step."""
    return torch.tensor(list(values), dtype=torch.float32, device=device)
