"""Where a value lies in memory: its base buffer, and strides as symbolic expressions.

A view is no computation. It is the same buffer with another offset and other strides, and those are in its fake value,
because every fake is made by running the real view op. Kernels take strided operands, so a layout is all they need.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.fx.node import Node

from llmopt.compiler.graph import tensor, to_expr, view_base

Expr: TypeAlias = sympy.Expr


@dataclass(frozen=True)
class Layout:
    """Elements of `base`'s buffer: entry (i, j, ...) lies at offset + i * strides[0] + j * strides[1] + ..."""

    base: Node
    offset: Expr
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    itemsize: int

    @property
    def offset_bytes(self) -> Expr:
        """Byte offset of the first entry."""
        return self.offset * self.itemsize

    @property
    def numel(self) -> Expr:
        """Number of entries."""
        return sympy.prod(self.sizes)

    @property
    def is_contiguous(self) -> bool:
        """Whether the entries lie densely in row-major order."""
        expected: Expr = sympy.Integer(1)
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and sympy.expand(stride - expected) != 0:
                return False
            expected = expected * size
        return True

    def levels(self, keep: int) -> list[tuple[Expr, Expr]] | None:
        """(size, stride) of the leading dimensions, all but the last `keep`, merged as far as memory allows.

        Outermost first; dimensions of size 1 vanish. None when the last kept dimension is missing or not dense.
        """
        if len(self.sizes) < keep or (keep and self.sizes[-1] != 1 and self.strides[-1] != 1):
            return None
        merged: list[tuple[Expr, Expr]] = []
        lead = len(self.sizes) - keep
        for size, stride in zip(self.sizes[:lead], self.strides[:lead], strict=True):
            if size == 1:
                continue
            if merged and sympy.expand(merged[-1][1] - stride * size) == 0:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        return merged

    def rows(self) -> tuple[Expr, Expr] | None:
        """(number of rows, stride between rows) over the last dimension; None if rows are not evenly spaced."""
        merged = self.levels(1)
        if merged is None or len(merged) > 1:
            return None
        return merged[0] if merged else (sympy.Integer(1), self.sizes[-1])

    def two_levels(self) -> tuple[Expr, Expr, Expr, Expr] | None:
        """(outer, inner, outer stride, inner stride) of the rows over the last dimension; None for more levels."""
        merged = self.levels(1)
        if merged is None or len(merged) > 2:
            return None
        while len(merged) < 2:
            merged.insert(0, (sympy.Integer(1), sympy.Integer(0)))
        return merged[0][0], merged[1][0], merged[0][1], merged[1][1]


def to_stride(stride: int | torch.SymInt) -> Expr:
    """A stride as an expression; PyTorch writes `Max(1, size)` into it, which differs only where there is no entry."""
    return _without_max(to_expr(stride))


@functools.lru_cache(4096)
def _without_max(stride: Expr) -> Expr:
    return stride.replace(
        lambda e: type(e).__name__ == "Max" and len(e.args) == 2 and 1 in e.args,
        lambda e: next(a for a in e.args if a != 1),
    )


def layout(node: Node) -> Layout:
    """The layout of a tensor node; its base is a placeholder or a node that computes."""
    val, base = tensor(node), view_base(node)
    # An argument may itself begin somewhere in its memory: entries are counted from there.
    begin = (
        to_expr(val.storage_offset()) - to_expr(tensor(base).storage_offset()) if base is not node else sympy.Integer(0)
    )
    return Layout(
        base,
        begin,
        tuple(map(to_expr, val.shape)),
        tuple(map(to_stride, val.stride())),
        val.element_size(),
    )
