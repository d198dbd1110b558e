"""Every op that has a loop form, against eager: one unit a test, compiled for all dtypes that eager takes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.loop_programs import INTERPRETED, check, compiled, trace

from llmopt.codegen.loops.gathers import SOURCES
from llmopt.codegen.loops.operations import OPERATIONS
from llmopt.codegen.loops.reductions import REDUCTIONS

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL = (*FLOATS, torch.int64, torch.bool)
NUMBERS = (*FLOATS, torch.int64)
INTS = (torch.int64, torch.int32, torch.uint8)
DOUBLE = (*FLOATS, torch.float64)


def sample(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Values around zero with ties, without anything that eager leaves undefined."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(-9, 10, shape, generator=generator).to(dtype)
    return (torch.randn(shape, generator=generator) * 2).to(dtype)


def run(function: Callable[..., Any], dtypes: tuple[torch.dtype, ...], arity: int, positive: bool = False) -> None:
    """Compiles `function` once for every dtype, and compares it on two sets of odd sizes."""

    def inputs(rows: int, columns: int) -> list[torch.Tensor]:
        shapes = ((rows, columns), (columns,), (rows, 1))[:arity]
        found = [sample(d, *shape, seed=n) for d in dtypes for n, shape in enumerate(shapes)]
        return [x.abs() + (0 if x.dtype == torch.bool else 1) for x in found] if positive else found

    def every(*tensors: torch.Tensor) -> list[Any]:
        return [function(*tensors[n * arity : (n + 1) * arity]) for n in range(len(dtypes))]

    check(every, *inputs(3, 37), again=[inputs(7, 5), inputs(2, 130)])


UNARY: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "neg": (aten.neg, NUMBERS),
    "abs": (aten.abs, NUMBERS),
    "sign": (aten.sign, NUMBERS),
    "relu": (aten.relu, NUMBERS),
    "square": (aten.square, NUMBERS),
    "exp": (aten.exp, (*DOUBLE, torch.int64, torch.bool)),
    "exp2": (aten.exp2, DOUBLE),
    "expm1": (aten.expm1, DOUBLE),
    "cos": (aten.cos, (*DOUBLE, torch.int64)),
    "sin": (aten.sin, DOUBLE),
    "tan": (lambda x: aten.tan(x.clamp(-1, 1)), DOUBLE),
    "tanh": (aten.tanh, (*DOUBLE, torch.int64)),
    "sigmoid": (aten.sigmoid, (*DOUBLE, torch.int64)),
    "silu": (aten.silu, DOUBLE),
    "erf": (aten.erf, FLOATS),
    "gelu": (aten.gelu, FLOATS),
    "gelu_tanh": (lambda x: aten.gelu(x, approximate="tanh"), DOUBLE),
    "floor": (aten.floor, NUMBERS),
    "ceil": (aten.ceil, NUMBERS),
    "round": (aten.round, NUMBERS),
    "trunc": (aten.trunc, NUMBERS),
    "logical_not": (aten.logical_not, ALL),
    "bitwise_not": (aten.bitwise_not, (*INTS, torch.bool)),
    "isnan": (lambda x: aten.isnan(aten.log(x)), FLOATS),
    "isinf": (lambda x: aten.isinf(aten.div(x, aten.floor(x))), (torch.float32,)),
    "relu6": (lambda x: aten.relu6(x * 4), NUMBERS),
    "hardtanh": (aten.hardtanh, FLOATS),
    "hardswish": (lambda x: aten.hardswish(x * 2), FLOATS),
    "hardsigmoid": (lambda x: aten.hardsigmoid(x * 2), FLOATS),
    "leaky_relu": (lambda x: aten.leaky_relu(x, 0.1), FLOATS),
    "elu": (lambda x: aten.elu(x, 1.5), FLOATS),
    "softplus": (lambda x: aten.softplus(x * 20, 2.0, 15.0), FLOATS),
    "mish": (aten.mish, FLOATS),
    "log_sigmoid": (aten.log_sigmoid, FLOATS),
    "clamp": (lambda x: aten.clamp(x, -1, 2), NUMBERS),
    "clamp_float": (lambda x: aten.clamp(x, max=1.5), FLOATS),
    "clamp_min": (lambda x: aten.clamp_min(x, 1), NUMBERS),
    "clamp_max": (lambda x: aten.clamp_max(x, 1), NUMBERS),
    "square_root_powers": (lambda x: [x**2, x**3, x**1], NUMBERS),
    "pow_general": (lambda x: [x.abs() ** 2.5, 2.0**x, (x * x + 1) ** -1, (x * x + 1) ** -0.5], FLOATS),
    "pow_int": (lambda x: aten.pow(x, 5), (torch.int64, torch.int32)),
    "rsub": (lambda x: [aten.rsub(x, 3), aten.rsub(x, x, alpha=2)], NUMBERS),
    "scalars": (lambda x: [x + 0.1, x * 3, x - 2, x / 3, aten.add(x, x, alpha=3)], NUMBERS),
    "compare_scalar": (lambda x: [x < 1, x <= 0.5, x == 0, x != 1, x >= 0, x > -1.25], NUMBERS),
    "cast": (lambda x: [x.to(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.bool)], ALL),
    "to_copy": (lambda x: [aten._to_copy(x, dtype=torch.float32), aten._to_copy(x)], ALL),
    "cast_double": (lambda x: x.to(torch.float64), ALL),
    "cast_int": (lambda x: [x.to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8)], ALL),
    "cast_up_down": (lambda x: (x.to(torch.bfloat16) * 1.5).to(torch.float32).to(torch.int64), NUMBERS),
    "remainder_scalar": (lambda x: [aten.remainder(x, 3), aten.remainder(x, -3)], (torch.float32, torch.int64)),
    "fmod_scalar": (lambda x: [aten.fmod(x, 3), aten.fmod(x, -3)], (torch.float32, torch.int64)),
    "floor_divide_scalar": (lambda x: [x // 3, x // -2], (torch.float32, torch.int64)),
    "div_modes": (
        lambda x: [aten.div(x, 3, rounding_mode="floor"), aten.div(x, -2, rounding_mode="trunc")],
        (torch.float32, torch.int64),
    ),
    "bitwise_scalar": (
        lambda x: [aten.bitwise_and(x, 6), aten.bitwise_or(x, 9), aten.bitwise_xor(x, 5)],
        INTS,
    ),
    "dunder_bits": (lambda x: [x & 3, x | 4, x ^ 7], INTS),
    "shift_scalar": (lambda x: [aten.bitwise_left_shift(x, 3), aten.bitwise_right_shift(x, 2), x >> 1, x << 2], INTS),
    "triu": (lambda x: [aten.triu(x), aten.triu(x, 2), aten.tril(x), aten.tril(x, -1)], ALL),
    "masked_fill": (lambda x: aten.masked_fill(x, x > 0, 3), NUMBERS),
    "where_scalars": (
        lambda x: [aten.where(x > 0, x, 1), aten.where(x > 0, 2, x), aten.where(x > 0, 1.0, 0.0)],
        NUMBERS,
    ),
    "one_hot": (lambda x: torch.nn.functional.one_hot(x.remainder(5), 7), (torch.int64,)),
    "flip": (lambda x: [x.flip(0) + 1, x.flip([0, 1]) * 2], NUMBERS),
    "repeat": (lambda x: x.repeat(2, 3) + 1, NUMBERS),
    "repeat_interleave": (lambda x: aten.repeat_interleave(x, 3, 1) + 1, NUMBERS),
    "pad": (lambda x: [aten.constant_pad_nd(x, [2, 3], 1.5), aten.constant_pad_nd(x, [1, 0, 0, 2])], FLOATS),
    "fill": (lambda x: [aten.fill(x, 7), aten.full_like(x, 2) + x, aten.ones_like(x) + x], NUMBERS),
    "zeros_like": (lambda x: [aten.zeros_like(x) + x, x.new_zeros(3, 2), x.new_ones(2), x.new_full((2,), 4)], NUMBERS),
    "slice_scatter": (lambda x: aten.slice_scatter(x, x[:, 1:3] + 1, 1, 1, 3), NUMBERS),
    "select_scatter": (lambda x: aten.select_scatter(x, x[1] * 2, 0, 0), NUMBERS),
}
LOGS = {
    "log": aten.log,
    "log2": aten.log2,
    "log1p": aten.log1p,
    "sqrt": aten.sqrt,
    "rsqrt": aten.rsqrt,
    "reciprocal": aten.reciprocal,
}
BINARY: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "add": (aten.add.Tensor, ALL),
    "sub": (aten.sub.Tensor, NUMBERS),
    "mul": (aten.mul.Tensor, ALL),
    "maximum": (lambda x, y: [aten.maximum(x, y), aten.max(x, y)], ALL),
    "minimum": (lambda x, y: [aten.minimum(x, y), aten.min(x, y)], ALL),
    "compare": (lambda x, y: [x < y, x <= y, x == y, x != y, x >= y, x > y], ALL),
    "logical": (lambda x, y: [aten.logical_and(x, y), aten.logical_or(x, y), aten.logical_xor(x, y)], ALL),
    "bitwise": (
        lambda x, y: [aten.bitwise_and(x, y), aten.bitwise_or(x, y), aten.bitwise_xor(x, y), x & y, x | y, x ^ y],
        (*INTS, torch.bool),
    ),
    "shift_out": (
        lambda x, y: [aten.bitwise_left_shift(x, y.abs() * 8), aten.bitwise_right_shift(x, y.abs() * 8)],
        (torch.int64, torch.int32),
    ),
    "shift": (lambda x, y: [aten.bitwise_left_shift(x, y % 7), aten.bitwise_right_shift(x, y % 7)], INTS),
    "shift_far": (lambda x, y: [aten.bitwise_right_shift(x, 64 + y % 7), x >> 65], (torch.uint8, *INTS)),
    "copy": (aten.copy, ALL),
    "clamp_tensor": (lambda x, y: [aten.clamp(x, y, y + 1), aten.clamp_min(x, y), aten.clamp_max(x, y)], NUMBERS),
    "type_as": (lambda x, y: [x.to(torch.float32).type_as(y), x.to(torch.bfloat16).to(y)], FLOATS),
}
# The second operand is at least 1.
DIVIDING: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "div": (aten.div.Tensor, NUMBERS),
    "true_divide": (aten.true_divide, NUMBERS),
    "div_floor": (lambda x, y: aten.div(x, y, rounding_mode="floor"), (torch.float32, torch.int64)),
    "div_trunc": (lambda x, y: aten.div(x, y, rounding_mode="trunc"), (torch.float32, torch.int64)),
    "floor_divide": (aten.floor_divide, (torch.float32, torch.int64)),
    "remainder": (aten.remainder.Tensor, (torch.float32, torch.int64)),
    "fmod": (aten.fmod.Tensor, (torch.float32, torch.int64)),
    "pow": (aten.pow.Tensor_Tensor, FLOATS),
}
TERNARY: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "where": (lambda x, y, z: aten.where(z > 0, x, y), NUMBERS),
    "addcmul": (lambda x, y, z: [aten.addcmul(x, y, z), aten.addcmul(x, y, z, value=2)], FLOATS),
    "addcdiv": (lambda x, y, z: aten.addcdiv(x, y, z.abs() + 1, value=0.5), FLOATS),
    "lerp": (lambda x, y, z: aten.lerp(x, y.expand_as(x), z), (torch.float32,)),
    "lerp_scalar": (lambda x, y, z: [aten.lerp(x, y.expand_as(x), w) for w in (0.25, 0.75)], FLOATS),
    "masked_fill_tensor": (lambda x, y, z: aten.masked_fill(x, z > 0, y[0]), NUMBERS),
    "cat": (lambda x, y, z: aten.cat([x, y.expand_as(x), z], 1), ALL),
    "cat_rows": (lambda x, y, z: aten.cat([x, y.unsqueeze(0), x + x], 0), ALL),
    "stack": (lambda x, y, z: [aten.stack([x, y.expand_as(x)], d) for d in (0, 1, 2)], ALL),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    run(*UNARY[name], 1)


@pytest.mark.parametrize("name", LOGS)
def test_positive(name: str) -> None:
    run(LOGS[name], DOUBLE, 1, positive=True)


@pytest.mark.parametrize("name", BINARY)
def test_binary_with_broadcast(name: str) -> None:
    run(*BINARY[name], 2)


@pytest.mark.parametrize("name", DIVIDING)
def test_division(name: str) -> None:
    run(*DIVIDING[name], 2, positive=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_integer_division_rounds_as_eager(sign: int) -> None:
    x = torch.arange(-20, 21)
    y = torch.full((41,), 7 * sign)
    y[::3] = 3 * sign

    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        floats = [v.to(torch.float32) for v in (x, y)]
        return [
            f(a, b)
            for a, b in ((x, y), floats)
            for f in (
                aten.floor_divide,
                aten.remainder.Tensor,
                aten.fmod.Tensor,
                lambda p, q: aten.div(p, q, rounding_mode="trunc"),
            )
        ]

    check(function, x, y)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_with_broadcast(name: str) -> None:
    run(*TERNARY[name], 3)


def test_mixed_dtypes_are_promoted_as_in_eager() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    inputs = [sample(d, 5, 33, seed=n) for n, d in enumerate(dtypes)]

    def function(*x: torch.Tensor) -> list[torch.Tensor]:
        pairs = [(a, b) for n, a in enumerate(x) for b in x[n + 1 :]]
        return [r for a, b in pairs for r in (a + b, a * b, a < b, a == b, a / b, torch.maximum(a, b))]

    check(function, *inputs)


def test_zero_dim_tensors_do_not_promote() -> None:
    check(
        lambda x, y, i: [x * y, x + i, i * y, x.to(torch.bfloat16) * y],
        sample(torch.float32, 3, 9),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor(3),
    )


def test_nan_and_infinity() -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1.0, 1e30, -1e30, 1e-40])
    x, y = special.repeat_interleave(9), special.repeat(9)

    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.maximum(x, y), torch.minimum(x, y), x.relu(), x.clamp(-1, 1), x.sigmoid(), x.tanh(), x.exp()]
        found += [x + y, x * y, x / y, x < y, x == y, x.isnan(), x.isinf(), torch.where(x > y, x, y)]
        return [
            *found,
            x.to(torch.bfloat16),
            x.to(torch.float16),
            x.abs(),
            x.sqrt(),
            x.log(),
            torch.nn.functional.silu(x),
        ]

    check(function, x, y)


def test_float_to_int_saturates_like_eager_within_range() -> None:
    x = torch.tensor([0.0, -0.9, 0.9, 1.5, -1.5, 2147483520.0, -2147483648.0, 9e15, -9e15])
    check(lambda x: [x.to(torch.int64), x[:7].to(torch.int32)], x)


def test_integers_wrap() -> None:
    big = torch.tensor([2**62, -(2**62), 2**63 - 1, -(2**63), 3])
    check(lambda x: [x + x, x * x, x - 1, -x, x.abs(), x.to(torch.int32) * 65537, x.to(torch.int8) * 3], big)


def test_creation_ops() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        n, m = x.shape
        return [
            torch.arange(n) * 2,
            torch.arange(3, m, 2),
            torch.arange(n, dtype=torch.float32) / 3,
            torch.arange(0.5, 4.0, 0.25),
            torch.arange(m, 0, -1),
            torch.full((n, 3), 2.5),
            torch.full((2,), True),
            torch.zeros(m),
            torch.ones(n, m, dtype=torch.int64),
            torch.scalar_tensor(3.5) + x,
            torch.arange(n).unsqueeze(1) >= torch.arange(m),
            x * n + m,
        ]

    check(function, torch.randn(7, 11), again=[[torch.randn(2, 5)], [torch.randn(31, 9)]])


def test_outer_products_are_loops_and_other_products_are_not() -> None:
    a, b = torch.randn(3, 17, 1), torch.randn(3, 1, 9)
    check(lambda a, b: [aten.matmul(a, b).cos(), aten.bmm(a, b) + 1, aten.mm(a[0], b[0])], a, b)
    program = compiled(lambda a, b: aten.matmul(a, b) + 1, torch.randn(4, 5), torch.randn(5, 6))
    assert list(program.plan.rejected.values()) == [
        "a matrix product over more than one inner element has no loop form"
    ]


def test_a_number_read_from_a_tensor() -> None:
    check(lambda x, s: x * s.item() + 1, torch.randn(3, 5), torch.tensor(0.125, dtype=torch.float64))


# Covered by test_loops_reductions.py, _views.py and _gathers.py, or by another test of this file.
ELSEWHERE = {
    "scatter",
    "matmul",
    "bmm",
    "mm",
    "arange",
    "scalar_tensor",
    "full",
    "zeros",
    "ones",
    "zeros_like",
    "ones_like",
}
ELSEWHERE |= {"roll", *(str(target).split(".")[1] for target in SOURCES)} | {
    str(target).split(".")[1] for target in REDUCTIONS
}


def test_every_op_of_the_table_is_tested() -> None:
    """The table cannot grow without a test: every op in it is traced by some function above."""
    seen = set()
    for table, arity in ((UNARY, 1), (BINARY, 2), (DIVIDING, 2), (TERNARY, 3), (LOGS, 1)):
        for entry in table.values():
            function, dtypes = entry if isinstance(entry, tuple) else (entry, DOUBLE)
            x = sample(dtypes[0], 3, 5)
            seen |= {str(n.target) for n in trace(function, *(x, x[0], x[:, :1])[:arity]).graph.nodes}
    packets = {name.split(".")[1] for name in seen if name.startswith("aten.")}
    untested = {str(target).split(".")[1] for target in OPERATIONS} - packets - ELSEWHERE
    # Uninitialised memory has no value to compare, and make_fx writes the others in terms of ops above.
    assert untested <= {"empty", "empty_like", "new_empty"}


def test_from_the_nearer_end() -> None:
    """A weight of 1 gives the end itself, however far the start."""
    start, end = torch.tensor([1e8, -1e8, 3.0]), torch.tensor([0.1, 0.3, 0.7])
    program = check(lambda x, y, w: [aten.lerp(x, y, w), aten.lerp(x, y, 1.0)], start, end, torch.ones(3))
    for result in program(start, end, torch.ones(3)):
        assert torch.equal(result, end)


def test_float16_that_overflows_inside_a_kernel() -> None:
    """As T5 guards its layers: a test for infinity, or a cast to float32, sees what float16 would have held."""

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        large = x * 60000
        guarded = torch.where(aten.isinf(large).any(), large.clamp(-64504, 64504), large)
        return [aten.isinf(large), aten.isnan(large.float() - large.float()), large.float(), guarded]

    check(function, torch.tensor([2.0, 0.5, -3.0]).half())


@pytest.mark.skipif(INTERPRETED, reason="where x86 converts")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="where x86 converts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_outside_an_integer_type(dtype: torch.dtype) -> None:
    x = torch.tensor([3e9, -3e9, 1e30, float("nan"), float("inf"), -float("inf"), 2.5, -(2.0**31)] * 5, dtype=dtype)
    check(lambda x: [x.to(torch.int32), x.to(torch.int64)], x)
