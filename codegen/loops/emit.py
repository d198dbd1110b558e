"""What an op's handler works with: the emitter of the loop body, and the operands' conversions.

A handler gets the emitter of the sweep, the node, its bound arguments and the index of the wanted element, and returns
the number of the value that it emitted. Half-precision ops compute in float32, as eager does; the rounding of a value
that stays inside a kernel is left out except where the result is discontinuous (comparisons, roundings, conversion to
integers, tests for infinity) and where float16 is left, whose range is small, so that a fused kernel and eager take the
same branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import sympy
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.fx import Node

from llmopt.codegen.loops.ir import DType, ReductionKind, register
from llmopt.codegen.loops.symbolic import Expr, Indices, Unlowerable, size_expression
from llmopt.codegen.loops.views import broadcast, integer, shape, tensor_of

aten = torch.ops.aten

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


class Emit(Protocol):
    """What a handler may ask of the lowering."""

    def value(self, node: Node, index: Indices) -> int:
        """The element of a tensor node at `index`, in its register type."""

    def call(self, function: str, *args: int) -> int:
        """Applies a function of `ir.FUNCTIONS`."""

    def constant(self, value: float | int | bool, dtype: DType) -> int:
        """A literal, converted to `dtype`."""

    def cast(self, ref: int, dtype: DType) -> int:
        """Converts a value; nothing is emitted where it has that type already."""

    def index_value(self, index: Expr) -> int:
        """An index expression as an int64 value."""

    def position(self, ref: int, size: Expr, wraps: bool) -> Expr:
        """An int64 value as an index into `size` places, checked when it runs; `wraps`: negative from the end."""

    def load(self, node: Node, index: Indices) -> int:
        """The element at `index` of the memory of `node`, which the kernel must not compute (`group.Planner`)."""

    def reduce(
        self,
        key: object,
        kind: ReductionKind,
        dtype: DType,
        rows: Expr,
        sizes: Sequence[Expr],
        body: Callable[[Indices], int],
    ) -> int:
        """Combines `body(inner index)` over all inner indices, once for equal keys; `rows` keys exist in all."""

    def piecewise(self, index: Expr, pieces: Sequence[tuple[Expr, Callable[[Expr], int]]]) -> int:
        """Chooses by `index` among consecutive pieces (length, value at the index within the piece)."""


Args: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Emit, Node, Args, Indices], int]


def dtype_name(dtype: torch.dtype) -> DType:
    """The IR's name of a torch dtype.

    Raises:
        Unlowerable: loops do not compute in it (complex, fp8, quantized).
    """
    if dtype not in DTYPE_NAMES:
        raise Unlowerable(f"{dtype} has no loop form")
    return DTYPE_NAMES[dtype]


def result_register(node: Node) -> DType:
    """The register type in which `node`'s result is computed."""
    return register(dtype_name(tensor_of(node).dtype))


def operand(emit: Emit, argument: Any, index: Indices, dtype: DType) -> int:
    """A tensor, number or symbolic scalar argument, broadcast to the result's `index`, as `dtype`."""
    if isinstance(argument, Node):
        if isinstance(argument.meta.get("val"), torch.Tensor):
            source = shape(argument)
            return emit.cast(emit.value(argument, broadcast(index, source)), dtype)
        if argument.target is aten.item.default:
            tensor = argument.args[0]
            if isinstance(tensor, Node):
                return emit.cast(emit.value(tensor, (sympy.Integer(0),) * len(shape(tensor))), dtype)
        return emit.cast(emit.index_value(integer(argument)), dtype)
    if isinstance(argument, torch.SymInt):
        return emit.cast(emit.index_value(size_expression(argument)), dtype)
    if isinstance(argument, bool | int | float):
        return emit.constant(argument, dtype)
    raise Unlowerable(f"argument {argument!r} has no loop form")


def rounded(emit: Emit, argument: Any, index: Indices, dtype: DType) -> int:
    """Like `operand`, with the rounding that eager's half-precision tensor had in memory."""
    ref = operand(emit, argument, index, register(dtype))
    return emit.cast(ref, dtype)


def _meta_value(argument: Any) -> Any:
    """What type promotion sees of an argument."""
    if not isinstance(argument, Node):
        return argument
    value = argument.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value
    return 1.0 if isinstance(value, torch.SymFloat | float) else 1


def common_dtype(arguments: Sequence[Any]) -> DType:
    """The dtype to which eager promotes these operands."""
    _, result = elementwise_dtypes(
        *map(_meta_value, arguments), type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
    )
    return dtype_name(result)
