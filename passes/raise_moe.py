"""The grouped matrix products of a mixture of experts become `llmopt::moe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import CAST, element, inner_last, is_grouped_product, only_user, through_casts
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
    halves = [element(gate), element(up)]
    if None in halves or halves[0][0] is not halves[1][0] or (halves[0][1], halves[1][1]) != (0, 1):  # type: ignore[index]
        return None
    product = halves[0][0].args[0]  # type: ignore[index]
    return (product, act) if is_grouped_product(product) else None


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
    flat_ids: Any = sorted_pair[0].args[0]
    ids = flat_ids.args[0] if is_op(flat_ids, aten.view.default) else None
    if ids is None or tensor(ids).ndim != 2 or tensor(ids).shape[1] != top_k:
        return "expert ids are not [R, k]"

    scaled = only_user(down_product)
    while scaled is not None and is_op(scaled, CAST):
        scaled = only_user(scaled)
    if scaled is None or not is_op(scaled, aten.mul.Tensor):
        return "expert outputs are not scaled by the router"
    column: Any = next((a for a in scaled.args if is_op(a, aten.unsqueeze.default)), None)
    gathered_weights: Any = column.args[0] if column is not None else None
    if not is_op(gathered_weights, aten.index.Tensor) or gathered_weights.args[1][0] is not order:
        return "expert outputs are not scaled by the router"
    flat_weights = gathered_weights.args[0]
    router = flat_weights.args[0] if is_op(flat_weights, aten.view.default) else None
    if router is None or tensor(router).ndim != 2:
        return "router weights are not [R, k]"
    last = _summed(scaled, order, top_k)
    if isinstance(last, str):
        return last
    if tensor(last).dtype != tensor(x).dtype:
        return "the sum is not converted back to the input's type"
    return _MoeMatch(last, x, ids, router, product.args[1], down_product.args[1], act)


def _summed(scaled: Node, order: Node, top_k: int) -> Node | str:
    """Follows the way back: unsorted by the inverse of `order`, viewed as [R, k, H], summed over k."""
    back: Any = only_user(through_casts(scaled))
    if not is_op(back, aten.index.Tensor) or not is_op(back.args[1][0], aten.index_put.default):
        return "expert outputs are not scattered back"
    inverse: Any = back.args[1][0]
    if inverse.args[1][0] is not order or not is_op(inverse.args[2], aten.arange.default):
        return "expert outputs are scattered by something else than the inverse order"
    rows = only_user(back)
    total = only_user(rows) if is_op(rows, aten.view.default) else None
    if total is None or not is_op(total, aten.sum.dim_IntList) or list(total.args[1]) != [1]:
        return "expert outputs are not summed over the experts of a row"
    if tensor(rows).ndim != 3 or tensor(rows).shape[1] != top_k or not is_tensor(total):
        return "expert outputs are not summed over the experts of a row"
    return through_casts(total)
