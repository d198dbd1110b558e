"""Low-rank adapters added to a product, another one for each row; no row depends on others.

`status` is one int32 that a kernel sets to 1 when a row names a slot that does not exist; such a row stays as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(y, out, cols, y_stride, out_stride, BLOCK: tl.constexpr):
    """Rows with strides of their own. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < cols
    tl.store(out + row * out_stride + col, tl.load(y + row * y_stride + col, mask=ok), mask=ok)


@triton.jit(do_not_specialize=["target", "offset"])
def shrink(
    x, index, pool, ranks, scales, hidden, status, k, x_stride, slots, slot_size, most, target, offset,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`hidden[row] = scale * A x` of the row's adapter, in float32. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    if slot >= slots:
        tl.store(status, 1)
    known = (slot >= 0) & (slot < slots)
    entry = target * slots + tl.where(known, slot, 0)
    rank = tl.where(known, tl.load(ranks + entry), 0)
    scale = tl.load(scales + entry)
    r = tl.arange(0, BLOCK_R)
    a = pool + tl.where(known, slot, 0) * slot_size + offset
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, tl.where(rank > 0, k, 0), BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row * x_stride + at, mask=at < k, other=0.0).to(tl.float32)
        mask = (r < rank)[:, None] & (at < k)[None, :]
        weights = tl.load(a + r.to(tl.int64)[:, None] * k + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(weights * values[None, :], 1)
    tl.store(hidden + row * most + r, total * scale, mask=r < most)


@triton.jit(do_not_specialize=["target", "offset"])
def expand(
    hidden, index, pool, ranks, out, cols, out_stride, slots, slot_size, most, target, offset,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds `hidden[row] B^T` to the columns of one part. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    known = (slot >= 0) & (slot < slots)
    rank = tl.where(known, tl.load(ranks + target * slots + tl.where(known, slot, 0)), 0)
    if rank > 0:
        r = tl.arange(0, BLOCK_R)
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = col < cols
        values = tl.load(hidden + row * most + r, mask=r < rank, other=0.0)
        b = pool + slot * slot_size + offset
        mask = (r < rank)[:, None] & ok[None, :]
        weights = tl.load(b + r.to(tl.int64)[:, None] * cols + col[None, :], mask=mask, other=0.0).to(tl.float32)
        added = tl.sum(weights * values[:, None], 0)
        place = out + row * out_stride + col
        total = tl.load(place, mask=ok, other=0.0).to(tl.float32) + added
        tl.store(place, total.to(out.dtype.element_ty), mask=ok)
