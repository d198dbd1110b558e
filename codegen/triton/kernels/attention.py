"""Attention by online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022), and the cache's writer.

The query heads of one key head are packed into the rows of a tile, so keys are read once for all of them and a decode
step fills the matrix units as well as it can. Launch grids depend on shapes alone, never on lengths: a step can be
captured as a CUDA graph and replayed for other requests. With SPLITS > 1 the keys of a tile are divided among programs
(split-KV, as in Flash-Decoding), which leave float32 results in `part` for `merge` to combine.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.triton.kernels.functions import LOG2E, dot, tanh


@triton.jit
def kv_write(
    k, v, slots, k_cache, v_cache, status, groups, size, value_size, block_size, blocks, k_token, k_head, v_token,
    v_head, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values of one token and head into its slot; slot -1 is not stored. Grid: (tokens, groups)."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    block = slot // block_size
    if slot >= 0:
        if block >= blocks:
            tl.store(status, 1)
        else:
            d = tl.arange(0, BLOCK)
            row = (block * groups + group) * block_size + slot % block_size
            key = tl.load(k + token * k_token + group * k_head + d, mask=d < size)
            tl.store(k_cache + row * size + d, key, mask=d < size)
            value = tl.load(v + token * v_token + group * v_head + d, mask=d < value_size)
            tl.store(v_cache + row * value_size + d, value, mask=d < value_size)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    s = dot(q, k, tl.zeros([q.shape[0], k.shape[1]], tl.float32), PRECISION) * scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def _online(s, v, top, total, acc, PRECISION: tl.constexpr):
    """Takes a tile of scores (natural logarithms, -inf where hidden) and its values into the running softmax."""
    s = s * LOG2E
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    return new, total, acc


@triton.jit
def _sink(sink, top, total, acc):
    """A logit that takes part in the softmax and carries no value."""
    sink = sink * LOG2E
    new = tl.maximum(top, sink)
    safe = tl.where(new == -float("inf"), 0.0, new)
    shrink = tl.exp2(top - safe)
    return total * shrink + tl.exp2(sink - safe), acc * shrink[:, None]


@triton.jit(do_not_specialize=["sequences", "tokens", "width"])
def paged(
    q, k_cache, v_cache, tables, starts, lengths, out, part, slopes, sinks, scale, softcap,
    sequences, tokens, width, window, q_token, q_head, o_token, o_head,
    REPEAT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention of a ragged batch over paged keys. Grid: (query tiles, groups, SPLITS).

    Query tiles are numbered so that request b owns those from `starts[b] // BQ + b` on: at most
    `tokens // BQ + sequences` of them, whatever the lengths are.
    """
    BQ: tl.constexpr = BM // REPEAT
    HEADS: tl.constexpr = REPEAT * GROUPS
    tile = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    low = tile * 0
    high = sequences + tile * 0
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BQ + middle <= tile:
            low = middle + 1
        else:
            high = middle
    b = low - 1
    start = tl.load(starts + b)
    queries = tl.load(starts + b + 1) - start
    first = (tile - (start // BQ + b)) * BQ
    if first < queries:
        length = tl.load(lengths + b)
        m = tl.arange(0, BM)
        query = first + m // REPEAT
        head = group * REPEAT + m % REPEAT
        ok = (m < BQ * REPEAT) & (query < queries)
        token = (start + query).to(tl.int64)
        position = length - queries + query
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        q_rows = q + token * q_token + head * q_head
        qt = tl.load(q_rows[:, None] + d[None, :], mask=ok[:, None] & (d < SIZE)[None, :], other=0.0)
        if SLOPES:
            slope = tl.load(slopes + head, mask=ok, other=0.0)
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_E], tl.float32)
        end = tl.minimum(length, length - queries + first + BQ)
        begin = end * 0
        if WINDOW:
            begin = tl.maximum(length - queries + first - window + 1, 0) // BN * BN
        span = tl.cdiv(tl.cdiv(end - begin, BN), SPLITS) * BN
        begin = begin + split * span
        end = tl.minimum(end, begin + span)
        for n in range(begin, end, BN):
            j = n + tl.arange(0, BN)
            inside = j < end
            page = tl.load(tables + b.to(tl.int64) * width + j // PAGE, mask=inside, other=0).to(tl.int64)
            slot = (page * GROUPS + group) * PAGE + j % PAGE
            kt = tl.load(
                k_cache + slot[None, :] * SIZE + d[:, None], mask=inside[None, :] & (d < SIZE)[:, None], other=0.0
            )
            s = _scores(qt, kt, scale, softcap, SOFTCAP, PRECISION)
            if SLOPES:
                s += slope[:, None] * j.to(tl.float32)[None, :]
            seen = ok[:, None] & inside[None, :] & (j[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (j[None, :] > position[:, None] - window)
            s = tl.where(seen, s, -float("inf"))
            vt = tl.load(
                v_cache + slot[:, None] * VALUE_SIZE + e[None, :],
                mask=inside[:, None] & (e < VALUE_SIZE)[None, :],
                other=0.0,
            )
            top, total, acc = _online(s, vt, top, total, acc, PRECISION)
        if SPLITS > 1:
            at = (split * tokens + token) * HEADS + head
            lead = part + at * VALUE_SIZE
            tl.store(lead[:, None] + e[None, :], acc, mask=ok[:, None] & (e < VALUE_SIZE)[None, :])
            rows = tokens.to(tl.int64) * HEADS * SPLITS
            tl.store(part + rows * VALUE_SIZE + at, top, mask=ok)
            tl.store(part + rows * (VALUE_SIZE + 1) + at, total, mask=ok)
        else:
            if SINKS:
                total, acc = _sink(tl.load(sinks + head, mask=ok, other=0.0), top, total, acc)
            y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            o_rows = out + token * o_token + head * o_head
            where = ok[:, None] & (e < VALUE_SIZE)[None, :]
            tl.store(o_rows[:, None] + e[None, :], y.to(out.dtype.element_ty), mask=where)


@triton.jit(do_not_specialize=["tokens"])
def merge(
    out, part, sinks, tokens, o_token, o_head,
    HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Combines the splits of one token and head. Grid: (tokens, HEADS)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    split = tl.arange(0, SPLITS)
    at = (split * tokens.to(tl.int64) + token) * HEADS + head
    rows = tokens.to(tl.int64) * HEADS * SPLITS
    tops = tl.load(part + rows * VALUE_SIZE + at)
    totals = tl.load(part + rows * (VALUE_SIZE + 1) + at)
    top = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(top, sink)
    safe = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(tops - safe)
    total = tl.sum(totals * weight, 0)
    if SINKS:
        total += tl.exp2(sink - safe)
    values = tl.load(
        part + at[:, None] * VALUE_SIZE + e[None, :], mask=(e < VALUE_SIZE)[None, :] & (weight > 0)[:, None], other=0.0
    )
    y = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    target = out + token * o_token + head * o_head + e
    tl.store(target, y.to(out.dtype.element_ty), mask=e < VALUE_SIZE)


@triton.jit(do_not_specialize=["queries", "keys"])
def contiguous(
    q, k, v, mask, out, slopes, sinks, scale, softcap, queries, keys, window,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
    mask_batch, mask_head, mask_row, mask_key,
    REPEAT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over contiguous keys. MASK: 0 none, 1 boolean, 2 additive. Grid: (batch times query tiles, groups)."""
    BQ: tl.constexpr = BM // REPEAT
    query_tiles = tl.cdiv(queries, BQ)
    first = tl.program_id(0) % query_tiles * BQ
    group = tl.program_id(1)
    batch = (tl.program_id(0) // query_tiles).to(tl.int64)
    m = tl.arange(0, BM)
    i = first + m // REPEAT
    head = group * REPEAT + m % REPEAT
    group = group.to(tl.int64)  # times strides, which may be long
    ok = (m < BQ * REPEAT) & (i < queries)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_rows = q + batch * q_batch + i.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    qt = tl.load(q_rows[:, None] + d[None, :], mask=ok[:, None] & (d < SIZE)[None, :], other=0.0)
    if SLOPES:
        slope = tl.load(slopes + head, mask=ok, other=0.0)
    if MASK > 0:
        mask_rows = mask + batch * mask_batch + head.to(tl.int64) * mask_head + i.to(tl.int64) * mask_row
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_E], tl.float32)
    begin = first * 0
    end = keys + first * 0
    if CAUSAL or WINDOW:
        end = tl.minimum(end, first + BQ)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BN * BN
    for n in range(begin, end, BN):
        j = n + tl.arange(0, BN)
        inside = j < end
        at = j.to(tl.int64)
        kt = tl.load(
            k + batch * k_batch + group * k_head + at[None, :] * k_row + d[:, None],
            mask=inside[None, :] & (d < SIZE)[:, None],
            other=0.0,
        )
        s = _scores(qt, kt, scale, softcap, SOFTCAP, PRECISION)
        if SLOPES:
            s += slope[:, None] * j.to(tl.float32)[None, :]
        seen = ok[:, None] & inside[None, :]
        if CAUSAL or WINDOW:
            seen = seen & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > i[:, None] - window)
        if MASK == 1:
            seen = seen & (tl.load(mask_rows[:, None] + at[None, :] * mask_key, mask=seen, other=0) != 0)
        if MASK == 2:
            s += tl.load(mask_rows[:, None] + at[None, :] * mask_key, mask=seen, other=0.0).to(tl.float32)
        s = tl.where(seen, s, -float("inf"))
        vt = tl.load(
            v + batch * v_batch + group * v_head + at[:, None] * v_row + e[None, :],
            mask=inside[:, None] & (e < VALUE_SIZE)[None, :],
            other=0.0,
        )
        top, total, acc = _online(s, vt, top, total, acc, PRECISION)
    if SINKS:
        total, acc = _sink(tl.load(sinks + head, mask=ok, other=0.0), top, total, acc)
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    o_rows = out + batch * o_batch + i.to(tl.int64) * o_row + head.to(tl.int64) * o_head
    target = ok[:, None] & (e < VALUE_SIZE)[None, :]
    tl.store(o_rows[:, None] + e[None, :], y.to(out.dtype.element_ty), mask=target)
