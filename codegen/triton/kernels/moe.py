"""Mixture of experts: (row, expert) pairs are ordered by expert, then each expert's gated MLP runs over its own.

A slot is one of the `rows * k` choices of an expert. `order` lists slots expert after expert, each expert's part filled
up with -1 to whole tiles of BM, and `owner` names the expert of each tile (-1: none), so one static grid serves any
routing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmopt.codegen.triton.kernels.functions import activate, dot


@triton.jit(do_not_specialize=["slots"])
def route(
    ids, order, owner, status, slots, experts, tiles, BM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Orders the slots. One program, which passes over the ids twice. `order` holds -1 at first."""
    expert = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, slots, BLOCK):
        at = start + lane
        chosen = tl.load(ids + at, mask=at < slots, other=-1)
        bad = (at < slots) & ((chosen < 0) | (chosen >= experts))
        tl.store(status + lane * 0, 1, mask=bad)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    own = tl.cdiv(count, BM)
    last = tl.cumsum(own, 0)
    first = last - own
    for tile in range(0, tiles):
        mine = (first <= tile) & (tile < last)
        tl.store(owner + tile, tl.max(tl.where(mine, expert, -1), 0))
    place = first * BM
    for start in range(0, slots, BLOCK):
        at = start + lane
        chosen = tl.load(ids + at, mask=at < slots, other=-1)
        hit = (chosen[:, None] == expert[None, :]).to(tl.int32)
        before = tl.cumsum(hit, 0) - hit
        target = tl.sum(hit * (before + place[None, :]), 1)
        valid = (at < slots) & (chosen >= 0) & (chosen < experts)
        tl.store(order + target, at, mask=valid)
        place += tl.sum(hit, 0)


@triton.jit(do_not_specialize=["numel"])
def fill(out, numel, value, BLOCK: tl.constexpr):
    """Grid: (blocks)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.zeros([BLOCK], tl.int32) + value, mask=at < numel)


@triton.jit
def gate_up(
    x, weight, order, owner, hidden_states, k, hidden, inner, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`act(x gate^T) * (x up^T)` of one tile of slots, into `hidden_states[slots, inner]`. Grid: (tiles, columns)."""
    tile = tl.program_id(0)
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= 0:
        slot = tl.load(order + tile * BM + tl.arange(0, BM))
        used = slot >= 0
        col = tl.program_id(1) * BN + tl.arange(0, BN)
        rows = x + (slot // k).to(tl.int64)[:, None] * x_stride
        gates = weight + (expert * 2 * inner + col)[None, :] * hidden
        ups = weight + (expert * 2 * inner + inner + col)[None, :] * hidden
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for start in range(0, hidden, BK):
            at = start + tl.arange(0, BK)
            xt = tl.load(rows + at[None, :], mask=used[:, None] & (at < hidden)[None, :], other=0.0)
            inside = (col < inner)[None, :] & (at < hidden)[:, None]
            gate = dot(xt, tl.load(gates + at[:, None], mask=inside, other=0.0), gate, PRECISION)
            up = dot(xt, tl.load(ups + at[:, None], mask=inside, other=0.0), up, PRECISION)
        y = activate(gate, ACT) * up
        target = hidden_states + slot.to(tl.int64)[:, None] * inner + col[None, :]
        tl.store(target, y.to(hidden_states.dtype.element_ty), mask=used[:, None] & (col < inner)[None, :])


@triton.jit
def down(
    hidden_states, weight, order, owner, expert_out, hidden, inner,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden_states down^T` of one tile of slots, into float32 `expert_out[slots, hidden]`. Grid: (tiles, columns)."""
    tile = tl.program_id(0)
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= 0:
        slot = tl.load(order + tile * BM + tl.arange(0, BM))
        used = slot >= 0
        col = tl.program_id(1) * BN + tl.arange(0, BN)
        rows = hidden_states + slot.to(tl.int64)[:, None] * inner
        weights = weight + (expert * hidden + col)[None, :] * inner
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, inner, BK):
            at = start + tl.arange(0, BK)
            ht = tl.load(rows + at[None, :], mask=used[:, None] & (at < inner)[None, :], other=0.0)
            wt = tl.load(weights + at[:, None], mask=(col < hidden)[None, :] & (at < inner)[:, None], other=0.0)
            acc = dot(ht, wt, acc, PRECISION)
        target = expert_out + slot.to(tl.int64)[:, None] * hidden + col[None, :]
        tl.store(target, acc, mask=used[:, None] & (col < hidden)[None, :])


@triton.jit
def combine(expert_out, ids, weights, out, k, hidden, experts, out_stride, BLOCK: tl.constexpr):
    """The weighted sum over a row's experts, in their order. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < hidden
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(0, k):
        slot = row * k + choice
        chosen = tl.load(ids + slot)
        known = (chosen >= 0) & (chosen < experts)
        weight = tl.load(weights + slot).to(tl.float32)
        value = tl.load(expert_out + slot * hidden + col, mask=ok, other=0.0)
        acc += tl.where(known, weight * value, 0.0)  # nothing was computed for an unknown expert
    tl.store(out + row * out_stride + col, acc.to(out.dtype.element_ty), mask=ok)
