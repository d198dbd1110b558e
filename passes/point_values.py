"""Evaluates index computations of a graph at chosen points, without ever building the tensors.

A mask over S x S positions is a formula. To learn what it says for a window of 4096 it is enough to look at a few
hundred of its entries, so a value is asked for at index tuples and the question is passed up through views, gathers and
pointwise ops. What cannot be asked pointwise (a running sum along one dimension) is computed whole, if it is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import Node, map_arg
from torch.utils._pytree import tree_map

from llmopt.compiler.graph import aten, is_op, is_tensor, tensor, to_expr
from llmopt.passes.matching import CONSTANTS, constant_entry

Tensor = torch.Tensor

# Elements of a tensor that may be computed whole.
_LIMIT = 1 << 20

_POINTWISE = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, aten.neg.default),
        *(aten.floor_divide.default, aten.remainder.Scalar, aten.remainder.Tensor, aten.abs.default),
        *(aten.minimum.default, aten.maximum.default, aten.clamp.default, aten.pow.Tensor_Tensor),
        *(getattr(aten, c).Tensor for c in ("eq", "ne", "lt", "le", "gt", "ge")),
        *(getattr(aten, c).Scalar for c in ("eq", "ne", "lt", "le", "gt", "ge")),
        *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default, aten.bitwise_xor.Tensor),
        *(aten.logical_and.default, aten.logical_or.default, aten.logical_not.default),
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten._to_copy.default, aten.clone.default),
    }
)


class NotEvaluable(Exception):
    """A value that depends on data or chance, or that is too large to be computed whole."""


class PointValues:
    """Values of index computations with the graph's symbols bound to numbers."""

    def __init__(self, bindings: Mapping[sympy.Symbol, int]) -> None:
        self._bindings = {symbol: sympy.Integer(number) for symbol, number in bindings.items()}
        self._whole: dict[Node, Tensor] = {}

    def size(self, size: Any) -> int:
        """A symbolic size as a number."""
        number = to_expr(size).xreplace(self._bindings)
        if not number.is_Integer:
            raise NotEvaluable(f"size {number} is not bound")
        return int(number)

    def shape(self, node: Node) -> list[int]:
        """The shape of a node under the bindings."""
        return [self.size(s) for s in tensor(node).shape]

    def at(self, node: Node, index: tuple[Tensor, ...]) -> Tensor:
        """Values of `node` at the points `index`, one int64 tensor `[P]` per dimension; gives `[P]`."""
        if node in self._whole or math.prod(self.shape(node)) <= 4096:
            return self.whole(node)[index] if index else self.whole(node).expand(())
        if is_op(node, *_POINTWISE):
            args = [self._operand(node, a, index) for a in node.args]
            return node.target(*args, **_on_cpu(dict(node.kwargs)))
        if is_op(node, *CONSTANTS) and (number := constant_entry(node)) is not None:
            return torch.full_like(index[0], number, dtype=tensor(node).dtype)
        if is_op(node, aten.tril.default, aten.triu.default):
            x, diagonal = (*node.args, 0)[:2]
            entries, place = self.at(x, index), index[-1] - index[-2]
            kept = place <= diagonal if is_op(node, aten.tril.default) else place >= diagonal
            return torch.where(kept, entries, torch.zeros_like(entries))
        through = self._through(node, index)
        if through is not None:
            return self.at(*through)
        return self.whole(node)[index]

    def _operand(self, node: Node, arg: Any, index: tuple[Tensor, ...]) -> Any:
        if not isinstance(arg, Node):
            return arg
        if not is_tensor(arg):
            return self.size(arg)
        ndim = tensor(arg).ndim
        if ndim == 0:
            return self.whole(arg)
        aligned = index[len(index) - ndim :]
        shape = self.shape(arg)
        return self.at(arg, tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(aligned, shape, strict=True)))

    def _through(self, node: Node, index: tuple[Tensor, ...]) -> tuple[Node, tuple[Tensor, ...]] | None:
        """The input of a view or gather, and where in it the asked entries lie."""
        args: Any = node.args
        x = args[0] if args and isinstance(args[0], Node) else None
        if x is None or not is_tensor(x):
            return None
        if is_op(node, aten.unsqueeze.default):
            dim = args[1] % tensor(node).ndim
            return x, index[:dim] + index[dim + 1 :]
        if is_op(node, aten.expand.default):
            aligned = index[len(index) - tensor(x).ndim :]
            shape = self.shape(x)
            return x, tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(aligned, shape, strict=True))
        if is_op(node, aten.view.default):
            return x, _unravel(_ravel(index, self.shape(node)), self.shape(x))
        if is_op(node, aten.slice.Tensor):
            _, dim, start, _, step = (*args, *(None,) * 5)[:5]
            dim, start = (dim or 0) % len(index), self.size(start or 0)
            start = start + self.shape(x)[dim] if start < 0 else start
            return x, (*index[:dim], index[dim] * (step or 1) + start, *index[dim + 1 :])
        if is_op(node, aten.select.int):
            dim, place = args[1] % tensor(x).ndim, self.size(args[2])
            like = index[0] if index else torch.zeros((), dtype=torch.int64)
            place = place + self.shape(x)[dim] if place < 0 else place
            return x, (*index[:dim], torch.full_like(like, place), *index[dim:])
        if is_op(node, aten.transpose.int):
            a, b = args[1] % len(index), args[2] % len(index)
            swapped = list(index)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return x, tuple(swapped)
        if is_op(node, aten.index.Tensor) and len(args[1]) == tensor(x).ndim and None not in args[1]:
            return x, tuple(self._operand(node, i, index).broadcast_to(index[0].shape) for i in args[1])
        return None

    def whole(self, node: Node) -> Tensor:
        """A whole tensor, computed by PyTorch; raises NotEvaluable for inputs, random and large tensors."""
        if node not in self._whole:
            if node.op != "call_function":
                raise NotEvaluable(f"{node.name} is data")
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotEvaluable(f"{node.name} is random")
            if is_tensor(node) and math.prod(self.shape(node)) > _LIMIT:
                raise NotEvaluable(f"{node.name} is too large to be computed whole")
            bind = lambda n: self.whole(n) if is_tensor(n) else self.size(n)  # noqa: E731
            args, kwargs = map_arg((node.args, dict(node.kwargs)), bind)
            self._whole[node] = node.target(*_on_cpu(args), **_on_cpu(kwargs))
        return self._whole[node]


def _on_cpu(arguments: Any) -> Any:
    """The arguments of an op as they are for a model on the CPU: a few points are evaluated there, wherever it runs."""
    return tree_map(lambda a: torch.device("cpu") if isinstance(a, torch.device) else a, arguments)


def _ravel(index: tuple[Tensor, ...], shape: list[int]) -> Tensor:
    flat = torch.zeros_like(index[0])
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def _unravel(flat: Tensor, shape: list[int]) -> tuple[Tensor, ...]:
    parts = []
    for n in reversed(shape):
        parts.append(flat % n)
        flat = flat // n
    return tuple(reversed(parts))
