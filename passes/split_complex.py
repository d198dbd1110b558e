"""Complex numbers become pairs of real ones, for which there are kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node, map_arg

from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, outputs, placeholders, same_shape, tensor
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport

Parts = tuple[Node, Node]

# What only moves entries does the same to both parts.
_MOVES = frozenset(
    {
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten.transpose.int),
        *(aten.permute.default, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.index.Tensor),
        *(aten.index_select.default, aten.cat.default, aten.stack.default, aten.alias.default, aten.detach.default),
    }
)


@dataclass(frozen=True)
class SplitComplex(Pass):
    """Before: `view_as_real(view_as_complex(x) * polar(r, a))`.
    After: `stack([x0 * c - x1 * s, x0 * s + x1 * c], -1)` with `c = r * cos(a)`, `s = r * sin(a)` and `x0, x1` of x's
    last dimension.

    All complex values of a graph are split, or none.
    """

    name = "split_complex"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        nodes = [n for n in graph.nodes if n.op == "call_function" and (_is_complex(n) or _reads_complex(n))]
        unknown = {str(n.target) for n in nodes if n.target not in _SPLIT and n.target not in _MOVES}
        if any(_is_complex(n) for n in outputs(graph)):
            unknown.add("a result of the graph")
        if any(_is_complex(n) for n in placeholders(graph)):
            unknown.add("an argument of the graph")
        if any(isinstance(a, complex) for n in nodes for a in n.args):
            unknown.add("a Python number")
        if any(_spreads(n) and not all(isinstance(size, int) for size in tensor(n).shape) for n in nodes):
            unknown.add("a number whose parts spread over a symbolic size")
        for name in sorted(unknown):
            report.skipped[f"{name} is complex"] += 1
        if unknown or not nodes or not context.burn():
            return report
        rewriter = Rewriter(graph)
        parts: dict[Node, Parts] = {}
        for node in nodes:
            with rewriter.before(node):
                if node.target in _MOVES:
                    parts[node] = _moved(rewriter, node, parts)
                elif _is_complex(node):
                    parts[node] = _SPLIT[node.target](rewriter, node, parts)
                else:
                    real, _ = _SPLIT[node.target](rewriter, node, parts)
                    rewriter.replace(node, real)
                    report.matched += 1
        graph.eliminate_dead_code()
        return report


def _is_complex(node: Any) -> bool:
    return is_tensor(node) and tensor(node).dtype.is_complex


def _reads_complex(node: Node) -> bool:
    return any(map(_is_complex, node.all_input_nodes))


def _moved(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    def one(which: int) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: parts[n][which] if n in parts else n)
        if which == 1 and is_op(node, aten.cat.default, aten.stack.default):  # real pieces have no imaginary part
            pieces = node.args[0]
            args = (
                [parts[n][1] if n in parts else rewriter.call(aten.zeros_like.default, n) for n in pieces],
                *args[1:],
            )
        return rewriter.call(node.target, *args, **kwargs)

    return one(0), one(1)


def _spreads(node: Node) -> bool:
    """Whether a number is made of parts that broadcast."""
    if not is_op(node, aten.polar.default, aten.complex.default):
        return False
    return any(not same_shape(tensor(part).shape, tensor(node).shape) for part in node.all_input_nodes)


def _complex(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    real, imaginary = (_spread(rewriter, part, node) for part in node.args)
    return real, imaginary


def _spread(rewriter: Rewriter, part: Node, node: Node) -> Node:
    """`part` in the shape of `node`."""
    same = same_shape(tensor(part).shape, tensor(node).shape)
    return part if same else rewriter.call(aten.expand.default, part, list(tensor(node).shape))


def _viewed(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    real, imaginary = (rewriter.reshape(part, node.args[1]) for part in parts[node.args[0]])
    return real, imaginary


def _polar(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    radius, angle = node.args
    unit = is_op(radius, aten.ones_like.default, aten.ones.default)
    angle = _spread(rewriter, angle, node)
    turned = [rewriter.call(op, angle) for op in (aten.cos.default, aten.sin.default)]
    real, imaginary = (t if unit else rewriter.call(aten.mul.Tensor, radius, t) for t in turned)
    return real, imaginary


def _pairs(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    real, imaginary = (rewriter.call(aten.select.int, node.args[0], -1, which) for which in (0, 1))
    return real, imaginary


def _product(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    times = lambda a, b: rewriter.call(aten.mul.Tensor, a, b)  # noqa: E731
    left, right = node.args
    if left in parts and right in parts:
        (a, b), (c, d) = parts[left], parts[right]
        real = rewriter.call(aten.sub.Tensor, times(a, c), times(b, d))
        return real, rewriter.call(aten.add.Tensor, times(a, d), times(b, c))
    (a, b), factor = (parts[left], right) if left in parts else (parts[right], left)
    return times(a, factor), times(b, factor)


def _conjugate(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    real, imaginary = parts[node.args[0]]
    return real, rewriter.call(aten.neg.default, imaginary)


def _joined(rewriter: Rewriter, node: Node, parts: dict[Node, Parts]) -> Parts:
    real = rewriter.call(aten.stack.default, list(parts[node.args[0]]), -1)
    return real, real


_SPLIT: dict[Any, Callable[[Rewriter, Node, dict[Node, Parts]], Parts]] = {
    aten.polar.default: _polar,
    aten.view_as_complex.default: _pairs,
    aten.complex.default: _complex,
    aten.mul.Tensor: _product,
    aten._conj.default: _conjugate,
    aten.view.default: _viewed,
    aten.view_as_real.default: _joined,
}
