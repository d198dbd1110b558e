"""Launches of low-rank adapters."""

from __future__ import annotations

import torch

from llmopt.codegen.triton.calls import Call, ceil_div, power
from llmopt.codegen.triton.launch import Launch


def _lora(call: Call) -> list[Launch]:
    rows, k, x_stride, y_stride, out_stride, cols, slots, slot_size, most, count, *numbers = call.ints
    x, y, out, index, pool, ranks, scales, workspace = call.tensors
    if rows == 0:
        return []
    made = []
    if y is not None:
        block = min(1024, power(cols))
        grid = (rows, ceil_div(cols, block))
        made.append(Launch("lora.copy_rows", grid, (y, out, cols, y_stride, out_stride), {"BLOCK": block}))
    # The parts follow one another on the stream, so they take turns with the same memory.
    hidden = workspace[: 4 * rows * most].view(torch.float32)
    block_r = power(most)
    down = {"BLOCK_R": block_r, "BLOCK_K": max(16, min(power(k), 4096 // block_r))}
    for part in range(count):
        target, column, size, offset = numbers[4 * part : 4 * part + 4]
        args = (x, index, pool, ranks, scales, hidden, call.status, k, x_stride, slots, slot_size, most, target, offset)
        made.append(Launch("lora.shrink", (rows,), args, down))
        block_n = max(16, min(power(size), 4096 // block_r))
        up = (hidden, index, pool, ranks, out[column:], size, out_stride, slots, slot_size, most)
        up_args = (*up, target, offset + most * k)
        grid = (rows, ceil_div(size, block_n))
        made.append(Launch("lora.expand", grid, up_args, {"BLOCK_R": block_r, "BLOCK_N": block_n}))
    return made


LORA = _lora
