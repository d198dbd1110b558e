"""The grouped matrix products of a mixture of experts become `llmopt::moe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, same_shape, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import (
    CAST,
    element,
    half_of,
    inner_last,
    is_grouped_product,
    only_user,
    other,
    through_casts,
)
from llmopt.passes.raise_gated_act import activation_name


@dataclass(frozen=True)
class _MoeMatch:
    last: Node
    x: Node
    ids: Node
    weights: Node
    gate_up: Node  # [E, K, N], as the grouped products take them
    down: Node
    act: str


@dataclass(frozen=True)
class RaiseMoe(Pass):
    """Before: rows gathered in the order of their experts, `grouped_mm` by gate and up, `act(gate) * up`,
    `grouped_mm` by down, scaled by the router's weights, scattered back and summed over each row's experts.
    After: `llmopt.moe(x, expert_ids, expert_weights, gate_up, down, act)`, weights stored `[E, K, N]` transposed when
    they are bound.
    """

    name = "raise_moe"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in list(graph.nodes):
            if node._erased or not is_grouped_product(node):
                continue
            first = element_chain(node.args[0])
            if first is None:  # the product by gate and up; the match starts from the one by down
                continue
            match = _match(node, *first)
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(match.last):
                experts = [inner_last(rewriter, weights) for weights in (match.gate_up, match.down)]
                arguments = (match.x, match.ids, match.weights, *experts, match.act)
                new = rewriter.call(llmopt_ops.moe.default, *arguments)
            rewriter.replace(match.last, new)
            report.matched += 1
        return report


def element_chain(hidden: Any) -> tuple[Node, str] | None:
    """(the product by gate and up, activation) if `hidden` is `act(gate) * up` of its two halves."""
    if is_op(hidden, llmopt_ops.gated_act.default):
        gate, up, act = hidden.args
    elif is_op(hidden, aten.mul.Tensor) and activation_name(hidden.args[0]):
        gate, up, act = hidden.args[0].args[0], hidden.args[1], activation_name(hidden.args[0])
    else:
        return None
    first, second = half_of(gate), half_of(up)
    if first is None or second is None or first.whole is not second.whole:
        return None
    if first.interleaved or second.interleaved or (first.which, second.which) != (0, 1):
        return None
    return (first.whole, act) if is_grouped_product(first.whole) else None


def _match(down_product: Node, product: Node, act: str) -> _MoeMatch | str:
    """The whole block around the two grouped products, or why it is none."""
    gathered: Any = product.args[0]
    if not is_op(gathered, aten.index.Tensor) or len(gathered.args[1]) != 1:
        return "rows are not gathered by expert"
    x, quotient = gathered.args[0], gathered.args[1][0]
    if not is_op(quotient, aten.floor_divide.default):
        return "rows are not gathered by expert"
    order, top_k = quotient.args
    sorted_pair = element(order)
    if sorted_pair is None or sorted_pair[1] != 1 or not is_op(sorted_pair[0], aten.sort.default):
        return "rows are not gathered by expert"
    flat_ids, *how = sorted_pair[0].args
    ids = flat_ids.args[0] if is_op(flat_ids, aten.view.default) and tensor(flat_ids).ndim == 1 else None
    if ids is None or not same_shape(tensor(ids).shape, (tensor(x).shape[0], top_k)):
        return "expert ids are not [R, k]"
    if any(how[1:]) or sorted_pair[0].kwargs:
        return "expert ids are not sorted in ascending order"
    ends = [_ends(grouped) for grouped in (product, down_product)]
    if ends[0] is None or ends[0] is not ends[1]:
        return "the two products are not over the same groups"
    experts = tensor(product.args[1]).shape[0]
    if not _counts_experts(ends[0], (sorted_pair[0], flat_ids), experts):
        return "the ends of the groups are not counted from the expert ids"

    scaled = only_user(down_product)
    outputs = through_casts(down_product, tensor(x).dtype)
    scaled = only_user(outputs)
    if scaled is None or not is_op(scaled, aten.mul.Tensor):
        return "expert outputs are not scaled by the router"
    column: Any = other(scaled, outputs)
    gathered_weights: Any = column.args[0] if is_op(column, aten.unsqueeze.default) else None
    if not is_op(gathered_weights, aten.index.Tensor) or gathered_weights.args[1] != [order]:
        return "expert outputs are not scaled by the router"
    flat_weights = gathered_weights.args[0]
    router = flat_weights.args[0] if is_op(flat_weights, aten.view.default) else None
    if router is None or tensor(flat_weights).ndim != 1 or not same_shape(tensor(router).shape, tensor(ids).shape):
        return "router weights are not [R, k]"
    last = _summed(scaled, order, (*tensor(ids).shape, tensor(x).shape[-1]), tensor(x).dtype)
    if isinstance(last, str):
        return last
    if tensor(last).dtype != tensor(x).dtype:
        return "the sum is not converted back to the input's type"
    return _MoeMatch(last, x, ids, router, product.args[1], down_product.args[1], act)


def _ends(product: Node) -> Any:
    """The third operand of `grouped_mm(x, weights, ends)`; None where there are others."""
    operands = [a for a in (*product.args, *product.kwargs.values()) if a is not None]
    return operands[2] if len(operands) == 3 else None


def _counts_experts(ends: Any, ids: tuple[Node, Node], experts: Any) -> bool:
    """Whether `ends` are the running sums of how often each expert occurs: `cumsum(histc(ids, E, 0, E - 1), 0)`.

    ids: the sorting of the experts' ids, and what it sorts.
    """
    if not is_op(ends, aten.cumsum.default) or ends.args[1] not in (0, -1):
        return False
    histogram: Any = ends.args[0]
    if not is_op(histogram, aten.histc.default) or histogram.args[1:] != (experts, 0, experts - 1):
        return False
    counted = histogram.args[0]
    while is_op(counted, CAST):
        counted = counted.args[0]
    return counted is ids[1] or element(counted) == (ids[0], 0)


def _summed(scaled: Node, order: Node, shape: tuple[Any, ...], dtype: torch.dtype) -> Node | str:
    """Follows the way back: unsorted by the inverse of `order`, viewed as `shape` [R, k, H], summed over k."""
    back: Any = only_user(through_casts(scaled, dtype))
    if not is_op(back, aten.index.Tensor) or not is_op(back.args[1][0], aten.index_put.default):
        return "expert outputs are not scattered back"
    place, indices, numbers, *accumulate = back.args[1][0].args
    inverts = list(indices) == [order] and is_op(numbers, aten.arange.default) and not any(accumulate)
    if not inverts or not all(same_shape(tensor(t).shape, tensor(order).shape) for t in (place, numbers)):
        return "expert outputs are scattered by something else than the inverse order"
    rows = only_user(back)
    total = only_user(rows) if is_op(rows, aten.view.default) else None
    if total is None or not is_op(total, aten.sum.dim_IntList) or list(total.args[1]) != [1]:
        return "expert outputs are not summed over the experts of a row"
    if not same_shape(tensor(rows).shape, shape) or tensor(total).ndim != 2:
        return "expert outputs are not summed over the experts of a row"
    return through_casts(total, dtype)
