"""Projections of one input become one call over several weights: QKV, gate and up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node

from llmopt.compiler.aliasing import escapes
from llmopt.compiler.graph import Rewriter, aten, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Before: `q = linear(x, [wq], [bq]); k = linear(x, [wk], [None])`.
    After: `y = linear(x, [wq, wk], [bq, None]); q = y[..., :nq]; k = y[..., nq:]`.

    The weights are listed, not concatenated: nothing is copied, an in-place edit of one of them is seen at once, and
    `state_dict` answers as before.
    """

    name = "merge_linears"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        by_input: dict[Node, list[Node]] = defaultdict(list)
        for node in nodes_of(graph, llmopt_ops.linear.default):
            by_input[node.args[0]].append(node)
        order = {node: i for i, node in enumerate(graph.nodes)}
        for x, group in by_input.items():
            if len(group) < 2:
                continue
            late = [n for n in group if any(order[a] > order[group[0]] for a in _weights(n))]
            for _ in late:
                report.skipped["weight is computed after the first product"] += 1
            # A part of a merged result has gaps between its rows, and keeps the memory of the other parts alive.
            seen = [n for n in group if escapes(n)]
            for _ in seen:
                report.skipped["the caller sees its memory"] += 1
            group = [n for n in group if n not in late and n not in seen]
            if len(group) < 2:
                continue
            if not context.burn():
                break
            self._merge(rewriter, x, group)
            report.matched += 1
        return report

    def _merge(self, rewriter: Rewriter, x: Node, group: list[Node]) -> None:
        weights = [w for node in group for w in node.args[1]]
        biases = [b for node in group for b in node.args[2]]
        with rewriter.before(group[0]):
            merged = rewriter.call(llmopt_ops.linear.default, x, weights, biases)
            last, start, parts = tensor(merged).ndim - 1, 0, []
            for node in group:
                size = int(tensor(node).shape[-1])
                parts.append(rewriter.call(aten.slice.Tensor, merged, last, start, start + size))
                start += size
        for node, part in zip(group, parts, strict=True):
            rewriter.replace(node, part)


def _weights(node: Node) -> list[Node]:
    args: Any = node.args
    return [w for w in (*args[1], *args[2]) if isinstance(w, Node)]
