"""The index grammar: every form of an expression has the same value, and files cannot smuggle anything in."""

from __future__ import annotations

import json

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod, ModularIndexing, PythonMod

from llmopt.codegen import index as ix
from llmopt.codegen.cpu import native
from llmopt.compiler.errors import ProgramFileError, UnsupportedError

A, B = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s77"))
NAMES = {"s0", "s77"}

indices = st.recursive(
    st.one_of(st.integers(-9, 9), st.sampled_from(sorted(NAMES))),
    lambda inner: st.builds(ix.Binary, st.sampled_from(sorted(ix.OPERATORS)), inner, inner),
    max_leaves=12,
)


def run_postfix(code: tuple[int, ...], symbols: list[int]) -> int:
    """The executor's loop in Python."""
    stack: list[int] = []
    words = iter(code)
    for word in words:
        if word == native.PUSH:
            stack.append(next(words))
        elif word == native.SYMBOL:
            stack.append(symbols[next(words)])
        else:
            b, a = stack.pop(), stack.pop()
            operations = {
                native.ADD: lambda: a + b,
                native.MUL: lambda: a * b,
                native.FLOOR_DIV: lambda: a // b,
                native.MOD: lambda: a % b,
                native.MIN: lambda: min(a, b),
                native.MAX: lambda: max(a, b),
            }
            stack.append(operations[word]())
    assert len(stack) == 1
    return stack[0]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (sympy.Integer(7), 7),
        (A, 13),
        (A + B - 3, 15),
        (2 * A * B - B, 2 * 13 * 5 - 5),
        (A**2 + 1, 170),
        (FloorDiv(A - 20, 4), -2),
        (CeilDiv(A, 4), 4),
        (Mod(A, 5), 3),
        (PythonMod(A - 20, 4), 1),
        (ModularIndexing(A, 2, 4), 2),
        (Max(A - B, 0) + Min(A, B), 13),
        (sympy.floor(A / 2), 6),
    ],
)
def test_sympy_forms_keep_their_value(expression: sympy.Expr, expected: int) -> None:
    index = ix.from_sympy(expression)
    assert ix.evaluate(index, {"s0": 13, "s77": 5}) == expected
    assert run_postfix(ix.to_postfix(index, {"s0": 0, "s77": 1}), [13, 5]) == expected
    assert ix.from_json(json.loads(json.dumps(ix.to_json(index))), NAMES) == index


@settings(max_examples=300)
@given(indices, st.integers(0, 50), st.integers(0, 50))
def test_forms_agree(index: ix.Index, first: int, second: int) -> None:
    values = {"s0": first, "s77": second}
    try:
        expected = ix.evaluate(index, values)
    except ZeroDivisionError:
        return
    assert run_postfix(ix.to_postfix(index, {"s0": 0, "s77": 1}), [first, second]) == expected
    if ix.is_nonnegative(index):
        assert expected >= 0
    split = ix.affine(index, "s0")
    if split is not None:
        assert "s0" not in ix.symbols_of(split[0]) | ix.symbols_of(split[1])
        assert ix.evaluate(split[0], values) * first + ix.evaluate(split[1], values) == expected


def test_order_of_terms_depends_on_names_only() -> None:
    x, y = sympy.symbols("x y", integer=True)
    assert ix.from_sympy(x * 3 + y, {x: "a", y: "b"}) == ix.from_sympy(y * 3 + x, {y: "a", x: "b"})


def test_affine_refuses_what_is_not() -> None:
    assert ix.affine(ix.from_sympy(A * A), "s0") is None
    assert ix.affine(ix.from_sympy(FloorDiv(A, 2)), "s0") is None
    assert ix.affine(ix.from_sympy(A * B + 3 * A + B), "s0") is not None


def test_inexpressible_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no integer form"):
        ix.from_sympy(sympy.sqrt(A))
    with pytest.raises(UnsupportedError, match="not among the symbols"):
        ix.from_sympy(A, {B: "b"})
    with pytest.raises(UnsupportedError, match="no value"):
        ix.to_postfix("s9", {"s0": 0})
    deep: ix.Index = "s0"
    for _ in range(40):
        deep = ix.Binary("+", "s0", deep)
    with pytest.raises(UnsupportedError, match="too deep"):
        ix.to_postfix(deep, {"s0": 0})


@pytest.mark.parametrize(
    "data",
    [
        True,
        1.5,
        None,
        1 << 63,
        "s1",
        "s0; system()",
        [],
        ["+", 1],
        ["-", 1, 2],
        ["+", 1, 2, 3],
        [["+"], 1, 2],
        {"+": [1, 2]},
        ["//", "s0", 0],
        ["%", "s0", -4],
        ["+", 1, ["__import__", "os", "s0"]],
    ],
)
def test_malformed_json_is_refused(data: object) -> None:
    with pytest.raises(ProgramFileError):
        ix.from_json(data, NAMES)


def test_size_limits() -> None:
    deep: object = "s0"
    for _ in range(ix.MAX_DEPTH + 1):
        deep = ["+", deep, 1]
    with pytest.raises(ProgramFileError, match="too large"):
        ix.from_json(deep, NAMES)
    wide: object = "s0"
    for _ in range(12):
        wide = ["+", wide, wide]
    with pytest.raises(ProgramFileError, match="too large"):
        ix.from_json(wide, NAMES)


def test_cpp_text() -> None:
    assert ix.to_cpp(ix.from_sympy(2 * A + B), {"s0": "n"}) == "(s77 + (n * 2))"
    assert "floor_div" in ix.to_cpp(ix.from_sympy(FloorDiv(A - 3, 2)))
    assert "/" in ix.to_cpp(ix.from_sympy(FloorDiv(A, 2)))
