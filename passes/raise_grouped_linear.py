"""Grouped matrix products that are no whole mixture of experts become `llmopt::grouped_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.compiler.graph import Rewriter, is_tensor, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import inner_last, is_grouped_product


@dataclass(frozen=True)
class RaiseGroupedLinear(Pass):
    """Before: `grouped_mm(x, w.transpose(-1, -2), ends)`. After: `llmopt.grouped_linear(x, w, ends)`.

    Runs behind `raise_moe`, for experts with biases, without a gate or with another activation. Weights `[E, K, N]` are
    transposed; where they are parameters, that happens once, when weights are bound.
    """

    name = "raise_grouped_linear"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in list(graph.nodes):
            if node._erased or not is_grouped_product(node):
                continue
            args: Any = (*node.args, *node.kwargs.values())
            x, weights, ends, *rest = args
            if not is_tensor(ends) or any(item is not None for item in rest):
                report.skipped["other arguments than x, weights and ends"] += 1
                continue
            if tensor(x).ndim != 2 or tensor(weights).ndim != 3:
                report.skipped["x is not [T, K], or the weights are not [E, K, N]"] += 1
                continue
            if tensor(node).dtype != tensor(x).dtype:
                report.skipped["the result has another dtype"] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(node):
                new = rewriter.call(llmopt_ops.grouped_linear.default, x, inner_last(rewriter, weights), ends)
            rewriter.replace(node, new)
            report.matched += 1
        return report
