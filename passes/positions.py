"""Finds what a graph counts along its sequence and takes the step's own positions instead.

Nothing is inferred from values: an `arange`, a running sum of one and the same number and the first entries of a table
count by what they are. What is computed from them stays in the graph, where `RowLocality` checks it.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import Node, map_arg

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, location, tensor, to_expr
from llmopt.passes.matching import CAST, CONSTANTS, constant_entry, is_number

_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)

# Ops whose entries are all entries of their first argument.
_VIEWS = frozenset(
    {
        *(aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
        *(aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.clone.default),
    }
)

# Types that hold every position.
_EXACT = (torch.int64, torch.int32, torch.float32, torch.float64)


def replace_positions(graph: fx.Graph, rewriter: Rewriter, positions: Node, symbol: sympy.Symbol) -> int:
    """Everything counted along the dimension of size `symbol` is taken from `positions[symbol]` (int64); how often.

    Before: `arange(2, S + 2)`, `cumsum(ones(1, S), 1)`, `table[:, :S]`. After: `positions + 2`,
    `view(positions + 1, [1, S])`, `index_select(table, 1, positions)`.
    Raises UnsupportedError for what counts otherwise: from the end, or another number of entries.
    """
    entries: dict[Node, torch.Tensor | None] = {}
    count = 0
    for node in list(graph.nodes):
        if not is_tensor(node) or not (dims := _row_dims(node, symbol)):
            continue
        with rewriter.before(node):
            new = _counted(rewriter, node, dims, positions, symbol, entries)
        if new is not None:
            rewriter.replace(node, new)
            count += 1
    return count


def _row_dims(node: Node, symbol: sympy.Symbol) -> list[int]:
    return [d for d, size in enumerate(tensor(node).shape) if symbol in to_expr(size).free_symbols]


def _counted(
    rewriter: Rewriter,
    node: Node,
    dims: list[int],
    positions: Node,
    symbol: sympy.Symbol,
    entries: dict[Node, torch.Tensor | None],
) -> Node | None:
    """`node` computed from the positions, or None if it is not where counting starts."""
    args: Any = node.args
    if is_op(node, *_RANGES):
        start, step = (0 if len(args) == 1 else args[0]), (args[2] if len(args) == 3 else 1)
        _check_size(node, dims[0], symbol)
        if not _is_whole(start) or not _is_whole(step):
            raise _refuse(node, "positions depend on the length")
        return _shaped(rewriter, node, 0, _linear(rewriter, positions, int(step), int(start)))
    if is_op(node, aten.cumsum.default) and dims == [args[1] % tensor(node).ndim]:
        entry = _entry(args[0], entries)
        if entry is None or tensor(node).dtype not in _EXACT or not _is_whole(entry.item()):
            return None  # which mixes rows
        _check_size(node, dims[0], symbol)
        step = int(entry)
        return _shaped(rewriter, node, dims[0], _linear(rewriter, positions, step, step))
    if is_op(node, aten.slice.Tensor) and not _row_dims(args[0], symbol) and len(dims) == 1:
        _, dim, start, _, stride = (*args, *(None,) * 4)[:5]
        start = start or 0
        _check_size(node, dims[0], symbol)
        if (dim or 0) % tensor(node).ndim != dims[0] or not isinstance(start, int) or start < 0:
            raise _refuse(node, "positions depend on the length")
        return rewriter.call(
            aten.index_select.default, args[0], dims[0], _linear(rewriter, positions, stride or 1, start)
        )
    return None


def _linear(rewriter: Rewriter, positions: Node, factor: int, offset: int) -> Node:
    """`factor * positions + offset`."""
    if factor != 1:
        positions = rewriter.call(aten.mul.Tensor, positions, factor)
    return rewriter.call(aten.add.Tensor, positions, offset) if offset else positions


def _shaped(rewriter: Rewriter, node: Node, dim: int, counted: Node) -> Node:
    """`counted[S]` along dimension `dim` of what has the shape and type of `node`."""
    like = tensor(node)
    if like.ndim > 1:
        counted = rewriter.call(aten.view.default, counted, [-1 if d == dim else 1 for d in range(like.ndim)])
        if any(size != 1 for d, size in enumerate(like.shape) if d != dim):
            sizes = [-1 if d == dim else int(size) for d, size in enumerate(like.shape)]
            counted = rewriter.call(aten.expand.default, counted, sizes)
    return counted if tensor(counted).dtype == like.dtype else rewriter.call(CAST, counted, dtype=like.dtype)


def _entry(node: Node, known: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    """What every entry of a tensor is, as one without dimensions; None where they may differ or are data."""
    if node not in known:
        known[node] = None
        known[node] = _find_entry(node, known)
    return known[node]


def _find_entry(node: Node, known: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    if is_op(node, *CONSTANTS):
        number = constant_entry(node)
        return None if number is None else torch.full((), number, dtype=tensor(node).dtype)
    if is_op(node, *_VIEWS):
        return _entry(node.args[0], known)
    tags = getattr(node.target, "tags", ())
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    if not (pointwise or is_op(node, CAST)) or not node.all_input_nodes:
        return None
    inputs: dict[Node, torch.Tensor] = {}
    for source in node.all_input_nodes:
        entry = _entry(source, known) if is_tensor(source) else None
        if entry is None:
            return None
        inputs[source] = entry
    if is_op(node, CAST):
        return inputs[node.args[0]].to(tensor(node).dtype)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), inputs.__getitem__)
    return node.target(*args, **kwargs)


def _is_whole(number: Any) -> bool:
    return isinstance(number, bool) or (is_number(number) and float(number).is_integer())


def _check_size(node: Node, dim: int, symbol: sympy.Symbol) -> None:
    size = tensor(node).shape[dim]
    if to_expr(size) != symbol:
        raise _refuse(node, f"{size} values are counted along the sequence")


def _refuse(node: Node, why: str) -> UnsupportedError:
    reason = f"the model cannot run over a paged KV cache: {why}"
    return UnsupportedError(reason, operation=str(node.target), location=location(node))
