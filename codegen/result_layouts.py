"""Results lie in memory as the caller was told at capture: before selection, and only there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.layout import to_stride
from llmopt.codegen.select import weight_only
from llmopt.compiler.aliasing import memory_of
from llmopt.compiler.graph import Rewriter, aten, is_tensor, outputs, tensor, to_expr, view_base


def keep_layouts(graph: fx.Graph, told: Sequence[Any]) -> dict[int, torch.Tensor]:
    """Before: `return transpose(y)`, where the caller was told of dense rows. After: a dense copy of it is returned.

    `told` are the values of the results when they were captured; Dynamo traces what follows the graph by their strides.
    A result that is computed when weights are bound is copied, too: the caller may write to it.
    Results that share memory are looked at together: if one of them is the whole of that memory, the graph returns its
    copy for all of them, and of those that are only a view of it the value as it was told comes back, by index. If none
    is, they stay as they lie.
    """
    views: dict[int, torch.Tensor] = {}
    bound = weight_only(graph)
    results = outputs(graph)
    together: dict[int, list[int]] = defaultdict(list)
    for index, (node, val) in enumerate(zip(results, told, strict=True)):
        if is_tensor(node) and isinstance(val, torch.Tensor):
            together[memory_of(val)].append(index)
    rewriter = Rewriter(graph)
    with rewriter.before(graph.output_node()):
        for indices in together.values():
            bases = {view_base(results[i]) for i in indices}
            if any(base.op == "placeholder" for base in bases):
                continue  # views of arguments
            if all(_lies_as(tensor(results[i]), told[i]) for i in indices) and bases.isdisjoint(bound):
                continue
            whole = indices[0] if len(indices) == 1 else next((i for i in indices if _is_whole(told[i])), None)
            if whole is None or any(tensor(results[i]).dtype != tensor(results[whole]).dtype for i in indices):
                continue
            copy = _dense(rewriter, results[whole], told[whole])
            for i in indices:
                results[i] = copy
            views.update((i, told[i]) for i in indices if i != whole)
    graph.output_node().args = (tuple(results),)
    graph.eliminate_dead_code()
    return views


def _lies_as(val: torch.Tensor, told: torch.Tensor) -> bool:
    """Whether entries lie equally far apart, where there are several."""
    if any(size == 0 for size in map(to_expr, told.shape)):
        return True
    triples = zip(map(to_expr, told.shape), _strides(val), _strides(told), strict=True)
    return all(size == 1 or sympy.expand(one - other) == 0 for size, one, other in triples)


def _strides(val: torch.Tensor) -> list[sympy.Expr]:
    return [to_stride(stride) for stride in val.stride()]


def _order(told: torch.Tensor) -> list[int]:
    """The dimensions, from that whose entries lie farthest apart to that where they are neighbours."""
    far = [stride.node.hint if isinstance(stride, torch.SymInt) else stride for stride in told.stride()]
    return sorted(range(told.ndim), key=lambda dim: -far[dim])


def _dense(rewriter: Rewriter, node: Node, told: torch.Tensor) -> Node:
    """A copy of `node` without gaps, whose dimensions follow one another in memory as those of `told`."""
    order = _order(told)
    if order == sorted(order):
        return rewriter.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    turned = rewriter.call(aten.permute.default, node, order)
    dense = rewriter.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    return rewriter.call(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])


def _is_whole(told: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory, without gaps."""
    expected: Any = 1
    for dim in reversed(_order(told)):
        if to_expr(told.shape[dim]) != 1 and sympy.expand(to_stride(told.stride(dim)) - to_expr(expected)) != 0:
            return False
        expected = expected * told.shape[dim]
    return bool(sympy.expand(to_stride(told.untyped_storage().nbytes()) - to_expr(expected) * told.element_size()) == 0)
