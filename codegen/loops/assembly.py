"""Creation ops, and ops that put tensors together: each element comes from one of several places."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch.fx import Node

from llmopt.codegen.loops.emit import Args, Emit, Handler, dtype_name, operand, result_register
from llmopt.codegen.loops.symbolic import Expr, Indices, Unlowerable, is_nonnegative
from llmopt.codegen.loops.views import integer, shape, tensor_of


def fill(name: str | float) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        return operand(emit, a[name] if isinstance(name, str) else name, index, result_register(node))

    return lower


def arange(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    start, step = a.get("start", 0), a.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        # Eager's accumulation type for a float range is double.
        position = emit.cast(emit.index_value(index[0]), "float64")
        scaled = emit.call("mul", position, operand(emit, step, index, "float64"))
        return emit.cast(emit.call("add", scaled, operand(emit, start, index, "float64")), dtype)
    return emit.cast(emit.index_value(integer(start) + index[0] * integer(step)), dtype)


def copy(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    return emit.cast(operand(emit, node.args[1], index, result_register(node)), dtype_name(tensor_of(node).dtype))


def cat(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    tensors = node.args[0]
    dtype = result_register(node)
    d = a["dim"] % len(index)
    pieces: list[tuple[Expr, Callable[[Expr], int]]] = []
    for tensor in tensors:
        if len(shape(tensor)) != len(index):
            continue  # the historical empty tensor of shape (0,)
        value = lambda i, t=tensor: operand(emit, t, (*index[:d], i, *index[d + 1 :]), dtype)  # noqa: E731
        pieces.append((shape(tensor)[d], value))
    return emit.piecewise(index[d], pieces)


def stack(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    d = a["dim"] % len(index)
    rest = (*index[:d], *index[d + 1 :])
    values = [lambda i, t=tensor: operand(emit, t, rest, dtype) for tensor in node.args[0]]
    return emit.piecewise(index[d], [(sympy.Integer(1), value) for value in values])


def pad(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    source = node.args[0]
    pads = [integer(p) for p in a["pad"]]

    def along(d: int, inside: Indices) -> int:
        """Chooses between padding and tensor along dimension d, the outer ones being decided."""
        if d == len(index):
            return operand(emit, source, inside, dtype)
        pair = 2 * (len(index) - 1 - d)
        before, after = pads[pair : pair + 2] if pair < len(pads) else (sympy.Integer(0),) * 2
        if before == 0 and after == 0:
            return along(d + 1, (*inside, index[d]))
        blank = lambda i: operand(emit, a["value"] or 0, index, dtype)  # noqa: E731
        middle = shape(source)[d]
        return emit.piecewise(
            index[d], [(before, blank), (middle, lambda i: along(d + 1, (*inside, i))), (after, blank)]
        )

    if any(p.could_extract_minus_sign() for p in pads):
        raise Unlowerable("a padding that crops")
    return along(0, ())


def roll(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """The last `shift` entries first: two runs along one dimension."""
    source, dims, shifts = node.args[0], a["dims"], a["shifts"]
    if len(dims) != 1 or len(shifts) != 1:
        raise Unlowerable("a roll over several dimensions, or of the flattened tensor, has no loop form")
    dtype, d = result_register(node), dims[0] % len(index)
    size, shift = shape(node)[d], integer(shifts[0])
    if size.is_Integer:
        shift = shift % max(size, 1)
    elif shift.could_extract_minus_sign():
        shift = shift + size
    if not (is_nonnegative(shift, {}) and is_nonnegative(size - shift, {})):
        raise Unlowerable(f"a roll by {shifts[0]} may be longer than the dimension")
    value = lambda i: operand(emit, source, (*index[:d], i, *index[d + 1 :]), dtype)  # noqa: E731
    return emit.piecewise(index[d], [(shift, lambda i: value(i + size - shift)), (size - shift, value)])


def scatter(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """slice_scatter (step 1) and select_scatter: `self` with a run along one dimension replaced by `src`."""
    base, source = node.args[:2]
    dtype = result_register(node)
    d = a["dim"] % len(index)
    size, single = shape(node)[d], "index" in a
    start = integer(a["index"] if single else a["start"] or 0)
    if start.could_extract_minus_sign():
        start = start + size
    if not single and a["step"] != 1:
        raise Unlowerable("slice_scatter with a step")
    length = sympy.Integer(1) if single else shape(source)[d]

    def inside(i: Expr) -> int:
        return operand(emit, source, (*index[:d], *(() if single else (i,)), *index[d + 1 :]), dtype)

    outside = lambda i: operand(emit, base, index, dtype)  # noqa: E731
    return emit.piecewise(index[d], [(start, outside), (length, inside), (size - start - length, outside)])
