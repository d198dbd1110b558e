"""Products with weights: `linear` over up to three weight segments, `batched_linear` and `grouped_linear`.

linear: x[rows, K] times the segments' weights[N_i, K] transposed, plus bias. Few rows are streamed by `gemv` on the
CUDA cores, more go through `gemm` on the tensor cores. With SPLITS > 1 each program takes a part of K and leaves
float32 sums in `part[SPLITS, rows, N]`, which `merge_splits` adds up in a fixed order, so results do not vary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.triton.kernels.functions import dot

# The number of rows changes from call to call. That of columns does not; where it is a multiple of 16, stores are wide.
_SIZES = ["rows"]


@triton.jit
def _bias(b0, b1, b2, n0, n1, n2, cols, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """The biases of columns counted over all segments, in float32."""
    total = tl.zeros(cols.shape, tl.float32)
    if B0:
        total += tl.load(b0 + cols, mask=cols < n0, other=0.0).to(tl.float32)
    if B1:
        total += tl.load(b1 + (cols - n0), mask=(cols >= n0) & (cols < n0 + n1), other=0.0).to(tl.float32)
    if B2:
        at = cols - n0 - n1
        total += tl.load(b2 + at, mask=(at >= 0) & (at < n2), other=0.0).to(tl.float32)
    return total


@triton.jit
def _segment(tile, w0, w1, w2, n0, n1, n2, BN: tl.constexpr, SEGMENTS: tl.constexpr):
    """(weight, its rows, tile within it, columns before it) of a tile counted over all segments."""
    w = w0
    n = n0 + tile * 0
    shift = tile * 0
    if SEGMENTS > 1:
        first = tl.cdiv(n0, BN)
        if tile >= first:
            w = w1
            n = n1
            shift = n0
            tile = tile - first
            if SEGMENTS > 2:
                second = tl.cdiv(n1, BN)
                if tile >= second:
                    w = w2
                    n = n2
                    shift = n0 + n1
                    tile = tile - second
    return w, n, tile, shift


@triton.jit
def gemv_sums(
    x, w0, w1, w2, n0, n1, n2, rows, K, x_stride,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(sums [M, BN], rows, columns over all segments, which exist): streams BN weight rows for all rows of x."""
    w, n, tile, shift = _segment(tl.program_id(0), w0, w1, w2, n0, n1, n2, BN, SEGMENTS)
    split = tl.program_id(1)
    cols = tile * BN + tl.arange(0, BN)
    row = tl.arange(0, M)
    span = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    begin = split * span
    end = tl.minimum(begin + span, K)
    weights = w + cols.to(tl.int64)[:, None] * K
    inputs = x + row.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([M, BN, BK], tl.float32)
    for k in range(begin, end, BK):
        at = k + tl.arange(0, BK)
        inside = at < end
        wt = tl.load(
            weights + at[None, :],
            mask=(cols < n)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        xt = tl.load(inputs + at[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        acc += wt.to(tl.float32)[None, :, :] * xt.to(tl.float32)[:, None, :]
    return tl.sum(acc, 2), row, shift + cols, (row < rows)[:, None] & (cols < n)[None, :]


@triton.jit
def gemm_sums(
    x, w0, w1, w2, n0, n1, n2, rows, K, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `gemv_sums`, a tile [BM, BN]. Neighbouring programs walk down up to 8 row tiles before they take the next
    columns, so weights stay in L2."""
    tiles_m = tl.cdiv(rows, BM)
    tiles_n = tl.cdiv(n0, BN)
    if SEGMENTS > 1:
        tiles_n += tl.cdiv(n1, BN)
    if SEGMENTS > 2:
        tiles_n += tl.cdiv(n2, BN)
    pid = tl.program_id(0)
    group = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    within = pid - group * 8 * tiles_n
    tile_m = group * 8 + within % height
    w, n, tile, shift = _segment(within // height, w0, w1, w2, n0, n1, n2, BN, SEGMENTS)
    split = tl.program_id(1)
    row = tile_m * BM + tl.arange(0, BM)
    cols = tile * BN + tl.arange(0, BN)
    span = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    begin = split * span
    end = tl.minimum(begin + span, K)
    inputs = x + row.to(tl.int64)[:, None] * x_stride
    weights = w + cols.to(tl.int64)[None, :] * K
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(begin, end, BK):
        at = k + tl.arange(0, BK)
        inside = at < end
        xt = tl.load(inputs + at[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        wt = tl.load(weights + at[:, None], mask=(cols < n)[None, :] & inside[:, None], other=0.0)
        acc = dot(xt, wt, acc, PRECISION)
    return acc, row, shift + cols, (row < rows)[:, None] & (cols < n)[None, :]


@triton.jit
def store_part(part, sums, row, cols, ok, rows, columns):
    """Leaves the sums of this program's part of K for `added_splits`."""
    lead = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * columns
    tl.store(part + lead + cols[None, :], sums, mask=ok)


@triton.jit
def added_splits(part, rows, columns, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """As `gemv_sums`, from the partial sums of all splits. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (row < rows)[:, None] & (cols < columns)[None, :]
    acc = tl.zeros([1, BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        lead = (split * rows + row).to(tl.int64)[:, None] * columns
        acc += tl.load(part + lead + cols[None, :], mask=ok, other=0.0)
    return acc, row, cols, ok


@triton.jit
def with_bias(
    sums, cols, b0, b1, b2, n0, n1, n2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr
):  # fmt: skip
    """The sums of `cols`, counted over all segments, plus bias."""
    return sums + _bias(b0, b1, b2, n0, n1, n2, cols, B0, B1, B2)[None, :]


@triton.jit
def _store(out, out_stride, values, row, cols, ok):
    lead = row.to(tl.int64)[:, None] * out_stride
    tl.store(out + lead + cols[None, :], values.to(out.dtype.element_ty), mask=ok)


# The kernels; a product with an epilogue has kernels of the same names in a module of its own, which
# `codegen/triton/epilogue.py` prints.


@triton.jit(do_not_specialize=_SIZES)
def gemv(
    x, out, part, w0, w1, w2, b0, b1, b2, n0, n1, n2, rows, K, x_stride, out_stride,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SEGMENTS: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """M >= rows rows at once. Grid: (column tiles, SPLITS)."""
    sums, row, cols, ok = gemv_sums(x, w0, w1, w2, n0, n1, n2, rows, K, x_stride, M, BN, BK, SPLITS, SEGMENTS)
    if SPLITS > 1:
        store_part(part, sums, row, cols, ok, rows, n0 + n1 + n2)
    else:
        _store(out, out_stride, with_bias(sums, cols, b0, b1, b2, n0, n1, n2, B0, B1, B2), row, cols, ok)


@triton.jit(do_not_specialize=_SIZES)
def gemm(
    x, out, part, w0, w1, w2, b0, b1, b2, n0, n1, n2, rows, K, x_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SEGMENTS: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles times column tiles, SPLITS)."""
    sums, row, cols, ok = gemm_sums(
        x, w0, w1, w2, n0, n1, n2, rows, K, x_stride, BM, BN, BK, SPLITS, SEGMENTS, PRECISION
    )
    if SPLITS > 1:
        store_part(part, sums, row, cols, ok, rows, n0 + n1 + n2)
    else:
        _store(out, out_stride, with_bias(sums, cols, b0, b1, b2, n0, n1, n2, B0, B1, B2), row, cols, ok)


@triton.jit(do_not_specialize=_SIZES)
def merge_splits(
    out, part, b0, b1, b2, n0, n1, n2, rows, out_stride,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of all splits, and the bias. Grid: (rows, blocks of columns)."""
    sums, row, cols, ok = added_splits(part, rows, n0 + n1 + n2, BLOCK, SPLITS)
    _store(out, out_stride, with_bias(sums, cols, b0, b1, b2, n0, n1, n2, B0, B1, B2), row, cols, ok)


@triton.jit(do_not_specialize=["M", "N"])
def batched(
    x, w, out, M, N, K, x_row, out_row, batch1, batch2,
    x0, x1, x2, w0, w1, w2, o0, o1, o2,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x[..., M, K]` times `w[..., N, K]` transposed over three levels of batch. Grid: batch times tiles."""
    tiles_m = tl.cdiv(M, BM)
    tiles = tiles_m * tl.cdiv(N, BN)
    tile_m = tl.program_id(0) % tiles % tiles_m
    tile_n = tl.program_id(0) % tiles // tiles_m
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    c = batch % batch2
    b = batch // batch2 % batch1
    a = batch // batch2 // batch1
    row = tile_m * BM + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)
    inputs = x + (a * x0 + b * x1 + c * x2) + row.to(tl.int64)[:, None] * x_row
    weights = w + (a * w0 + b * w1 + c * w2) + col.to(tl.int64)[None, :] * K
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        xt = tl.load(inputs + at[None, :], mask=(row < M)[:, None] & (at < K)[None, :], other=0.0)
        wt = tl.load(weights + at[:, None], mask=(col < N)[None, :] & (at < K)[:, None], other=0.0)
        acc = dot(xt, wt, acc, PRECISION)
    target = out + (a * o0 + b * o1 + c * o2) + row.to(tl.int64)[:, None] * out_row + col[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(row < M)[:, None] & (col < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def grouped(
    x, w, ends, out, status, rows, N, K, groups, x_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each group of rows, up to its one of `ends[groups]`, times its own matrix of `w[groups, N, K]` transposed.

    Group e owns the row tiles from `begin // BM + e` on, and what is behind the last end, which becomes zero, counts as
    one more group: at most `rows // BM + groups + 1` tiles, whatever the ends are. Grid: (row tiles, column tiles).
    """
    tile = tl.program_id(0)
    low = tile * 0
    high = groups + 1 + tile * 0
    while low < high:
        middle = (low + high) // 2
        start = tl.load(ends + tl.maximum(middle - 1, 0)).to(tl.int32)
        start = tl.where(middle == 0, 0, start)
        if start // BM + middle <= tile:
            low = middle + 1
        else:
            high = middle
    group = low - 1
    begin = tl.where(group == 0, 0, tl.load(ends + tl.maximum(group - 1, 0)).to(tl.int32))
    end = tl.where(group == groups, rows, tl.load(ends + tl.minimum(group, groups - 1)).to(tl.int32))
    if end < begin:
        tl.store(status, 1)
    if (begin < 0) | (end > rows):
        tl.store(status, 1)
    row = begin + (tile - (begin // BM + group)) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (row >= 0) & (row < tl.minimum(end, rows))
    acc = tl.zeros([BM, BN], tl.float32)
    inputs = x + row.to(tl.int64)[:, None] * x_stride
    weights = w + (group.to(tl.int64) * N + col)[None, :] * K
    depth = tl.where(group == groups, 0, K)
    for k in range(0, depth, BK):
        at = k + tl.arange(0, BK)
        xt = tl.load(inputs + at[None, :], mask=ok[:, None] & (at < K)[None, :], other=0.0)
        wt = tl.load(weights + at[:, None], mask=(col < N)[None, :] & (at < K)[:, None], other=0.0)
        acc = dot(xt, wt, acc, PRECISION)
    target = out + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=ok[:, None] & (col < N)[None, :])
