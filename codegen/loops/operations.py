"""The pointwise ATen ops that have a loop form, and the table of all ops that are no reductions (`reductions.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from llmopt.codegen.loops import assembly, gathers
from llmopt.codegen.loops.emit import (
    Args,
    Emit,
    Handler,
    common_dtype,
    dtype_name,
    operand,
    result_register,
    rounded,
)
from llmopt.codegen.loops.ir import register
from llmopt.codegen.loops.symbolic import Indices, Unlowerable
from llmopt.codegen.loops.views import integer, shape, tensor_of

aten = torch.ops.aten


# ---- families -------------------------------------------------------------------------------------------------------


def _unary(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        return emit.call(function, operand(emit, node.args[0], index, result_register(node)))

    return lower


def _rounding(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = dtype_name(tensor_of(node).dtype)
        ref = rounded(emit, node.args[0], index, dtype)
        return emit.call(function, ref) if dtype.startswith(("float", "bfloat")) else ref

    return lower


# What an arithmetic function means on bool.
_ON_BOOL = {"add": "bit_or", "mul": "bit_and", "maximum": "bit_or", "minimum": "bit_and"}


def _binary(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = result_register(node)
        left, right = (operand(emit, arg, index, dtype) for arg in node.args[:2])
        if a.get("alpha", 1) != 1:
            right = emit.call("mul", right, operand(emit, a["alpha"], index, dtype))
        return emit.call(_ON_BOOL.get(function, function) if dtype == "bool" else function, left, right)

    return lower


def _rsub(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    left, right = (operand(emit, arg, index, dtype) for arg in node.args[:2])
    if a["alpha"] != 1:
        left = emit.call("mul", left, operand(emit, a["alpha"], index, dtype))
    return emit.call("sub", right, left)


def _compare(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = common_dtype(node.args[:2])
        return emit.call(function, *(rounded(emit, arg, index, dtype) for arg in node.args[:2]))

    return lower


def _test(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = common_dtype(node.args[:1])
        if not dtype.startswith(("float", "bfloat")):
            return emit.constant(False, "bool")
        return emit.call(function, rounded(emit, node.args[0], index, dtype))

    return lower


def _logical(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        refs = [_truth(emit, arg, index) for arg in node.args[: 1 if function == "bit_not" else 2]]
        return emit.call(function, *refs)

    return lower


def _truth(emit: Emit, argument: Any, index: Indices) -> int:
    return emit.cast(rounded(emit, argument, index, common_dtype([argument])), "bool")


def _divide(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    left, right = (operand(emit, arg, index, dtype) for arg in node.args[:2])
    mode = a.get("rounding_mode")
    if mode not in (None, "floor", "trunc"):
        raise Unlowerable(f"div with rounding_mode {mode!r}")
    return emit.call({None: "div", "floor": "floor_div", "trunc": "trunc_div"}[mode], left, right)


def _pow(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    exponent = node.args[1]
    base = operand(emit, node.args[0], index, dtype)
    if isinstance(exponent, int | float) and not isinstance(exponent, bool):
        # As eager: these exponents are exact products and roots, not std::pow.
        if exponent in (1, 2, 3):
            square = emit.call("mul", base, base) if exponent > 1 else base
            return emit.call("mul", square, base) if exponent == 3 else square
        if dtype.startswith("float") and exponent in (0.5, -0.5, -1, -2):
            if exponent == -2:
                return emit.call("reciprocal", emit.call("mul", base, base))
            return emit.call({0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[float(exponent)], base)
        if not dtype.startswith("float") and exponent < 0:
            raise Unlowerable("an integer to a negative power")
    elif not dtype.startswith("float"):
        raise Unlowerable("an integer to a computed power")
    return emit.call("pow", base, operand(emit, exponent, index, dtype))


def _where(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    condition = _truth(emit, node.args[0], index)
    return emit.call("where", condition, *(operand(emit, arg, index, dtype) for arg in node.args[1:3]))


def _masked_fill(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x, mask, value = node.args[:3]
    return emit.call("where", _truth(emit, mask, index), *(operand(emit, v, index, dtype) for v in (value, x)))


def _clamp(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    ref = operand(emit, node.args[0], index, dtype)
    for function, names in (("maximum", ("min", "min_val")), ("minimum", ("max", "max_val"))):
        for limit in (a[name] for name in names if a.get(name) is not None):
            ref = emit.call(function, ref, operand(emit, limit, index, dtype))
    return ref


def _cast(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    source, target = (dtype_name(tensor_of(n).dtype) for n in (node.args[0], node))
    if target.startswith(("float", "bfloat")) and source != "float16":  # what overflows float16 has become infinite
        return emit.cast(operand(emit, node.args[0], index, register(source)), target)
    return emit.cast(rounded(emit, node.args[0], index, source), target)


# ---- single ops -----------------------------------------------------------------------------------------------------


def _gelu(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    name = {"none": "gelu_erf", "tanh": "gelu_tanh"}[a["approximate"]]
    return emit.call(name, operand(emit, node.args[0], index, result_register(node)))


def _leaky_relu(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x = operand(emit, node.args[0], index, dtype)
    slope = operand(emit, a["negative_slope"], index, dtype)
    return emit.call("where", emit.call("gt", x, emit.constant(0, dtype)), x, emit.call("mul", x, slope))


def _elu(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x = operand(emit, node.args[0], index, dtype)
    number: Callable[[Any], int] = lambda v: operand(emit, v, index, dtype)  # noqa: E731
    below = emit.call("expm1", emit.call("mul", x, number(a["input_scale"])))
    below = emit.call("mul", emit.call("mul", below, number(a["alpha"])), number(a["scale"]))
    above = emit.call("mul", x, number(a["scale"]))
    return emit.call("where", emit.call("gt", x, emit.constant(0, dtype)), above, below)


def _softplus(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x = operand(emit, node.args[0], index, dtype)
    beta, threshold = (operand(emit, a.get(k, d), index, dtype) for k, d in (("beta", 1), ("threshold", 20)))
    scaled = emit.call("mul", x, beta)
    soft = emit.call("div", emit.call("log1p", emit.call("exp", scaled)), beta)
    return emit.call("where", emit.call("gt", scaled, threshold), x, soft)


def _mish(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    soft = _softplus(emit, node, a, index)
    return emit.call("mul", operand(emit, node.args[0], index, result_register(node)), emit.call("tanh", soft))


def _log_sigmoid(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x = operand(emit, node.args[0], index, dtype)
    tail = emit.call("log1p", emit.call("exp", emit.call("neg", emit.call("abs", x))))
    return emit.call("sub", emit.call("minimum", x, emit.constant(0, dtype)), tail)


def _relu6(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    x = operand(emit, node.args[0], index, dtype)
    return emit.call("minimum", emit.call("maximum", x, emit.constant(0, dtype)), emit.constant(6, dtype))


def _hard(swish: bool) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = result_register(node)
        x = operand(emit, node.args[0], index, dtype)
        number: Callable[[float], int] = lambda v: emit.constant(v, dtype)  # noqa: E731
        gate = emit.call("minimum", emit.call("maximum", emit.call("add", x, number(3)), number(0)), number(6))
        return emit.call("div", emit.call("mul", x, gate) if swish else gate, number(6))

    return lower


def _addc(function: str) -> Handler:
    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = result_register(node)
        x, left, right = (operand(emit, v, index, dtype) for v in node.args[:3])
        if a["value"] != 1:
            left = emit.call("mul", left, operand(emit, a["value"], index, dtype))
        return emit.call("add", x, emit.call(function, left, right))

    return lower


def _lerp(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    dtype = result_register(node)
    start, end, weight = (operand(emit, v, index, dtype) for v in node.args[:3])
    way = emit.call("sub", end, start)
    near_start = emit.call("add", start, emit.call("mul", weight, way))
    rest = emit.call("sub", emit.constant(1, dtype), weight)
    near_end = emit.call("sub", end, emit.call("mul", way, rest))
    # From the nearer end, as eager: a weight of 1 gives `end` to the bit.
    is_near_start = emit.call("lt", emit.call("abs", weight), emit.constant(0.5, dtype))
    return emit.call("where", is_near_start, near_start, near_end)


def _band(upper: bool) -> Handler:
    """triu keeps column >= row + diagonal, tril column <= row + diagonal."""

    def lower(emit: Emit, node: Node, a: Args, index: Indices) -> int:
        dtype = result_register(node)
        row, column = emit.index_value(index[-2] + integer(a["diagonal"])), emit.index_value(index[-1])
        x = operand(emit, node.args[0], index, dtype)
        return emit.call("where", emit.call("ge" if upper else "le", column, row), x, emit.constant(0, dtype))

    return lower


def _one_hot(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    x = operand(emit, node.args[0], index[:-1], "int64")
    return emit.cast(emit.call("eq", x, emit.index_value(index[-1])), "int64")


def _outer_matmul(emit: Emit, node: Node, a: Args, index: Indices) -> int:
    """A matrix product over a single inner element is an outer product (the rope tables of several models)."""
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node)) or len(shape(left)) < 2 or len(shape(right)) < 2:
        raise Unlowerable("a product with a vector has no loop form")
    if shape(left)[-1] != 1:
        raise Unlowerable("a matrix product over more than one inner element has no loop form")
    dtype, zero = result_register(node), sympy.Integer(0)
    return emit.call(
        "mul",
        operand(emit, left, (*index[:-1], zero), dtype),
        operand(emit, right, (*index[:-2], zero, index[-1]), dtype),
    )


# ---- the table ------------------------------------------------------------------------------------------------------

OPERATIONS: dict[Any, Handler] = {}

_FLOAT_NAMES = "neg abs sign relu exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal cos sin tan tanh sigmoid silu erf"
_COMPARE_NAMES = ("eq", "ne", "lt", "le", "gt", "ge")
_CREATION_NAMES = {"full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"}
_CREATION_NAMES |= {"empty", "empty_like", "new_empty", "scalar_tensor"}
_CHEAP_NAMES = {"neg", "abs", "add", "sub", "rsub", "mul", *_COMPARE_NAMES, "where", "masked_fill", "logical_not"}
_CHEAP_NAMES |= {"logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__"}


def _add(handler: Handler, *names: str) -> None:
    for name in names:
        packet, _, overload = name.partition(".")
        OPERATIONS[getattr(getattr(aten, packet), overload or "default")] = handler


for _name in _FLOAT_NAMES.split():
    _add(_unary(_name), _name)
for _name in ("floor", "ceil", "round", "trunc"):
    _add(_rounding(_name), _name)
for _name in _COMPARE_NAMES:
    _add(_compare(_name), f"{_name}.Tensor", f"{_name}.Scalar")
for _name in ("isnan", "isinf"):
    _add(_test(_name), _name)
_add(_binary("add"), "add.Tensor", "add.Scalar")
_add(_binary("sub"), "sub.Tensor", "sub.Scalar")
_add(_binary("mul"), "mul.Tensor", "mul.Scalar")
_add(lambda e, n, a, i: e.call("mul", *[operand(e, n.args[0], i, result_register(n))] * 2), "square")
_add(_divide, "div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", "true_divide.Tensor")
_add(_binary("floor_div"), "floor_divide", "floor_divide.Scalar")
_add(_binary("remainder"), "remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor")
_add(_binary("fmod"), "fmod.Tensor", "fmod.Scalar")
_add(_binary("maximum"), "maximum", "max.other")
_add(_binary("minimum"), "minimum", "min.other")
for _name, _function in (("and", "bit_and"), ("or", "bit_or"), ("xor", "bit_xor")):
    _overloads = [f"{p}.{o}" for p in (f"bitwise_{_name}", f"__{_name}__") for o in ("Tensor", "Scalar")]
    _add(_binary(_function), *_overloads)
    _add(_logical(_function), f"logical_{_name}")
_add(_logical("bit_not"), "logical_not")
_add(_unary("bit_not"), "bitwise_not")
_add(_binary("shl"), "bitwise_left_shift.Tensor", "bitwise_left_shift.Tensor_Scalar")
_add(_binary("shl"), "__lshift__.Tensor", "__lshift__.Scalar")
_add(_binary("shr"), "bitwise_right_shift.Tensor", "bitwise_right_shift.Tensor_Scalar")
_add(_binary("shr"), "__rshift__.Tensor", "__rshift__.Scalar")
_add(_rsub, "rsub.Tensor", "rsub.Scalar")
_add(_pow, "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
_add(_where, "where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
_add(_masked_fill, "masked_fill.Scalar", "masked_fill.Tensor")
_add(_clamp, "clamp", "clamp.Tensor", "clamp_min", "clamp_max", "clamp_min.Tensor", "clamp_max.Tensor", "hardtanh")
_add(_cast, "_to_copy", "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as")
_add(_gelu, "gelu")
_add(_leaky_relu, "leaky_relu")
_add(_elu, "elu")
_add(_softplus, "softplus")
_add(_mish, "mish")
_add(_log_sigmoid, "log_sigmoid")
_add(_relu6, "relu6")
_add(_hard(True), "hardswish")
_add(_hard(False), "hardsigmoid")
_add(_addc("mul"), "addcmul")
_add(_addc("div"), "addcdiv")
_add(_lerp, "lerp.Scalar", "lerp.Tensor")
_add(_band(True), "triu")
_add(_band(False), "tril")
_add(_one_hot, "one_hot")
_add(_outer_matmul, "matmul", "bmm", "mm")
_add(assembly.fill("fill_value"), "full", "full_like", "new_full")
_add(assembly.fill(0), "zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty")
_add(assembly.fill(1), "ones", "ones_like", "new_ones")
_add(assembly.fill("s"), "scalar_tensor")
_add(assembly.fill("value"), "fill.Scalar", "fill.Tensor")
_add(assembly.arange, "arange", "arange.start", "arange.start_step")
_add(assembly.copy, "copy")
_add(assembly.cat, "cat")
_add(assembly.stack, "stack")
_add(assembly.pad, "constant_pad_nd")
_add(assembly.roll, "roll")
_add(gathers.gather, "gather")
_add(gathers.index_select, "index_select")
_add(gathers.index_tensor, "index.Tensor")
_add(gathers.embedding, "embedding")
_add(gathers.scatter, "scatter.value", "scatter.src")
_add(assembly.scatter, "slice_scatter", "select_scatter")

# No operand at all: always computed where they are used.
CREATIONS: frozenset[Any] = frozenset(
    target
    for target, handler in OPERATIONS.items()
    if handler is assembly.arange or str(target).split(".")[1] in _CREATION_NAMES
)
# A few instructions an element: computed again in each kernel that uses them, where they read at most one tensor.
CHEAP: frozenset[Any] = frozenset(
    target for target, handler in OPERATIONS.items() if handler is _cast or str(target).split(".")[1] in _CHEAP_NAMES
)
