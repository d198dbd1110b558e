"""The ATen reductions that have a loop form, and the norms and softmaxes that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from llmopt.codegen.loops.emit import (
    Args,
    Emit,
    Handler,
    common_dtype,
    operand,
    result_register,
    rounded,
)
from llmopt.codegen.loops.ir import DType, ReductionKind
from llmopt.codegen.loops.operations import OPERATIONS
from llmopt.codegen.loops.symbolic import Expr, Indices, Unlowerable, product
from llmopt.codegen.loops.views import shape, tensor_of

aten = torch.ops.aten


def reduced_dims(node: Node, argument: Any) -> tuple[int, ...]:
    """The dimensions that a reduction runs over, ascending; none given means all."""
    rank = len(shape(node.args[0]))
    if rank == 0:
        return ()
    dims = argument if isinstance(argument, Sequence) else () if argument is None else (argument,)
    return tuple(sorted({d % rank for d in dims})) or tuple(range(rank))


def over(
    emit: Emit,
    node: Node,
    tag: str,
    kind: ReductionKind,
    dtype: DType,
    dims: Sequence[int],
    rows: Indices,
    body: Callable[[Indices], int],
) -> int:
    """Reduces `body(index into the source)` over `dims`; `rows` is the index in the dimensions that are kept."""
    sizes = shape(node.args[0])

    def element(inner: Indices) -> int:
        kept, reduced = iter(rows), iter(inner)
        return body(tuple(next(reduced) if d in dims else next(kept) for d in range(len(sizes))))

    count = product([size for d, size in enumerate(sizes) if d not in dims])
    return emit.reduce((node, tag, rows), kind, dtype, count, [sizes[d] for d in dims], element)


def _kept(node: Node, dims: Sequence[int], index: Indices) -> Indices:
    """The kept part of the result's index, whether or not the result keeps the reduced dimensions as size 1."""
    rank = len(shape(node.args[0]))
    if len(index) == rank:
        return tuple(i for d, i in enumerate(index) if d not in dims)
    return index


def _count(node: Node, dims: Sequence[int]) -> Expr:
    sizes = shape(node.args[0])
    return product([sizes[d] for d in dims])


def _reduction(kind: ReductionKind, mean: bool = False) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dims = reduced_dims(node, a.get("dim"))
        dtype = result_register(node)
        x = node.args[0]
        logical: ReductionKind | None = kind if kind in ("any", "all") else None
        if dtype == "bool" and kind in ("max", "min"):
            logical = "any" if kind == "max" else "all"

        def element(i: Indices) -> int:
            if logical:
                return emit.cast(rounded(emit, x, i, common_dtype([x])), "bool")
            return operand(emit, x, i, dtype)

        rows = _kept(node, dims, index)
        total = over(emit, node, kind, logical or kind, "bool" if logical else dtype, dims, rows, element)
        if mean:
            return emit.call("div", total, emit.cast(emit.index_value(_count(node, dims)), dtype))
        return emit.cast(total, dtype)

    return lower


def _softmax(log: bool) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dims = reduced_dims(node, a["dim"])
        dtype = result_register(node)
        x = node.args[0]
        rows = tuple(i for d, i in enumerate(index) if d not in dims)
        element: Callable[[Indices], int] = lambda i: operand(emit, x, i, dtype)  # noqa: E731
        # The accumulators are fetched inside each sweep that uses them.
        largest = lambda: over(emit, node, "max", "max", dtype, dims, rows, element)  # noqa: E731
        power: Callable[[Indices], int] = lambda i: emit.call("exp", emit.call("sub", element(i), largest()))  # noqa: E731
        total = over(emit, node, "sum", "sum", dtype, dims, rows, power)
        if log:
            return emit.call("sub", emit.call("sub", element(index), largest()), emit.call("log", total))
        return emit.call("div", power(index), total)

    return lower


def _logsumexp(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dims = reduced_dims(node, a["dim"])
    dtype = result_register(node)
    x, rows = node.args[0], _kept(node, dims, index)
    element: Callable[[Indices], int] = lambda i: operand(emit, x, i, dtype)  # noqa: E731

    def shift() -> int:
        # An infinite maximum would make inf - inf; without a shift the sum is right (0 or infinity) there.
        largest = over(emit, node, "max", "max", dtype, dims, rows, element)
        return emit.call("where", emit.call("isinf", largest), emit.constant(0, dtype), largest)

    def power(i: Indices) -> int:
        return emit.call("exp", emit.call("sub", element(i), shift()))

    total = over(emit, node, "sum", "sum", dtype, dims, rows, power)
    return emit.call("add", emit.call("log", total), shift())


def _centred(
    emit: Emit, node: Node, dtype: DType, dims: Sequence[int], rows: Indices
) -> tuple[Callable[[Indices], int], Callable[[], int]]:
    """Element minus its mean, and the sum of squares of that: two sweeps, which loses no digits."""
    x = node.args[0]

    def deviation(i: Indices) -> int:
        total = over(emit, node, "sum", "sum", dtype, dims, rows, lambda k: operand(emit, x, k, dtype))
        mean = emit.call("div", total, emit.cast(emit.index_value(_count(node, dims)), dtype))
        return emit.call("sub", operand(emit, x, i, dtype), mean)

    def squares() -> int:
        def square(i: Indices) -> int:
            ref = deviation(i)
            return emit.call("mul", ref, ref)

        return over(emit, node, "squares", "sum", dtype, dims, rows, square)

    return deviation, squares


def _var(root: bool) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dims = reduced_dims(node, a["dim"])
        dtype = result_register(node)
        _, squares = _centred(emit, node, dtype, dims, _kept(node, dims, index))
        correction = int(a["unbiased"]) if "unbiased" in a else 1 if a["correction"] is None else a["correction"]
        count = emit.cast(emit.index_value(_count(node, dims)), dtype)
        freedom = emit.call("sub", count, operand(emit, correction, (), dtype))
        freedom = emit.call("maximum", freedom, emit.constant(0, dtype))
        variance = emit.call("div", squares(), freedom)
        return emit.call("sqrt", variance) if root else variance

    return lower


def _vector_norm(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dims = reduced_dims(node, a["dim"])
    dtype = result_register(node)
    x, order = node.args[0], a["ord"]
    rows = _kept(node, dims, index)
    if order not in (1, 2, float("inf")):
        raise Unlowerable(f"a vector norm of order {order} has no loop form")

    def element(i: Indices) -> int:
        ref = operand(emit, x, i, dtype)
        return emit.call("mul", ref, ref) if order == 2 else emit.call("abs", ref)

    total = over(emit, node, "norm", "max" if order == float("inf") else "sum", dtype, dims, rows, element)
    return emit.call("sqrt", total) if order == 2 else total


def _norm(centre: bool) -> Handler:
    """layer_norm (Ba et al., arXiv:1607.06450) and rms_norm (Zhang and Sennrich, arXiv:1910.07467)."""

    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        x = node.args[0]
        rank, width = len(index), len(a["normalized_shape"])
        dims = tuple(range(rank - width, rank))
        rows = index[: rank - width]
        dtype = result_register(node)
        epsilon = torch.finfo(tensor_of(node).dtype).eps if a["eps"] is None else a["eps"]
        if centre:
            deviation, squares = _centred(emit, node, dtype, dims, rows)
            value, total = deviation(index), squares()
        else:

            def square(i: Indices) -> int:
                ref = operand(emit, x, i, dtype)
                return emit.call("mul", ref, ref)

            value = operand(emit, x, index, dtype)
            total = over(emit, node, "squares", "sum", dtype, dims, rows, square)
        mean = emit.call("div", total, emit.cast(emit.index_value(_count(node, dims)), dtype))
        scale = emit.call("rsqrt", emit.call("add", mean, emit.constant(epsilon, dtype)))
        value = emit.call("mul", value, scale)
        if a["weight"] is not None:
            value = emit.call("mul", value, operand(emit, a["weight"], index, dtype))
        if a.get("bias") is not None:
            value = emit.call("add", value, operand(emit, a["bias"], index, dtype))
        return value

    return lower


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


REDUCTIONS: dict[Any, Handler] = {
    **dict.fromkeys(map(_overload, ("sum", "sum.dim_IntList")), _reduction("sum")),
    **dict.fromkeys(map(_overload, ("mean", "mean.dim")), _reduction("sum", mean=True)),
    **dict.fromkeys(map(_overload, ("prod", "prod.dim_int")), _reduction("prod")),
    **dict.fromkeys(map(_overload, ("amax", "max")), _reduction("max")),
    **dict.fromkeys(map(_overload, ("amin", "min")), _reduction("min")),
    **dict.fromkeys(map(_overload, ("any", "any.dim", "any.dims")), _reduction("any")),
    **dict.fromkeys(map(_overload, ("all", "all.dim", "all.dims")), _reduction("all")),
    **dict.fromkeys(map(_overload, ("softmax.int", "_softmax")), _softmax(log=False)),
    **dict.fromkeys(map(_overload, ("log_softmax.int", "_log_softmax")), _softmax(log=True)),
    _overload("logsumexp"): _logsumexp,
    **dict.fromkeys(map(_overload, ("var.correction", "var.dim")), _var(root=False)),
    **dict.fromkeys(map(_overload, ("std.correction", "std.dim")), _var(root=True)),
    _overload("linalg_vector_norm"): _vector_norm,
    _overload("layer_norm"): _norm(centre=True),
    _overload("rms_norm"): _norm(centre=False),
}
OPERATIONS.update(REDUCTIONS)


def reduction_dims(node: Node, arguments: Args) -> tuple[int, ...]:
    """The dimensions of the first operand that a node of `REDUCTIONS` runs over."""
    if "normalized_shape" in arguments:
        rank = len(shape(node))
        return tuple(range(rank - len(arguments["normalized_shape"]), rank))
    return reduced_dims(node, arguments.get("dim"))
