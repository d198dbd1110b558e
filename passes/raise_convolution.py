"""Convolutions become linear layers over patches, or sums of shifted products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.decompose import expand_op
from llmopt.compiler.graph import Rewriter, aten, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops

Tensor = torch.Tensor

MAX_TAPS = 16  # of a kernel along the sequence: as many reads an output, or columns of the patches

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class _Convolution:
    """What a convolution does, with one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class RaiseConvolution(Pass):
    """Before: `conv2d(x[B, C, H, W], w[O, C, k, k], b, stride=k)`.
    After: `llmopt.linear(patches[B, H / k, W / k, C * k * k], [w[O, C * k * k]], [b])`, channels moved back in front.

    A depthwise convolution over a sequence becomes a sum of products with its shifted input, which fuses with what
    stands around it; any other over a sequence a linear layer over its windows.
    """

    name = "raise_convolution"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, *_CONVOLUTIONS):
            what = _settings(node)
            form = _form(node, what)
            if isinstance(form, str):
                report.skipped[form] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(node):
                new = expand_op(rewriter, node, _applied(form, what))
            if new is None:
                report.skipped["the parts are no single value"] += 1
                continue
            rewriter.replace(node, new)
            report.matched += 1
        return report


def _settings(node: Node) -> _Convolution:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    rank = tensor(node).ndim - 2

    def each(name: str) -> tuple[int, ...]:
        values = tuple(given[name])
        return values if len(values) == rank else values * rank

    return _Convolution(each("stride"), each("padding"), each("dilation"), given["groups"])


def _form(node: Node, what: _Convolution) -> Callable[..., Tensor] | str:
    """What computes the convolution, or why nothing here does."""
    x, weight = node.args[:2]
    if not is_tensor(x) or not is_tensor(weight) or tensor(x).ndim != tensor(weight).ndim:
        return "the input has no batch"
    _, channels, *kernel = tensor(weight).shape
    if not all(isinstance(size, int) for size in tensor(weight).shape):
        return "the kernel is of symbolic size"
    is_sequence = len(kernel) == 1 and kernel[0] <= MAX_TAPS
    if is_sequence and channels == 1 and what.groups == tensor(weight).shape[0]:
        return _depthwise
    if what.groups != 1:
        return "channels in groups"
    if tuple(kernel) == what.stride and not any(what.padding) and set(what.dilation) == {1}:
        return _patches
    return _windows if is_sequence else "windows that overlap in several dimensions, or long ones"


def _applied(form: Callable[..., Tensor], what: _Convolution) -> Callable[..., Tensor]:
    """A form as a function of the convolution's own arguments."""

    def convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        return form(input, weight, bias, what)

    return convolution


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = llmopt_ops.linear.default(rows, [weight.reshape(weight.shape[0], -1)], [bias])
    return result


def _taps(x: Tensor, size: int, what: _Convolution) -> list[Tensor]:
    """`x[..., L]`, padded, at each place of a kernel of `size` entries: `[..., number of windows]` each."""
    (stride,), (padding,), (dilation,) = what.stride, what.padding, what.dilation
    padded = torch.constant_pad_nd(x, [padding, padding]) if padding else x
    count = (padded.shape[-1] - dilation * (size - 1) - 1) // stride + 1
    return [padded[..., tap * dilation :][..., : stride * (count - 1) + 1 : stride] for tap in range(size)]


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, what: _Convolution) -> Tensor:
    """`x[B, C, L]` with `weight[C, 1, K]`; the sum is kept in float32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = _taps(x.to(wide), weight.shape[2], what)
    products = [tap * weight[:, :, k].to(wide) for k, tap in enumerate(taps)]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return (total if bias is None else total + bias.to(wide)[:, None]).to(x.dtype)


def _windows(x: Tensor, weight: Tensor, bias: Tensor | None, what: _Convolution) -> Tensor:
    """`x[B, C, L]` with `weight[O, C, K]`: each window of C * K entries is a row."""
    windows = torch.stack(_taps(x, weight.shape[2], what), -1)
    return _linear(windows.transpose(1, 2).flatten(2), weight, bias).transpose(1, 2)


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None, what: _Convolution) -> Tensor:
    """`x[B, C, H, W, ...]` in patches that lie side by side."""
    batch, channels = x.shape[:2]
    sizes: Sequence[int] = what.stride
    counts = [length // size for length, size in zip(x.shape[2:], sizes, strict=True)]
    for dim, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        x = x.narrow(2 + dim, 0, count * size)
    rank = len(sizes)
    split = x.reshape(batch, channels, *(n for pair in zip(counts, sizes, strict=True) for n in pair))
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    rows = split.permute(order).reshape(batch, *counts, channels * math.prod(sizes))
    return _linear(rows, weight, bias).movedim(-1, 1)
