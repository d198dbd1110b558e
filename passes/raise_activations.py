"""Activations that a model writes out become the ATen op that they are: `gelu`, `silu`.

Which one is not told by the spelling, of which there are many, but by the values: everything that is computed from one
tensor, point by point and with plain numbers, is a function of one variable, and is compared with the activations at
points that tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node, map_arg

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, nodes_of, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.passes.matching import is_number, same_layout

Tensor = torch.Tensor

# What every written-out activation holds, and the steps around it.
_CURVES = (aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.exp.default)
_STEPS = frozenset(
    {
        *_CURVES,
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, aten.neg.default),
        *(aten.pow.Tensor_Scalar, aten.square.default, aten.reciprocal.default),
    }
)
_MOST_STEPS = 16

# Where the activations differ by far more than models' constants are rounded (0.79788456 for the root of 2 / pi).
_POINTS = torch.cat([torch.linspace(-9, 9, 73, dtype=torch.float64), torch.tensor([-60.0, 60.0], dtype=torch.float64)])
_TOLERANCE = 1e-7

_Activation = tuple[Any, dict[str, Any], Tensor]


def _activations() -> list[_Activation]:
    """(op, its keyword arguments, its values at the points)."""
    gelu, silu = aten.gelu.default, aten.silu.default
    choices: list[tuple[Any, dict[str, Any]]] = [(gelu, {"approximate": "tanh"}), (gelu, {}), (silu, {})]
    return [(op, kwargs, op(_POINTS, **kwargs)) for op, kwargs in choices]


@dataclass(frozen=True)
class RaiseActivations(Pass):
    """Before: `0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))`. After: `gelu(x, approximate="tanh")`;
    gelu by erf and `x * sigmoid(x)` likewise, in any spelling.
    """

    name = "raise_activations"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter, known = Rewriter(graph), _activations()
        for curve in list(nodes_of(graph, *_CURVES)):
            if not curve.users:  # replaced with an earlier one
                continue
            found = next(_matches(curve, known), None)
            if found is None:
                report.skipped["what it is part of is no activation of the vocabulary"] += 1
                continue
            end, x, (op, kwargs, _) = found
            if not context.burn():
                break
            with rewriter.before(end):
                new = rewriter.call(op, x, **kwargs)
            rewriter.replace(end, new)
            report.matched += 1
        return report


def _matches(curve: Node, known: list[_Activation]) -> Iterator[tuple[Node, Node, _Activation]]:
    """(last step, x, activation) for each activation that `curve` is a step of."""
    for x in _variables(curve):
        steps = _steps_from(x, curve)
        for end in steps:
            if end is curve or not same_layout(tensor(end), tensor(x)):
                continue
            values = _values(end, x)
            for activation in known:
                if torch.allclose(values, activation[2], rtol=_TOLERANCE, atol=_TOLERANCE):
                    yield end, x, activation


def _is_step(node: Node) -> bool:
    """Whether a node is computed point by point from tensors of its own shape and dtype, and plain numbers."""
    if not is_op(node, *_STEPS) or node.kwargs or not is_tensor(node):
        return False
    value = tensor(node)
    return value.dtype.is_floating_point and all(
        same_layout(tensor(item), value) if is_tensor(item) else is_number(item) for item in node.args
    )


def _variables(curve: Node) -> Iterator[Node]:
    """The tensors that `curve` may be a function of, nearest first."""
    node, seen = curve, 0
    while _is_step(node) and seen < _MOST_STEPS:
        sources = dict.fromkeys(item for item in node.args if isinstance(item, Node))
        # Of two sources one is computed from the other: x + 0.044715 * x ** 3.
        node = min(sources, key=lambda source: _depth(source, sources))
        seen += 1
        yield node


def _depth(node: Node, among: dict[Node, None]) -> int:
    """How many steps lie between a node and another of `among` that it is computed from; 0 if it is the origin."""
    depth, at = 0, [node]
    while at and depth < _MOST_STEPS:
        at = [source for item in at if _is_step(item) for source in item.all_input_nodes]
        depth += 1
        if any(source in among for source in at):
            return depth
    return 0


def _steps_from(x: Node, curve: Node) -> list[Node]:
    """What is computed from `x` alone, in the order of the graph, from `curve` on in steps that hold it."""
    alone, holding = {x}, [curve]
    pending = list(x.users)
    for _ in range(_MOST_STEPS):
        fresh = [node for node in dict.fromkeys(pending) if node not in alone]
        grown = [node for node in fresh if _is_step(node) and alone.issuperset(node.all_input_nodes)]
        if not grown:
            break
        alone.update(grown)
        pending += [user for node in grown for user in node.users]
    if curve not in alone:
        return []
    for node in holding:
        holding += [user for user in node.users if user in alone and user not in holding]
    return holding


def _values(end: Node, x: Node) -> Tensor:
    """`end`, which is a function of `x` alone, at the points, in float64."""
    known: dict[Node, Tensor] = {x: _POINTS}

    def value(node: Node) -> Tensor:
        if node not in known:
            arguments = map_arg(node.args, value)
            target: Callable[..., Tensor] = node.target
            known[node] = target(*arguments)
        return known[node]

    return value(end)
