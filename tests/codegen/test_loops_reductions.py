"""Reductions, softmax and norms against eager: rows of one, of odd length and of many vectors; every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.loop_programs import INTERPRETED, VARIANTS, check, compiled

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [(3, 5), (7, 1), (2, 257), (1, 4097)]


def inputs(dtypes: tuple[torch.dtype, ...], *shape: int) -> list[torch.Tensor]:
    found = []
    for dtype in dtypes:
        x = torch.randn(shape)
        found.append(x > 0 if dtype == torch.bool else (x * 5 if not dtype.is_floating_point else x).to(dtype))
    return found


def test_a_tensor_without_dimensions() -> None:
    x = torch.tensor(1.5)
    check(lambda x: [x.sum(-1), x.amax(0), x.mean(0, keepdim=True), x.softmax(-1), x.logsumexp(0), x.any(0)], x)


def run(function: Callable[..., Any], dtypes: tuple[torch.dtype, ...], **options: Any) -> None:
    check(
        lambda *x: [function(t) for t in x],
        *inputs(dtypes, 3, 65),
        again=[inputs(dtypes, *shape) for shape in ROWS if shape[0] > 1 and shape[1] > 1],
        **options,
    )


REDUCTIONS: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "sum": (lambda x: [x.sum(-1), x.sum(-1, keepdim=True), x.sum(0), x.sum()], (*FLOATS, torch.int64, torch.bool)),
    "sum_dtype": (lambda x: aten.sum.dim_IntList(x, [1], dtype=torch.float32), FLOATS),
    "mean": (lambda x: [x.mean(-1), x.mean(-1, keepdim=True), x.mean((0, 1)), x.mean()], FLOATS),
    "amax": (lambda x: [x.amax(-1), x.amax(0, keepdim=True), x.max()], (*FLOATS, torch.int64, torch.bool)),
    "amin": (lambda x: [x.amin(-1), x.amin((0, 1)), x.min()], (*FLOATS, torch.int64, torch.bool)),
    "any": (lambda x: [x.any(-1), x.any(0), x.any(), (x > 2).any(-1)], (torch.float32, torch.int64, torch.bool)),
    "all": (lambda x: [x.all(-1), x.all(0), x.all(), (x < 2).all(-1)], (torch.float32, torch.int64, torch.bool)),
    "prod": (lambda x: [(x * 0.1 + 1).prod(-1), (x * 0.1 + 1).prod()], (torch.float32, torch.float64)),
    "softmax": (lambda x: [x.softmax(-1), x.softmax(0), x.softmax(-1, dtype=torch.float32)], FLOATS),
    "log_softmax": (lambda x: [x.log_softmax(-1), x.log_softmax(0)], FLOATS),
    "logsumexp": (lambda x: [x.logsumexp(-1), x.logsumexp((0, 1), keepdim=True)], (torch.float32,)),
    "var": (lambda x: [x.var(-1), x.var(-1, correction=0), x.std(-1)], (torch.float32, torch.float64)),
    "norm": (
        lambda x: [torch.linalg.vector_norm(x, n, -1, keepdim=True) for n in (1, 2, float("inf"))],
        FLOATS,
    ),
    "count": (lambda x: (x > 0).sum(-1), FLOATS),
    "double": (lambda x: [x.sum(-1), x.softmax(-1), x.mean()], (torch.float64,)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name: str) -> None:
    run(*REDUCTIONS[name])


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_row_lengths_and_vector_widths(shape: tuple[int, int], variant: str) -> None:
    def function(x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        return [x.softmax(-1), x.sum(-1), x.amax(-1), h.float().mean(-1), (x > 0).any(-1), (h * 2).exp(), x > 0]

    x = torch.randn(shape)
    check(function, x, x.bfloat16(), variant=variant)


def test_masked_rows_give_nan_as_eager() -> None:
    x = torch.randn(3, 21)
    x[1] = -torch.inf
    x[2, 3] = torch.nan
    check(lambda x: [x.softmax(-1), x.amax(-1), x.logsumexp(-1), x.sum(-1)], x)


def test_layer_norm_and_rms_norm() -> None:
    x, w, b = torch.randn(5, 3, 129), torch.randn(129), torch.randn(129)

    def function(*t: torch.Tensor) -> list[torch.Tensor]:
        x, w, b, h = t
        return [
            torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b),
            torch.nn.functional.layer_norm(x, x.shape[-2:]),
            torch.nn.functional.rms_norm(x, (x.shape[-1],), w, 1e-5),
            torch.nn.functional.rms_norm(h, (h.shape[-1],)),
        ]

    check(function, x, w, b, x.bfloat16())


def spelled_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers writes it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_residual_and_rms_norm_are_one_kernel(dtype: torch.dtype, threads: int) -> None:
    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        total = x + y
        return [total, spelled_rms_norm(total, w)]

    def sample(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)]

    program = check(function, *sample(2, 3, 257), again=[sample(5, 4, 5), sample(3, 2, 64)], kernels=1, threads=threads)
    (group,) = program.plan.groups
    assert len(group.outputs) == 2
    assert len(group.kernel.nests) == 1
    assert len(group.kernel.nests[0].sweeps) == 2  # the sum is stored while its squares are added


def test_softmax_is_one_nest_of_three_sweeps() -> None:
    program = check(lambda x: x.softmax(-1), torch.randn(4, 7, 33), kernels=1)
    (nest,) = program.plan.groups[0].kernel.nests
    assert [a.kind for a in nest.accumulators] == ["max", "sum"]
    assert len(nest.sweeps) == 3


def test_masked_attention_softmax_with_views_is_one_kernel() -> None:
    def function(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        wide = scores * 0.125 + torch.where(mask, 0.0, float("-inf")).unsqueeze(0).unsqueeze(0)
        return torch.softmax(wide, -1, dtype=torch.float32).to(torch.bfloat16).transpose(1, 2)

    check(
        function,
        torch.randn(2, 4, 5, 19).bfloat16(),
        torch.ones(5, 19, dtype=torch.bool).tril(14),
        kernels=1,
    )


def test_query_norm_then_rope_shape() -> None:
    """A norm over the head, transposed: rows of the norm in another order than the output's."""

    def function(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = x.view(batch, length, 4, 16)
        normed = spelled_rms_norm(heads, w).transpose(1, 2)
        half = torch.cat([-normed[..., 8:], normed[..., :8]], -1)
        return normed * cos + half * cos

    check(
        function,
        torch.randn(2, 7, 64).bfloat16(),
        torch.randn(16).bfloat16(),
        torch.randn(7, 16).bfloat16(),
        kernels=1,
        static=[-1],
    )


def test_router_normalisation() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        weights, chosen = torch.topk(x.softmax(-1, dtype=torch.float32), 3)
        return [(weights / weights.sum(-1, keepdim=True)).to(x.dtype), chosen]

    check(function, torch.randn(11, 8).bfloat16(), rejected=["aten.topk.default"], kernels=2)


def test_reduction_over_a_concatenation() -> None:
    check(
        lambda x, y: [torch.cat([x, y * 2], -1).sum(-1), torch.cat([x, y], -1).softmax(-1)],
        torch.randn(3, 5),
        torch.randn(3, 70),
        again=[[torch.randn(4, 33), torch.randn(4, 2)]],
    )


def test_row_and_column_reductions_do_not_share_a_nest() -> None:
    """Fused, each would be computed again for every row of the other."""
    program = check(lambda x: x - x.amax(1, keepdim=True) - x.amax(0, keepdim=True), torch.randn(9, 33))
    for group in program.plan.groups:
        for nest in group.kernel.nests:
            assert len(nest.accumulators) <= 1


def test_reduction_of_a_reduction() -> None:
    check(lambda x: [x.amax(-1).sum(-1), (x - x.sum(-1, keepdim=True)).sum(0)], torch.randn(5, 6, 7))


def test_a_number_reduces_to_itself() -> None:
    check(lambda x: [f(x[2, 0]) for f in (torch.sum, torch.mean, torch.amax)], torch.randn(3, 4))
    check(lambda x: [x[2, 0].softmax(0), x[2, 0].sum(0), x[2, 0].any()], torch.randn(3, 4))


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("columns", [1 << 24, 9])
def test_long_sums_keep_their_digits(columns: int) -> None:
    """A lane that has added a million numbers is too large for the next one, in one long row or in many short ones."""
    x = torch.full(((1 << 24) // columns, columns + 1), 0.1)[:, :columns]
    program = compiled(lambda x: [x.sum(), x.mean()], x)
    for actual, expected in zip(program(x), (x.numel() * 0.1, 0.1), strict=True):
        assert actual.item() == pytest.approx(expected, rel=4e-5)


def test_empty_rows() -> None:
    check(lambda x: [x.sum(-1), x * 2, x.any(-1)], torch.randn(3, 5), again=[[torch.randn(3, 0)], [torch.randn(0, 5)]])
