"""Launches of paged and contiguous attention."""

from __future__ import annotations

import sympy
import torch

from llmopt.codegen.cpu.templates import PlannedCall
from llmopt.codegen.triton.calls import Call, ceil_div, power, precision
from llmopt.codegen.triton.launch import Launch

MAX_HEAD_SIZE = 256
MAX_SPLITS = 16
SPLIT_TOKENS = 64  # tokens of a step up to which keys are split among programs
SPLIT_KEYS = 256  # keys that a split should have at least, by the longest sequence that the table admits


def paged_workspace(call: PlannedCall) -> sympy.Expr:
    """Bytes of what the splits of all tokens leave: values, maximum and sum in float32."""
    heads, value_size, tokens = call.ints[1], call.ints[4], call.ints[-2]
    return 4 * MAX_SPLITS * sympy.Min(tokens, SPLIT_TOKENS) * heads * (value_size + 2)


def _tile(repeat: int, queries: int, size: int, itemsize: int) -> tuple[int, int, int, int]:
    """(rows of a tile, keys of a tile, warps, stages) for `queries` query rows of a key head.

    Wide rows get small tiles: queries, keys and values must fit into the shared memory of a multiprocessor.
    """
    wide = power(size) * itemsize > 256
    rows = max(16, power(repeat), min(64 if wide else 128, power(queries * repeat)))
    stages = 1 if power(size) * itemsize > 512 else 2
    return rows, 32 if wide else 64, 8 if rows >= 128 else 4, stages


def _paged(call: Call) -> list[Launch]:
    sequences, heads, groups, size, value_size, page, width, *rest = call.ints
    *strides, window, tokens, _ = rest
    q, k_cache, v_cache, tables, starts, lengths, out, slopes, sinks, part = call.tensors
    if tokens == 0 or sequences == 0:
        return []
    repeat = heads // groups
    rows, keys, warps, stages = _tile(repeat, ceil_div(tokens, sequences), max(size, value_size), q.element_size())
    query_tiles = tokens // (rows // repeat) + sequences
    splits = 1
    if tokens <= SPLIT_TOKENS and part is not None:
        wanted = ceil_div(2 * call.device.multiprocessors, query_tiles * groups)
        splits = power(max(1, min(MAX_SPLITS, wanted, width * page // SPLIT_KEYS)))
    if splits > 1:
        part = part.view(torch.float32)
    scale, softcap = call.floats
    block_e = power(value_size, 16)
    constants = {
        "REPEAT": repeat,
        "GROUPS": groups,
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "PAGE": page,
        "BLOCK_D": power(size, 16),
        "BLOCK_E": block_e,
        "BM": rows,
        "BN": keys,
        "SPLITS": splits,
        "SOFTCAP": softcap > 0,
        "WINDOW": window > 0,
        "SLOPES": slopes is not None,
        "SINKS": sinks is not None,
        "PRECISION": precision(q),
    }
    tensors = (q, k_cache, v_cache, tables, starts, lengths, out, *call.present(part, slopes, sinks))
    args = (*tensors, scale, softcap, sequences, tokens, width, window, *strides)
    made = [Launch("attention.paged", (query_tiles, groups, splits), args, constants, warps, stages)]
    if splits > 1:
        merging = {
            "HEADS": heads,
            "VALUE_SIZE": value_size,
            "BLOCK_E": block_e,
            "SPLITS": splits,
            "SINKS": sinks is not None,
        }
        merged = (out, part, *call.present(sinks), tokens, *strides[2:])
        made.append(Launch("attention.merge", (tokens, heads), merged, merging))
    return made


def _contiguous(call: Call) -> list[Launch]:
    batch, queries, keys, heads, groups, size, value_size, *rest = call.ints
    strides, (causal, _, window) = rest[:-3], rest[-3:]
    q, k, v, mask, out, slopes, sinks = call.tensors
    repeat = heads // groups
    rows, columns, warps, stages = _tile(repeat, queries, max(size, value_size), q.element_size())
    scale, softcap = call.floats
    constants = {
        "REPEAT": repeat,
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "BLOCK_D": power(size, 16),
        "BLOCK_E": power(value_size, 16),
        "BM": rows,
        "BN": columns,
        "CAUSAL": bool(causal),
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "SOFTCAP": softcap > 0,
        "WINDOW": window > 0,
        "SLOPES": slopes is not None,
        "SINKS": sinks is not None,
        "PRECISION": precision(q),
    }
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    tensors = (q, k, v, *call.present(mask), out, *call.present(slopes, sinks))
    args = (*tensors, scale, softcap, queries, keys, window, *strides)
    grid = (ceil_div(queries, rows // repeat) * batch, groups)
    return [Launch("attention.contiguous", grid, args, constants, warps, stages)]


PAGED, CONTIGUOUS = _paged, _contiguous
