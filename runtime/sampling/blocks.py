"""Searching rows that are as long as a vocabulary, by blocks: one fast pass over everything, then little pieces.

torch's `argmax`, `topk` and `cumsum` walk a row element by element; a maximum or sum of blocks is vectorised, and so is
NumPy's `argmax`. On a CPU the largest elements are found by a kernel of our own, where there is a compiler for it.

What each function gives for a row depends on this row alone, to the last bit, not on how many rows there are: a request
draws the same token in any batch. Running sums are serial for that reason, and in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmopt.codegen.cpu.largest import largest_kernel

_MAX_BLOCK = 512  # elements that share a maximum in the search for the largest
_TOP_BLOCK = 64  # ... for the several largest
_SUM_BLOCK = 128
# Elements that one thread searches by NumPy, which has the least overhead; beyond, memory wants several threads.
_ONE_THREAD = 1 << 21


class Workspace:
    """Memory for one `[R, V]` float32 tensor, kept from step to step: fresh pages cost more than the work on them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, rows: Tensor) -> Tensor:
        """A contiguous float32 tensor of the shape and on the device of `rows`; what it held is lost."""
        count = rows.numel()
        if self._memory.numel() < count or self._memory.device != rows.device:
            self._memory = torch.empty(count, dtype=torch.float32, device=rows.device)
        return self._memory[:count].view(rows.shape)


def _blocked(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`[R, N, size]` and the `[R, T]` that is left over, T < size; both are views."""
    whole = rows.shape[1] // size * size
    return rows[:, :whole].unflatten(1, (whole // size, size)), rows[:, whole:]


def _block_maxima(rows: Tensor, size: int) -> Tensor:
    blocks, rest = _blocked(rows, size)
    maxima = blocks.amax(-1)
    return torch.cat([maxima, rest.amax(-1, keepdim=True)], -1) if rest.shape[1] else maxima


def _segments(rows: Tensor, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Elements of the blocks with numbers `[R, K]`, and their places in the row, `[R, K * size]` each.

    The last block of a row may be shorter: its missing elements have the place 0 and the value -inf.
    """
    places = (blocks.unsqueeze(-1) * size + torch.arange(size, device=rows.device)).flatten(1)
    missing = places >= rows.shape[1]
    places = places.masked_fill(missing, 0)
    return rows.gather(1, places).masked_fill(missing, float("-inf")), places


def largest_numbers(rows: Tensor, columns: int) -> tuple[list[float], list[int]] | None:
    """`largest` of the first `columns` of rows in the CPU's memory, as numbers, by a kernel and no op of PyTorch.

    None where there is no kernel for them: without a compiler, elsewhere, or of another dtype.
    """
    if not rows.is_cpu or rows.stride(1) != 1 or not columns:
        return None
    kernel = largest_kernel(rows.dtype)
    return None if kernel is None else kernel(rows.data_ptr(), rows.shape[0], columns, rows.stride(0))


def largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Value (float32) and place of the first largest element of each row of `[R, V]`, of any float dtype; `[R]` each.
    A NaN is larger than all."""
    found = largest_numbers(rows, rows.shape[1])
    if found is None:
        return _largest_without_kernel(rows)
    return torch.tensor(found[0], dtype=torch.float32), torch.tensor(found[1], dtype=torch.int64)


def _largest_without_kernel(rows: Tensor) -> tuple[Tensor, Tensor]:
    if rows.dtype == torch.float16:
        rows = rows.float()
    if rows.dtype == torch.bfloat16:
        return _largest_bfloat16(rows)
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.numel() <= _ONE_THREAD:
        array = rows.detach().numpy()
        # Row by row: of rows that are part of longer ones NumPy would make a copy.
        found = np.fromiter((row.argmax() for row in array), np.int64, len(array))
        return torch.from_numpy(array[np.arange(len(array)), found]), torch.from_numpy(found)
    if rows.shape[1] <= _MAX_BLOCK:
        values, places = rows.max(-1)
        return values, places
    maxima = _block_maxima(rows, _MAX_BLOCK)
    values, block = maxima.max(-1, keepdim=True)
    inside, places = _segments(rows, block, _MAX_BLOCK)
    return values.squeeze(-1), places.gather(1, inside.argmax(-1, keepdim=True)).squeeze(-1)


def _largest_bfloat16(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a copy in float32: the bits of positive numbers are ordered as the numbers are."""
    if rows.device.type == "cpu" and rows.numel() <= _ONE_THREAD:
        bits = rows.detach().view(torch.int16).numpy()
        found = np.fromiter((row.argmax() for row in bits), np.int64, len(bits))
        highest = bits[np.arange(len(bits)), found]
        # Not so of negative numbers, of the two zeros, and of a NaN with a sign, whose bits are above -inf's.
        if highest.min(initial=1) > 0 and max((row.max() for row in bits.view(np.uint16)), default=0) <= 0xFF80:
            return torch.from_numpy(highest).view(torch.bfloat16).float(), torch.from_numpy(found)
    return _largest_without_kernel(rows.float())


def several_largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest elements of each row of `[R, V]`, largest first, equal ones by place, and their places.

    Which of the elements that equal the last one are among them is not defined; all that are larger are.
    """
    blocks = -(-rows.shape[1] // _TOP_BLOCK)
    if count < blocks // 4:
        # An element among the `count` largest lies in one of the `count` blocks with the largest maxima.
        chosen = _block_maxima(rows, _TOP_BLOCK).topk(count, sorted=False).indices
        inside, where = _segments(rows, chosen, _TOP_BLOCK)
        values, index = inside.topk(count, sorted=False)
        places = where.gather(1, index)
    else:
        values, places = rows.topk(count, sorted=False)
    places, order = places.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(1, order)


def row_sums(rows: Tensor) -> Tensor:
    """The sum of each row of `[R, V]` float32, `[R]` float64."""
    return _block_sums(rows)[:, -1]


def _block_sums(rows: Tensor) -> Tensor:
    blocks, rest = _blocked(rows, _SUM_BLOCK)
    # A row is summed as several outputs: a single one would be split over threads.
    sums = torch.cat([blocks.sum(-1), rest.sum(-1, keepdim=True)], -1)
    return sums.double().cumsum(-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Places drawn from each row with probability proportional to its `weights[R, V]`, by `uniforms[R]` float64.

    Inverts the distribution function in two steps: the block, then the element inside it.
    """
    upto = _block_sums(weights)
    total = upto[:, -1:]
    target = uniforms.unsqueeze(-1) * total
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # Where in its block the target lies is a random number of its own, independent of the block.
    fraction = ((target - before) / (upto.gather(1, block) - before)).clamp_(0.0, 1.0 - 2.0**-53)
    inside, places = _segments(weights, block, _SUM_BLOCK)
    return places.gather(1, draw_short(inside.clamp(min=0), fraction)).squeeze(-1)


def draw_short(weights: Tensor, uniforms: Tensor) -> Tensor:
    """As `draw` for short rows: `uniforms[R, 1]`, places `[R, 1]`; a place of weight 0 is never drawn."""
    upto = weights.double().cumsum(-1)
    return torch.searchsorted(upto, uniforms * upto[:, -1:], right=True)
