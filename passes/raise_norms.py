"""Normalisations become `llmopt::rms_norm` and `llmopt::layer_norm`, in the spellings that models use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import CAST, is_number, only_user, other, strip_casts


@dataclass(frozen=True)
class _RmsMatch:
    last: Node  # what the norm replaces
    x: Node
    weight: Node | None
    eps: float
    weight_offset: float
    cast_first: bool


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Before: `v = mean(pow(float(x), 2), -1); y = w * to(float(x) * rsqrt(v + eps), dtype)`.
    After: `y = llmopt.rms_norm(x, w, eps, 0.0, True)`; `aten.layer_norm` and `aten.rms_norm` likewise.

    The float32 upcast, `1 + weight`, and a norm without weight are the same op with other arguments.
    """

    name = "raise_norms"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.layer_norm.default, aten.rms_norm.default):
            args: Any = (*node.args, *(None,) * 5)[:5]
            if len(args[1]) != 1:
                report.skipped["normalises more than one dimension"] += 1
                continue
            if any(is_tensor(p) and tensor(p).dtype != tensor(args[0]).dtype for p in args[2:4]):
                report.skipped["weight of another dtype"] += 1
                continue
            if tensor(args[0]).dtype not in (torch.float32, torch.bfloat16, torch.float16):
                report.skipped["the op computes in float32"] += 1
                continue
            if not context.burn():
                return report
            with rewriter.before(node):
                if is_op(node, aten.layer_norm.default):
                    eps = args[4] if args[4] is not None else 1e-5
                    new = rewriter.call(llmopt_ops.layer_norm.default, args[0], args[2], args[3], eps)
                else:
                    # PyTorch documents the input type's epsilon, but takes that of the type it computes in.
                    eps = args[3] if args[3] is not None else torch.finfo(torch.float32).eps
                    new = rewriter.call(llmopt_ops.rms_norm.default, args[0], args[2], eps, 0.0, False)
            rewriter.replace(node, new)
            report.matched += 1
        for node in nodes_of(graph, aten.rsqrt.default):
            match = match_rms_norm(node)
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            if not context.burn():
                return report
            with rewriter.before(match.last):
                arguments = (match.x, match.weight, match.eps, match.weight_offset, match.cast_first)
                new = rewriter.call(llmopt_ops.rms_norm.default, *arguments)
            rewriter.replace(match.last, new)
            report.matched += 1
        return report


def match_rms_norm(rsqrt: Node) -> _RmsMatch | str:
    """The normalisation around one `rsqrt`, or why it is none."""
    shifted: Any = rsqrt.args[0]
    if not is_op(shifted, aten.add.Tensor):
        return "rsqrt of something that is not mean(x^2) + eps"
    mean, eps = shifted.args
    if not is_number(eps) or not is_op(mean, aten.mean.dim):
        return "rsqrt of something that is not mean(x^2) + eps"
    power, dims, *keep = mean.args
    if [d % tensor(power).ndim for d in dims] != [tensor(power).ndim - 1] or keep[:1] != [True]:
        return "mean over other dimensions than the last"
    if (is_op(power, aten.pow.Tensor_Scalar) and power.args[1] == 2) or (
        is_op(power, aten.mul.Tensor) and power.args[0] is power.args[1]
    ):
        wide = power.args[0]
    else:
        return "mean of something that is not x^2"
    product = only_user(rsqrt)
    if product is None or not is_op(product, aten.mul.Tensor) or other(product, rsqrt) is not wide:
        return "x is not multiplied by the root"
    x = strip_casts(wide)
    dtype = tensor(x).dtype
    if tensor(wide).dtype != torch.float32:
        return "statistics are not in float32"
    return _with_weight(product, x, dtype, float(eps))


def _with_weight(product: Node, x: Node, dtype: torch.dtype, eps: float) -> _RmsMatch | str:
    """Extends `x * rsqrt(...)` by the conversion and the weight that follow it."""
    last, cast_first = product, False
    user = only_user(last)
    if user is not None and is_op(user, CAST) and tensor(user).dtype == dtype:
        last, cast_first = user, True
        user = only_user(last)
    weight = other(user, last) if user is not None and is_op(user, aten.mul.Tensor) else None
    if user is not None and is_tensor(weight) and tensor(weight).ndim == 1:
        offset, weight = _offset(weight)
        weight = strip_casts(weight)
        if tensor(user).dtype == dtype:
            return _RmsMatch(user, x, weight, eps, offset, cast_first or dtype == torch.float32)
        back = only_user(user)
        if not cast_first and back is not None and is_op(back, CAST) and tensor(back).dtype == dtype:
            return _RmsMatch(back, x, weight, eps, offset, False)
        return "the result is not converted back to the input's type"
    if tensor(last).dtype != dtype:
        return "the result is not converted back to the input's type"
    return _RmsMatch(last, x, None, eps, 0.0, False)


def _offset(weight: Node) -> tuple[float, Node]:
    """(c, w) of `w + c`, else (0, weight)."""
    if is_op(weight, aten.add.Tensor):
        a, b = weight.args[:2]
        if is_number(b) and isinstance(a, Node):
            return float(b), a
        if is_number(a) and isinstance(b, Node):
            return float(a), b
    return 0.0, weight
