"""A residual addition and the norm that follows it become one op, which reads each operand once."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import same_layout


@dataclass(frozen=True)
class FuseResidualNorm(Pass):
    """Before: `h = x + residual; y = rms_norm(h, w, ...)`.
    After: `y, h = add_rms_norm(x, residual, w, ...)`; layer_norm likewise.
    """

    name = "fuse_residual_norm"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        fused = {
            llmopt_ops.rms_norm.default: llmopt_ops.add_rms_norm.default,
            llmopt_ops.layer_norm.default: llmopt_ops.add_layer_norm.default,
        }
        for norm in nodes_of(graph, *fused):
            total = norm.args[0]
            if not is_op(total, aten.add.Tensor) or total.kwargs.get("alpha", 1) != 1:
                report.skipped["the input is no sum"] += 1
                continue
            x, residual = total.args[:2]
            if not is_tensor(x) or not is_tensor(residual) or not same_layout(tensor(x), tensor(residual)):
                report.skipped["the addends differ in shape or dtype"] += 1
                continue
            if tensor(x).dtype != tensor(norm).dtype:
                report.skipped["the sum has another dtype than its addends"] += 1
                continue
            earlier = [u for u in total.users if u is not norm and is_op(u, *fused)]
            if earlier:
                # Two norms of one sum (a parallel block): a fused op each would add twice.
                report.skipped["the sum has another norm"] += 1
                continue
            if any(n is not total and total < n for n in norm.all_input_nodes):
                report.skipped["the weight is computed after the sum"] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(total):
                both = rewriter.call(fused[norm.target], x, residual, *norm.args[1:])
                new_norm = rewriter.call(operator.getitem, both, 0)
                new_total = rewriter.call(operator.getitem, both, 1)
            rewriter.replace(norm, new_norm)
            rewriter.replace(total, new_total)
            report.matched += 1
        return report
