"""`act(gate) * up` becomes `llmopt::gated_act`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import only_user, other, same_layout


def activation_name(node: Any) -> str | None:
    """The vocabulary's name of an activation node, or None."""
    if is_op(node, aten.silu.default):
        return "silu"
    if is_op(node, aten.relu.default):
        return "relu"
    if is_op(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu_erf"
    return None


@dataclass(frozen=True)
class RaiseGatedAct(Pass):
    """Before: `silu(gate) * up`. After: `llmopt.gated_act(gate, up, "silu")`; gelu and relu likewise."""

    name = "raise_gated_act"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for act in nodes_of(graph, aten.silu.default, aten.relu.default, aten.gelu.default):
            product = only_user(act)
            if product is None:
                report.skipped["the activation has several users"] += 1
                continue
            if not is_op(product, aten.mul.Tensor):
                report.skipped["the activation is not a factor"] += 1
                continue
            gate, up = act.args[0], other(product, act)
            if not is_tensor(up) or not same_layout(tensor(gate), tensor(up)):
                report.skipped["the other factor has another shape or dtype"] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(product):
                new = rewriter.call(llmopt_ops.gated_act.default, gate, up, activation_name(act))
            rewriter.replace(product, new)
            report.matched += 1
        return report
