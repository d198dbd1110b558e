"""Normalisations become `llmopt::rms_norm` and `llmopt::layer_norm`, in the spellings that models use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, same_size, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import CAST, before_widening, is_number, only_user, other


@dataclass(frozen=True)
class _RmsMatch:
    last: Node  # what the norm replaces
    x: Node
    weight: Node | None
    eps: float
    weight_offset: float
    cast_first: bool
    centred: bool = False  # the mean is taken off first: a layer norm


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Before: `v = mean(pow(float(x), 2), -1); y = w * to(float(x) * rsqrt(v + eps), dtype)`.
    After: `y = llmopt.rms_norm(x, w, eps, 0.0, True)`; `aten.layer_norm` and `aten.rms_norm` likewise.

    The float32 upcast, `1 + weight`, a norm without weight, and the root as a power or a divisor are the same op with
    other arguments. Where `x` is `y - mean(y)`, it is a layer norm of `y`.
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
        for node in nodes_of(graph, aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.sqrt.default):
            match = match_rms_norm(node)
            if match is None:
                continue
            if isinstance(match, str):
                report.skipped[match] += 1
                continue
            if not context.burn():
                return report
            with rewriter.before(match.last):
                arguments: tuple[Any, ...] = (match.x, match.weight, match.eps, match.weight_offset, match.cast_first)
                if match.centred:
                    new = rewriter.call(llmopt_ops.layer_norm.default, match.x, match.weight, None, match.eps)
                else:
                    new = rewriter.call(llmopt_ops.rms_norm.default, *arguments)
            rewriter.replace(match.last, new)
            report.matched += 1
        return report


def match_rms_norm(root: Node) -> _RmsMatch | str | None:
    """The normalisation around one root of a mean, or why it is none; None for a root of something else altogether."""
    shifted: Any = root.args[0]
    mean, eps = (*shifted.args, None)[:2] if _is_plain_sum(shifted) else (None, None)
    if not is_number(eps) or not is_op(mean, aten.mean.dim):
        return "rsqrt of something that is not mean(x^2) + eps" if is_op(root, aten.rsqrt.default) else None
    power, dims, *keep = mean.args
    if [d % tensor(power).ndim for d in dims] != [tensor(power).ndim - 1] or keep[:1] != [True]:
        return "mean over other dimensions than the last"
    if (is_op(power, aten.pow.Tensor_Scalar) and power.args[1] == 2) or (
        is_op(power, aten.mul.Tensor) and power.args[0] is power.args[1]
    ):
        wide = power.args[0]
    else:
        return "mean of something that is not x^2"
    product = only_user(root)
    factor = _factor(product, root) if product is not None else None
    # T5 multiplies x as it came, which is converted within the product.
    if product is None or factor is None or not (factor is wide or (is_op(wide, CAST) and factor is wide.args[0])):
        return "x is not multiplied by the root"
    if any(tensor(n).dtype != torch.float32 for n in (wide, mean, product)):
        return "statistics are not in float32"
    centred = _less_its_mean(wide)
    x = before_widening(centred if centred is not None else wide)
    match = _with_weight(product, x, tensor(x).dtype, float(eps))
    if centred is None or isinstance(match, str):
        return match
    weight = match.weight
    rounds_once = tensor(x).dtype == torch.float32 or not match.cast_first
    if match.weight_offset or not rounds_once or (weight is not None and tensor(weight).dtype != tensor(x).dtype):
        return "a layer norm whose weight is shifted, or whose result is rounded before the weight"
    return replace(match, centred=True)


def _factor(product: Node, root: Node) -> Any:
    """What is divided by the standard deviation, given the root of the variance or of its inverse."""
    if is_op(root, aten.sqrt.default):
        return product.args[0] if is_op(product, aten.div.Tensor) and product.args[1] is root else None
    if is_op(root, aten.pow.Tensor_Scalar) and root.args[1] != -0.5:
        return None
    return other(product, root) if is_op(product, aten.mul.Tensor) else None


def _less_its_mean(node: Node) -> Node | None:
    """y of `y - mean(y, -1, keepdim=True)`."""
    if not is_op(node, aten.sub.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return None
    y, mean = node.args[:2]
    if not is_op(mean, aten.mean.dim) or mean.args[0] is not y or mean.args[2:3] != (True,):
        return None
    if tensor(mean).dtype != tensor(y).dtype:
        return None
    return y if [d % tensor(y).ndim for d in mean.args[1]] == [tensor(y).ndim - 1] else None


def _with_weight(product: Node, x: Node, dtype: torch.dtype, eps: float) -> _RmsMatch | str:
    """Extends `x * rsqrt(...)` by the conversion and the weight that follow it."""
    last, cast_first = product, False
    user = only_user(last)
    if user is not None and is_op(user, CAST) and tensor(user).dtype == dtype:
        last, cast_first = user, True
        user = only_user(last)
    weight = other(user, last) if user is not None and is_op(user, aten.mul.Tensor) else None
    if user is not None and _is_weight(weight, x):
        offset, weight = _offset(weight)
        weight = before_widening(weight)
        if tensor(user).dtype == dtype:
            return _RmsMatch(user, x, weight, eps, offset, cast_first or dtype == torch.float32)
        back = only_user(user)
        if not cast_first and back is not None and is_op(back, CAST) and tensor(back).dtype == dtype:
            return _RmsMatch(back, x, weight, eps, offset, False)
        return "the result is not converted back to the input's type"
    if tensor(last).dtype != dtype:
        return "the result is not converted back to the input's type"
    return _RmsMatch(last, x, None, eps, 0.0, False)


def _is_weight(factor: Any, x: Node) -> bool:
    """Whether a factor has one number for each entry of x's last dimension; what else broadcasts is no weight."""
    if not is_tensor(factor) or tensor(factor).ndim != 1:
        return False
    return same_size(tensor(factor).shape[0], tensor(x).shape[-1])


def _is_plain_sum(node: Any) -> bool:
    return is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1


def _offset(weight: Node) -> tuple[float, Node]:
    """(c, w) of `w + c` with a vector w of numbers, else (0, weight)."""
    if _is_plain_sum(weight):
        a, b = weight.args[:2]
        if any(is_tensor(t) and tensor(t).dtype != tensor(weight).dtype for t in (a, b)):
            return 0.0, weight
        if is_number(b) and isinstance(a, Node):
            return float(b), a
        if is_number(a) and isinstance(b, Node):
            return float(a), b
    return 0.0, weight
