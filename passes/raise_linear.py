"""Matrix products with a weight become `llmopt::linear`, whatever they are called and however the weight lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, nodes_of, placeholders, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import depends_only_on


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """Before: `linear(x, w, b)`, `addmm(b, x, w)`, `mm(x, w)`. After: `llmopt.linear(x, [w or w^T], [b])`.

    A weight stored `[K, N]` (GPT-2's Conv1D) gets the recipe `contiguous(w^T)`, which is computed once when weights are
    bound, not in the step.
    """

    name = "raise_linear"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        constants = depends_only_on(graph.nodes, {n for n in placeholders(graph) if n.meta.get("weight")})
        for node in nodes_of(graph, aten.linear.default, aten.addmm.default, aten.mm.default):
            match = _operands(node)
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            x, weight, bias, is_transposed = match
            if is_transposed and weight not in constants:
                report.skipped["the second factor is computed"] += 1
                continue
            dtypes = {tensor(t).dtype for t in (x, weight, bias) if t is not None}
            if len(dtypes) > 1:
                report.skipped["operands of different dtypes"] += 1
                continue
            if tensor(weight).ndim != 2 or tensor(x).ndim < 2:
                report.skipped["operands are not matrices"] += 1
                continue
            outputs = tensor(weight).shape[1 if is_transposed else 0]
            if bias is not None and (tensor(bias).ndim != 1 or not same_size(tensor(bias).shape[0], outputs)):
                report.skipped["the bias has not one number for each output"] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(node):
                if is_transposed:
                    turned = rewriter.call(aten.t.default, weight)
                    weight = rewriter.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
                elif not tensor(weight).is_contiguous():
                    weight = rewriter.call(aten.clone.default, weight, memory_format=torch.contiguous_format)
                new = rewriter.call(llmopt_ops.linear.default, x, [weight], [bias])
            rewriter.replace(node, new)
            report.matched += 1
        return report


def _operands(node: Node) -> tuple[Node, Node, Node | None, bool] | str:
    """(x, weight, bias, whether the weight lies [K, N]), or why the node is no linear layer."""
    args: Any = node.args
    if is_op(node, aten.linear.default):
        return args[0], args[1], args[2] if len(args) > 2 else None, False
    if is_op(node, aten.mm.default):
        return args[0], args[1], None, True
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return "addmm with alpha or beta"
    return args[1], args[2], args[0], True
