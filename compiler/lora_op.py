"""The op that adds low-rank adapters to a product: another adapter, or none, for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch

from llmopt.compiler.graph import to_expr
from llmopt.compiler.opspec import SUM_ORDER, Cost, check_sizes, nbytes, numel, register_op
from llmopt.compiler.step import LoraSpec, LoraTarget

Tensor = torch.Tensor


def _fake(y: Tensor, x: Tensor, pool: Tensor, ranks: Tensor, scales: Tensor, adapter_index: Tensor, *_: Any) -> Tensor:
    check_sizes("lora", "x", x, (*y.shape[:-1], x.shape[-1]))
    check_sizes("lora", "ranks", ranks, (ranks.shape[0], pool.shape[0]))
    check_sizes("lora", "scales", scales, ranks.shape)
    return y.new_empty(y.shape)


def _cost(y: Tensor, x: Tensor, pool: Tensor, *more: Any) -> Cost:
    """As if every row had an adapter of the largest rank, and as many adapters were read as there are rows."""
    _ranks, _scales, adapter_index, max_rank, targets, _columns, sizes, _offsets = more
    rows, k, slots = to_expr(adapter_index.shape[0]), to_expr(x.shape[-1]), to_expr(pool.shape[0])
    entries = max_rank * sum((k + size for size in sizes), sympy.Integer(0))
    numbers = 8 * len(targets) * slots
    read = nbytes(y, x, adapter_index) + numbers + entries * pool.element_size() * sympy.Min(slots, rows)
    return Cost(2 * rows * entries, read, numel(y) * y.element_size())


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    # rows, K, (column, size) of each part, columns of y, largest rank, slots
    for rows, k, parts, n, most, slots in [
        (1, 33, ((0, 17),), 17, 4, 1),
        (9, 64, ((0, 48), (48, 16), (64, 16)), 80, 8, 3),
        (70, 40, ((5, 67),), 90, 3, 2),
    ]:
        sizes = [size for _, size in parts]
        spec = LoraSpec(tuple(LoraTarget("", k, size) for size in sizes), slots, most, dtype)
        pool = torch.randn(slots, spec.slot_elements, generator=rng) * 0.3
        ranks = torch.randint(0, most + 1, (len(parts) + 1, slots), generator=rng, dtype=torch.int32)
        ranks[1, 0] = most
        index = torch.randint(-1, slots, (rows,), generator=rng, dtype=torch.int32)
        index[0] = 0
        x = torch.randn(1, rows, k, generator=rng)
        yield (
            torch.randn(1, rows, n, generator=rng).to(dtype),
            x.to(dtype),
            pool.to(dtype),
            ranks,
            torch.rand(ranks.shape, generator=rng) + 0.5,
            index,
            most,
            list(range(1, len(parts) + 1)),
            [column for column, _ in parts],
            sizes,
            list(spec.offsets[:-1]),
        )


@register_op(
    "lora(Tensor y, Tensor x, Tensor pool, Tensor ranks, Tensor scales, Tensor adapter_index, int max_rank, "
    "int[] targets, int[] columns, int[] sizes, int[] offsets) -> Tensor",
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerances=SUM_ORDER,
)
def lora(
    y: Tensor,
    x: Tensor,
    pool: Tensor,
    ranks: Tensor,
    scales: Tensor,
    adapter_index: Tensor,
    max_rank: int,
    targets: Sequence[int],
    columns: Sequence[int],
    sizes: Sequence[int],
    offsets: Sequence[int],
) -> Tensor:
    """`y + scale * (x @ A^T) @ B^T` row by row (LoRA: Hu et al., 2021), for parts of y's columns.

    y `[..., N]`, x `[..., K]` with T rows, adapter_index int32 `[T]`: the slot of pool `[S, E]` that holds the row's
    adapter; negative for none, which leaves the row to the bit as it is. Part i are the columns from `columns[i]` on,
    `sizes[i]` of them. In a slot, from `offsets[i]` on, lie its A `[max_rank, K]` and then B transposed
    `[max_rank, sizes[i]]`, of which the first `ranks[targets[i], slot]` rows count (int32, 0 for a product that the
    adapter leaves alone); scale is `scales[targets[i], slot]` (float32). Sums are float32, rounded once.
    """
    k, n = x.shape[-1], y.shape[-1]
    rows, out = x.reshape(-1, k).float(), y.reshape(-1, n).float()
    out = out.clone()
    for slot in adapter_index.unique().tolist():
        if slot < 0:
            continue
        mine = adapter_index == slot
        for target, column, size, offset in zip(targets, columns, sizes, offsets, strict=True):
            rank, behind = int(ranks[target, slot]), offset + max_rank * k
            a = pool[slot, offset:behind].view(max_rank, k)[:rank].float()
            b = pool[slot, behind : behind + max_rank * size].view(max_rank, size)[:rank].float()
            out[mine, column : column + size] += (rows[mine] @ a.T) @ b * scales[target, slot]
    return out.to(y.dtype).view(y.shape)
