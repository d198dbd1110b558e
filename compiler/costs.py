"""What nodes of a graph cost in symbolic sizes: by the op's own declaration, or by its operands."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx.node import Node, map_arg
from torch.utils.flop_counter import flop_registry

from llmopt.compiler.attention_ops import paged_stages
from llmopt.compiler.graph import aten, is_op, is_tensor, tensor, to_expr
from llmopt.compiler.opspec import Cost, numel, spec_of
from llmopt.compiler.vocabulary import llmopt_ops

ZERO = sympy.Integer(0)

# Ops that read only the rows of their table that the index names: position of the table among the arguments.
_GATHERS: dict[Any, int] = {
    aten.embedding.default: 0,
    aten.index_select.default: 0,
    aten.gather.default: 0,
    aten.index.Tensor: 0,
    aten.select.int: 0,
    aten.slice.Tensor: 0,
}
# Pointwise by tag, but nothing is computed.
_MOVES = frozenset({aten._to_copy.default, aten.clone.default, aten.copy.default, aten.where.self})


def memory_bytes(node: Node) -> sympy.Expr:
    """Bytes of memory behind a tensor; dimensions that a broadcast repeats count once."""
    val = tensor(node)
    total: sympy.Expr = sympy.Integer(val.element_size())
    for size, stride in zip(val.shape, val.stride(), strict=True):
        total = total * (1 if stride == 0 else to_expr(size))
    return total


def _results(node: Node) -> list[Node]:
    """The tensors that a node makes: itself, or the elements of its tuple that somebody reads."""
    return [node] if is_tensor(node) else [u for u in node.users if is_op(u, operator.getitem) and is_tensor(u)]


def flops_of(node: Node) -> sympy.Expr:
    """Floating-point operations of a node: PyTorch's formulas for products, one an element for the rest."""
    target: Any = node.target
    spec = spec_of(target)
    values = lambda item: map_arg(item, lambda n: n.meta["val"])  # noqa: E731
    if spec is not None:
        return ZERO + spec.cost(*values(node.args)).flops
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is not None:
        return to_expr(formula(*values(node.args), **values(node.kwargs), out_val=node.meta["val"]))
    tags = getattr(target, "tags", ())
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    if torch.Tag.reduction in tags or target in (aten.softmax.int, aten.cumsum.default, aten.topk.default):
        return numel(tensor(inputs[0])) if inputs else ZERO
    if torch.Tag.pointwise in tags and target not in _MOVES and is_tensor(node):
        return numel(tensor(node))
    return ZERO


def group_cost(nodes: Sequence[Node], inputs: Iterable[Node], outputs: Iterable[Node]) -> Cost:
    """Cost of nodes that one kernel computes: what goes in is read once, what comes out is written once."""
    members = set(nodes)
    read: sympy.Expr = ZERO
    for node in inputs:
        uses = [user for user in node.users if user in members]
        gathers = [u for u in uses if u.target in _GATHERS and u.args[_GATHERS[u.target]] is node]
        if uses and len(gathers) == len(uses):
            read += sum((numel(tensor(u)) * tensor(u).element_size() for u in gathers), ZERO)
        else:
            read += memory_bytes(node)
    written = sum((memory_bytes(node) for node in outputs), ZERO)
    return Cost(sum((flops_of(node) for node in nodes), ZERO), read, written)


def node_costs(node: Node, calls: int = 1) -> list[Cost]:
    """Cost of one node, as many parts as kernel calls compute it; the last holds what cannot be divided."""
    args = map_arg(node.args, lambda n: n.meta["val"])
    if is_op(node, llmopt_ops.paged_attention.default) and calls == 2:
        return list(paged_stages(*args))
    spec = spec_of(node.target)
    if spec is not None:
        total = spec.cost(*args)
    else:
        total = group_cost([node], [n for n in node.all_input_nodes if is_tensor(n)], _results(node))
    return [*(Cost(ZERO, ZERO, ZERO) for _ in range(calls - 1)), total]
