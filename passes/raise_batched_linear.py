"""Matrix products whose second factor is computed become `llmopt::batched_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import transposed

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Product(NamedTuple):
    """`alpha * left @ right + beta * addend`."""

    left: Node
    right: Node
    addend: Node | None
    alpha: float
    beta: float


@dataclass(frozen=True)
class RaiseBatchedLinear(Pass):
    """Before: `matmul(a, b)`, `bmm`, `baddbmm`. After: `llmopt.batched_linear(a, b^T)`, scaled and added where it was.

    Runs behind the passes that raise linear layers and attention, for what those leave. A product over one inner
    element is an outer product and stays: a fused loop computes it where it is read.
    """

    name = "raise_batched_linear"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, *_PRODUCTS):
            product = _product(node)
            reason = _refusal(node, product)
            if reason:
                report.skipped[reason] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(node):
                new = _raised(rewriter, product)
            rewriter.replace(node, new)
            report.matched += 1
        return report


def _product(node: Node) -> _Product:
    args: Any = node.args
    if is_op(node, aten.baddbmm.default, aten.addmm.default):
        alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
        return _Product(args[1], args[2], args[0], alpha, beta)
    return _Product(args[0], args[1], None, 1, 1)


def _refusal(node: Node, product: _Product) -> str | None:
    left, right = product.left, product.right
    if not is_tensor(left) or not is_tensor(right):
        return "a factor is no tensor"
    if {tensor(left).dtype, tensor(right).dtype} - set(_DTYPES) or tensor(left).dtype != tensor(right).dtype:
        return f"no product of {tensor(left).dtype} and {tensor(right).dtype}"
    if tensor(left).shape[-1] == 1 and tensor(right).ndim > 1:
        return "an outer product"
    return None


def _raised(rewriter: Rewriter, product: _Product) -> Node:
    left, right = product.left, product.right
    row, column = tensor(left).ndim == 1, tensor(right).ndim == 1
    if row:
        left = rewriter.call(aten.unsqueeze.default, left, 0)
    if column:
        turned = rewriter.call(aten.unsqueeze.default, right, 0)
    else:
        turned = transposed(right, -1, -2) or rewriter.call(aten.transpose.int, right, -1, -2)
    if tensor(turned).ndim == 2:
        dense = turned
        if not tensor(turned).is_contiguous():
            dense = rewriter.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
        result = rewriter.call(llmopt_ops.linear.default, left, [dense], [None])
    else:
        result = rewriter.call(llmopt_ops.batched_linear.default, left, turned)
    if row:
        result = rewriter.call(aten.squeeze.dim, result, -2)
    if column:
        result = rewriter.call(aten.squeeze.dim, result, -1)
    if product.alpha != 1:
        result = rewriter.call(aten.mul.Tensor, result, product.alpha)
    if product.addend is None or product.beta == 0:
        return result
    addend = product.addend
    if product.beta != 1:
        addend = rewriter.call(aten.mul.Tensor, addend, product.beta)
    return rewriter.call(aten.add.Tensor, result, addend)
