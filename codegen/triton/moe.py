"""Launches of the mixture of experts."""

from __future__ import annotations

import sympy
import torch

from llmopt.codegen.cpu.templates import PlannedCall
from llmopt.codegen.triton.calls import ACTIVATIONS, Call, ceil_div, power, precision
from llmopt.codegen.triton.launch import Launch

_BN = 64
_ROUTED = 64  # ids that the routing program looks at in one go
_MOST_ROWS = 64  # of a tile


def moe_workspace(call: PlannedCall) -> sympy.Expr:
    """Bytes of the routing tables, the inner activations (in the input's type, at most 4 bytes) and the outputs."""
    rows, hidden, inner, experts, k = call.ints[:5]
    slots = rows * k
    return 4 * (2 * (slots + experts * _MOST_ROWS) + experts + 64) + 4 * slots * (inner + hidden) + 256


def _moe(call: Call) -> list[Launch]:
    rows, hidden, inner, experts, k, x_stride, out_stride = call.ints
    x, ids, weights, gate_up, down, out, workspace = call.tensors
    slots = rows * k
    if slots == 0:
        return []
    # A tile should hold about as many slots as an expert gets.
    bm = max(16, min(_MOST_ROWS, power(ceil_div(slots, experts))))
    tiles = ceil_div(slots, bm) + min(experts, slots)
    order, rest = _carve(workspace, tiles * bm, torch.int32)
    owner, rest = _carve(rest, tiles, torch.int32)
    expert_out, rest = _carve(rest, slots * hidden, torch.float32)
    hidden_states, _ = _carve(rest, slots * inner, x.dtype)
    tile = {"BM": bm, "BN": _BN, "BK": 32, "PRECISION": precision(x)}
    activation = ACTIVATIONS[call.arguments[2]]
    routing = {"BM": bm, "BLOCK": _ROUTED, "BLOCK_E": power(experts)}
    block = min(1024, power(hidden))
    up_args = (x, gate_up, order, owner, hidden_states, k, hidden, inner, x_stride)
    down_args = (hidden_states, down, order, owner, expert_out, hidden, inner)
    combine_args = (expert_out, ids, weights, out, k, hidden, experts, out_stride)
    return [
        Launch("moe.fill", (ceil_div(tiles * bm, 1024),), (order, tiles * bm, -1), {"BLOCK": 1024}),
        Launch("moe.route", (1,), (ids, order, owner, call.status, slots, experts, tiles), routing),
        Launch("moe.gate_up", (tiles, ceil_div(inner, _BN)), up_args, {**tile, "ACT": activation}),
        Launch("moe.down", (tiles, ceil_div(hidden, _BN)), down_args, tile),
        Launch("moe.combine", (rows, ceil_div(hidden, block)), combine_args, {"BLOCK": block}),
    ]


def _carve(memory: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` elements of a piece of memory, and the rest of it from the next 16 bytes on."""
    size = count * dtype.itemsize
    return memory[:size].view(dtype), memory[ceil_div(size, 16) * 16 :]


MOE = _moe
