"""Proves that a graph treats the rows of its sequence dimension independently of one another.

Only then may the tokens of many requests lie in that one dimension. Every op between the attentions must give row i
from rows i of its inputs; what cannot be shown to do so is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import aten, is_op, is_tensor, location, tensor, to_expr
from llmopt.compiler.opspec import spec_of
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import CONSTANTS, constant_entry

# Dimension arguments of ops that combine entries along a dimension: position and default.
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.softmax.int: (1, None),
    aten._softmax.default: (1, None),
    aten.log_softmax.int: (1, None),
    aten.sum.dim_IntList: (1, None),
    aten.mean.dim: (1, None),
    aten.amax.default: (1, None),
    aten.amin.default: (1, None),
    aten.any.dim: (1, None),
    aten.all.dim: (1, None),
    aten.argmax.default: (1, None),
    aten.cumsum.default: (1, None),
    aten.topk.default: (2, -1),
    aten.sort.default: (1, -1),
    aten.cat.default: (1, 0),
    aten.repeat_interleave.self_int: (2, None),
    aten.gather.default: (1, None),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.chunk.default: (2, 0),
    aten.slice.Tensor: (1, 0),
    aten.select.int: (1, None),
    aten.flip.default: (1, None),
    aten.roll.default: (2, None),
}

# Ops that only rearrange dimensions; the sizes of the result show where the rows went.
_REARRANGING = frozenset(
    {
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.transpose.int),
        *(aten.permute.default, aten.clone.default, aten.expand.default, aten.t.default),
    }
)

# Ops whose rows are all leading dimensions of their first operand.
_LAST_DIM = frozenset(
    {
        *(llmopt_ops.linear.default, llmopt_ops.rms_norm.default, llmopt_ops.layer_norm.default),
        *(llmopt_ops.add_rms_norm.default, llmopt_ops.add_layer_norm.default, aten.layer_norm.default),
        *(aten.linear.default, aten.native_layer_norm.default, aten.rms_norm.default),
    }
)

# Ops that take sizes as such: the number of rows in one of them is no number that is computed with.
_SIZED = (aten.view.default, aten.expand.default, aten.repeat.default)

# Attention mixes rows, and is the one op that a paged cache replaces.
ATTENTION = llmopt_ops.attention.default


class RowLocality:
    """Tracks which dimension of each value is the rows; `symbol` is their number."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol

    def row_dim(self, val: Any, node: Node) -> int | None:
        """The dimension of the rows, None if there is none; refuses several, and rows folded into something else."""
        if not isinstance(val, torch.Tensor):
            return None
        dims = [d for d, s in enumerate(val.shape) if self.symbol in to_expr(s).free_symbols]
        if not dims:
            return None
        if len(dims) > 1:
            raise self._refuse(node, "pairs of positions are computed outside attention")
        if to_expr(val.shape[dims[0]]) != self.symbol:
            raise self._refuse(node, f"rows are folded into a dimension of size {val.shape[dims[0]]}")
        return dims[0]

    def check(self, node: Node) -> None:
        """Raises UnsupportedError unless row i of `node` depends on row i of its inputs only."""
        val = node.meta["val"]
        items = val if isinstance(val, list | tuple) else [val]
        if not any(isinstance(item, torch.Tensor) for item in items):
            return
        dims = [self.row_dim(item, node) for item in items]
        if node.target is operator.getitem or (is_op(node, *CONSTANTS) and constant_entry(node) is not None):
            return
        if not is_op(node, *_SIZED) and any(self._is_length(n) for n in node.all_input_nodes):
            raise self._refuse(node, "the number of tokens is computed with")
        inputs = [n for n in node.all_input_nodes if is_tensor(n) and self.row_dim(tensor(n), n) is not None]
        if not inputs:
            # Only what is stretched has the same row everywhere.
            if any(dim is not None for dim in dims) and not is_op(node, aten.expand.default, aten.repeat.default):
                raise self._refuse(node, "its rows are counted in a way that is not known")
            return
        if node.target is ATTENTION:
            if any(self.row_dim(tensor(x), x) != 1 or tensor(x).shape[0] != 1 for x in node.args[:3]):
                raise self._refuse(node, "attention is over something else than the sequence")
            return
        rule = self._rule(node)
        if rule is None:
            raise self._refuse(node, "it is not known to treat rows independently")
        if not rule(node, inputs):
            raise self._refuse(node, "it mixes rows of different tokens")

    def _rule(self, node: Node) -> Callable[[Node, list[Node]], bool] | None:
        target: Any = node.target
        if target in _ALONG:
            return self._along
        if target is aten.index_select.default:
            return self._lookup
        if target in _REARRANGING:
            return self._keeps_rows
        if target is aten.view.default:
            return self._view
        if target in _LAST_DIM:
            return lambda n, inputs: all(self.row_dim(tensor(x), x) != tensor(x).ndim - 1 for x in inputs)
        if target is llmopt_ops.rope.default:
            return lambda n, inputs: all(self.row_dim(tensor(x), x) == 1 for x in inputs)
        if target is llmopt_ops.moe.default:
            return lambda n, inputs: all(self.row_dim(tensor(x), x) == 0 for x in inputs)
        if target is aten.embedding.default:
            return lambda n, inputs: inputs == [n.args[1]]
        if target is llmopt_ops.gated_act.default or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._aligned
        if target in (aten.type_as.default, aten._to_copy.default, aten.where.ScalarOther, aten.where.ScalarSelf):
            return self._aligned
        if target in (aten.silu.default, aten.relu.default, aten.gelu.default, aten.softplus.default):
            return self._aligned
        if target in (aten.floor_divide.default, aten.floor_divide.Scalar):  # pointwise, but not tagged so
            return self._aligned
        if target in (aten.matmul.default, aten.mm.default, aten.bmm.default, llmopt_ops.batched_linear.default):
            return self._product
        spec = spec_of(target)
        if spec is not None and spec.row_local:  # a user's op, by its own declaration
            return lambda n, inputs: all(self.row_dim(tensor(x), x) != tensor(x).ndim - 1 for x in inputs)
        return None

    def _aligned(self, node: Node, inputs: list[Node]) -> bool:
        """Broadcasting aligns dimensions from the right."""
        out = self.row_dim(tensor(node), node)
        if out is None:
            return False
        distance = tensor(node).ndim - out
        return all(tensor(x).ndim - (self.row_dim(tensor(x), x) or 0) == distance for x in inputs)

    def _along(self, node: Node, inputs: list[Node]) -> bool:
        position, default = _ALONG[node.target]
        dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        if dims is None:
            return False
        dims = dims if isinstance(dims, list | tuple) else [dims]
        return all(self.row_dim(tensor(x), x) not in [int(d) % tensor(x).ndim for d in dims] for x in inputs)

    def _lookup(self, node: Node, inputs: list[Node]) -> bool:
        """Each row's own entries of a table, or the same features of each row."""
        x, dim, index = node.args
        if inputs == [index]:
            return True
        return inputs == [x] and self.row_dim(tensor(x), x) != int(dim) % tensor(x).ndim

    def _product(self, node: Node, inputs: list[Node]) -> bool:
        """Rows of the first factor, or columns of the second one (rope's frequencies times positions)."""
        last = tensor(inputs[0]).ndim - 1
        row = self.row_dim(tensor(inputs[0]), node)
        if inputs == [node.args[1]] and node.target is not llmopt_ops.batched_linear.default:
            return last > 0 and row == last
        return inputs == [node.args[0]] and row != last

    def _is_length(self, node: Node) -> bool:
        val = node.meta.get("val")
        return isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool) and bool(
            self.symbol in val.node.expr.free_symbols
        )

    def _keeps_rows(self, node: Node, inputs: list[Node]) -> bool:
        return self.row_dim(tensor(node), node) is not None

    def _view(self, node: Node, inputs: list[Node]) -> bool:
        """Row-major order must put the same number of entries in front of the rows before and after."""
        x = inputs[0]
        before, after = self.row_dim(tensor(x), x), self.row_dim(tensor(node), node)
        if before is None or after is None:
            return False
        lead = lambda val, dim: sympy.prod([to_expr(s) for s in val.shape[:dim]])  # noqa: E731
        return bool(lead(tensor(x), before) == lead(tensor(node), after))

    def _refuse(self, node: Node, why: str) -> UnsupportedError:
        reason = f"the model cannot run over a paged KV cache: {why}"
        return UnsupportedError(reason, operation=str(node.target), location=location(node))


def is_row_map(node: Node) -> bool:
    """Whether a node maps each row of exactly one input, so that rows can be chosen before it as well as after."""
    if is_op(node, *_LAST_DIM) and node.target not in (
        llmopt_ops.add_rms_norm.default,
        llmopt_ops.add_layer_norm.default,
        aten.native_layer_norm.default,
    ):
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_op(node, aten._to_copy.default)
