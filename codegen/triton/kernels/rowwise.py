"""Kernels over rows: norms, rope, gated activations, embedding, softmax, sums along a row, topk, index_copy.

`status` is one int32 that a kernel sets to 1 when an index lies outside of what it indexes; nothing outside of a tensor
is touched then, and what the kernel leaves is of no use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.triton.kernels.functions import activate


@triton.jit(do_not_specialize=["inner"])
def norm(
    x, residual, weight, bias, out, total, inner, cols, x_outer, x_inner, out_outer, out_inner, eps, offset,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, TOTAL: tl.constexpr,
    MEAN: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """rms_norm, or with MEAN layer_norm, of one row, after adding the residual. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    ok = col < cols
    a = row // inner
    b = row % inner
    dtype = out.dtype.element_ty
    wide = tl.load(x + a * x_outer + b * x_inner + col, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        summed = (wide + tl.load(residual + row * cols + col, mask=ok, other=0.0).to(tl.float32)).to(dtype)
        wide = summed.to(tl.float32)
        if TOTAL:
            tl.store(total + row * cols + col, summed, mask=ok)
    if MEAN:
        wide = tl.where(ok, wide - tl.sum(wide, 0) / cols, 0.0)
    y = wide * tl.rsqrt(tl.sum(wide * wide, 0) / cols + eps)
    if WEIGHT:
        w = tl.load(weight + col, mask=ok, other=0.0)
        if CAST_FIRST:
            # As eager: both factors are rounded to their types before the product.
            w = (w.to(tl.float32) + offset).to(w.dtype)
            y = y.to(dtype).to(tl.float32) * w.to(tl.float32)
        else:
            y = y * (w.to(tl.float32) + offset)
    if BIAS:
        y += tl.load(bias + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + a * out_outer + b * out_inner + col, y.to(dtype), mask=ok)


@triton.jit(do_not_specialize=["table_rows"])
def rope(
    x, cos, sin, out, heads, x_token, x_head, out_token, out_head, table_stride, table_rows,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turns the first ROTARY of SIZE dimensions. Grid: (tokens, blocks of heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    turned = d < ROTARY
    if INTERLEAVED:
        partner = d ^ 1
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
        sign = tl.where(d < ROTARY // 2, -1.0, 1.0)
    ok = (head < heads)[:, None] & (d < SIZE)[None, :]
    rows = x + token * x_token + head.to(tl.int64)[:, None] * x_head
    own = tl.load(rows + d[None, :], mask=ok, other=0.0).to(tl.float32)
    other = tl.load(rows + partner[None, :], mask=ok & turned[None, :], other=0.0).to(tl.float32)
    table = token % table_rows * table_stride + d
    c = tl.load(cos + table, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + table, mask=turned, other=0.0).to(tl.float32)
    y = own * c[None, :] + other * (sign * s)[None, :]
    target = out + token * out_token + head.to(tl.int64)[:, None] * out_head + d[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gated_act(gate, up, out, cols, gate_stride, up_stride, out_stride, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """`act(gate) * up`. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < cols
    g = tl.load(gate + row * gate_stride + col, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, (activate(g, ACT) * u).to(out.dtype.element_ty), mask=ok)


@triton.jit
def embedding(ids, table, out, status, width, rows, out_stride, BLOCK: tl.constexpr):
    """Rows of the table. Grid: (ids, blocks of columns)."""
    at = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + at).to(tl.int64)
    known = (row >= 0) & (row < rows)
    if not known:
        tl.store(status, 1)
    ok = col < width
    value = tl.load(table + tl.where(known, row, 0) * width + col, mask=ok, other=0.0)
    tl.store(out + at * out_stride + col, value, mask=ok)


@triton.jit
def softmax(x, out, cols, x_stride, out_stride, BLOCK: tl.constexpr):
    """Along the row, by the online maximum and sum. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + col, mask=col < cols, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, v)
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.exp(v - safe)
        top = new
    peak = tl.max(top, 0)
    total = tl.sum(tl.where(top == -float("inf"), 0.0, total * tl.exp(top - peak)), 0)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + col, mask=col < cols, other=-float("inf")).to(tl.float32)
        tl.store(out + row * out_stride + col, (tl.exp(v - peak) / total).to(out.dtype.element_ty), mask=col < cols)


@triton.jit
def cumsum(x, out, cols, x_stride, out_stride, BLOCK: tl.constexpr, FLOAT: tl.constexpr):
    """Running sums along the row, in float32 or int64. Grid: (rows)."""
    kind: tl.constexpr = tl.float32 if FLOAT else tl.int64
    row = tl.program_id(0).to(tl.int64)
    carry = tl.sum(tl.zeros([BLOCK], kind), 0)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + col, mask=col < cols, other=0).to(kind)
        summed = tl.cumsum(v, 0) + carry
        tl.store(out + row * out_stride + col, summed.to(out.dtype.element_ty), mask=col < cols)
        carry = carry + tl.sum(v, 0)


@triton.jit
def topk(x, values, indices, cols, k, x_stride, BLOCK: tl.constexpr, VALUES: tl.constexpr):
    """The k largest of a row, in order; of equal ones the first. Grid: (rows).

    One int64 holds a value, as an integer of the same order, and its place, so removing the largest is unambiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    bits = v.to(tl.int32, bitcast=True)
    order = tl.where(v != v, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    low = -0x7FFFFFFFFFFFFFFF
    key = tl.where(col < cols, order * 4294967296 + (BLOCK - 1 - col).to(tl.int64), low)
    for n in range(0, k):
        best = tl.max(key, 0)
        place = BLOCK - 1 - (best & (BLOCK - 1))
        tl.store(indices + row * k + n, place)
        if VALUES:
            tl.store(values + row * k + n, tl.load(x + row * x_stride + place))
        key = tl.where(key == best, low, key)


@triton.jit(do_not_specialize=["numel"])
def copy(x, out, numel, BLOCK: tl.constexpr):
    """All elements of a dense tensor. Grid: (blocks)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < numel), mask=at < numel)


@triton.jit(do_not_specialize=["count"])
def index_copy(index, source, out, status, size, inner, count, BLOCK: tl.constexpr):
    """Slices of `source[outer, count, inner]` to their places in `out[outer, size, inner]`.

    Grid: (outer times count, blocks of inner).
    """
    outer = tl.program_id(0).to(tl.int64) // count
    n = tl.program_id(0).to(tl.int64) % count
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + n)
    known = (place >= 0) & (place < size)
    if not known:
        tl.store(status, 1)
    ok = col < tl.where(known, inner, 0)
    value = tl.load(source + (outer * count + n) * inner + col, mask=ok)
    tl.store(out + (outer * size + place) * inner + col, value, mask=ok)
