"""Integer index expressions: the form in which sizes, strides and offsets leave the compiler.

Inside the compiler an index is a sympy expression. What is serialised, printed as C++ or evaluated by the step executor
is the small closed grammar of this module:

    index  = int | symbol | [operator, index, index]
    operator = "+" | "*" | "//" | "%" | "min" | "max"

`//` and `%` are Python's: the quotient is rounded down and the remainder has the sign of the divisor. Every symbol
stands for an integer >= 0 (a size or a loop variable). Text from a file is parsed by `from_json` alone, against
declared names and within limits; nothing here evaluates text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import sympy
from torch.utils._sympy import functions as torch_functions

from llmopt.codegen.cpu import native
from llmopt.compiler.errors import ProgramFileError, UnsupportedError

Operator: TypeAlias = Literal["+", "*", "//", "%", "min", "max"]
OPERATORS: frozenset[str] = frozenset(get_args(Operator))

MAX_DEPTH = 48
MAX_NODES = 1024
EXECUTOR_STACK = 32  # entries of the stack in kernels/executor.cpp

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_INT64 = 1 << 63


@dataclass(frozen=True)
class Binary:
    """`left operator right`."""

    operator: Operator
    left: Index
    right: Index


Index: TypeAlias = int | str | Binary
Json: TypeAlias = Any


def is_name(text: str) -> bool:
    """Whether `text` can be a symbol: a short ASCII identifier."""
    return _NAME.fullmatch(text) is not None


# ---- building -------------------------------------------------------------------------------------------------------


def add(left: Index, right: Index) -> Index:
    """`left + right` with constants folded."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if left == 0:
        return right
    return left if right == 0 else Binary("+", left, right)


def multiply(left: Index, right: Index) -> Index:
    """`left * right` with constants folded."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    if left == 0 or right == 0:
        return 0
    if left == 1:
        return right
    return left if right == 1 else Binary("*", left, right)


def from_sympy(expression: sympy.Expr | int, names: Mapping[sympy.Symbol, str] | None = None) -> Index:
    """Converts a sympy integer expression.

    Args:
        expression: built of integers, symbols, `+`, `*`, powers by a positive integer, floor divisions, remainders,
            minima and maxima, as PyTorch's symbolic shapes use them.
        names: the name of each symbol; None takes the symbols' own.

    The order of terms depends on the names alone, so equal expressions over equal names give equal results.

    Raises:
        UnsupportedError: the expression is not an integer one of these, or a symbol has no usable name.
    """
    if isinstance(expression, int):
        return int(expression)
    convert: Callable[[Any], Index] = lambda e: from_sympy(e, names)  # noqa: E731
    if expression.is_Integer:
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        name = expression.name if names is None else names.get(expression)
        if name is None or not is_name(name):
            raise UnsupportedError(f"the size {expression} is not among the symbols of this program")
        return name
    arguments = expression.args
    if isinstance(expression, sympy.Add):
        return _fold(add, sorted(map(convert, arguments), key=_order))
    if isinstance(expression, sympy.Mul):
        coefficient, rest = expression.as_coeff_Mul()
        if coefficient.is_Integer:
            return _fold(multiply, [*sorted(map(convert, sympy.Mul.make_args(rest)), key=_order), int(coefficient)])
    if isinstance(expression, sympy.Pow):
        base, exponent = arguments
        if exponent.is_Integer and 0 < int(exponent) <= 8:
            return _fold(multiply, [convert(base)] * int(exponent))
    if isinstance(expression, torch_functions.FloorDiv | torch_functions.CleanDiv):
        return Binary("//", convert(arguments[0]), convert(arguments[1]))
    if isinstance(expression, torch_functions.CeilDiv):
        top, bottom = arguments
        return Binary("//", convert(sympy.expand(top + bottom - 1)), convert(bottom))
    if isinstance(expression, torch_functions.Mod | torch_functions.PythonMod | sympy.Mod):
        return Binary("%", convert(arguments[0]), convert(arguments[1]))
    if isinstance(expression, torch_functions.ModularIndexing):
        return Binary("%", Binary("//", convert(arguments[0]), convert(arguments[1])), convert(arguments[2]))
    if isinstance(expression, sympy.floor):
        top, bottom = sympy.fraction(sympy.together(arguments[0]))
        return Binary("//", convert(top), convert(bottom))
    if isinstance(expression, torch_functions.Min | sympy.Min):
        return _fold(lambda a, b: Binary("min", a, b), sorted(map(convert, arguments), key=_order))
    if isinstance(expression, torch_functions.Max | sympy.Max):
        return _fold(lambda a, b: Binary("max", a, b), sorted(map(convert, arguments), key=_order))
    if isinstance(expression, torch_functions.Identity):
        return convert(arguments[0])
    raise UnsupportedError(f"the size {expression} has no integer form ({type(expression).__name__})")


def to_sympy(index: Index, symbols: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    """The inverse of `from_sympy`: `symbols` gives the symbol of each name."""
    if isinstance(index, int):
        return sympy.Integer(index)
    if isinstance(index, str):
        return symbols[index]
    left, right = to_sympy(index.left, symbols), to_sympy(index.right, symbols)
    match index.operator:
        case "+":
            return left + right
        case "*":
            return left * right
        case "//":
            return torch_functions.FloorDiv(left, right)
        case "%":
            return torch_functions.PythonMod(left, right)
        case "min":
            return sympy.Min(left, right)
        case "max":
            return sympy.Max(left, right)


def _fold(combine: Callable[[Index, Index], Index], items: list[Index]) -> Index:
    result = items[0]
    for item in items[1:]:
        result = combine(result, item)
    return result


def _order(index: Index) -> tuple[int, str]:
    """Constants last, so that a C++ compiler sees the same base in `x + 1` and `x + 2`."""
    return (isinstance(index, int), repr(index))


# ---- reading --------------------------------------------------------------------------------------------------------


def symbols_of(index: Index) -> frozenset[str]:
    """The names that occur in `index`."""
    if isinstance(index, Binary):
        return symbols_of(index.left) | symbols_of(index.right)
    return frozenset({index}) if isinstance(index, str) else frozenset()


def rename(index: Index, names: Mapping[str, str]) -> Index:
    """`index` with some of its names replaced."""
    if isinstance(index, Binary):
        return Binary(index.operator, rename(index.left, names), rename(index.right, names))
    return names.get(index, index) if isinstance(index, str) else index


def evaluate(index: Index, values: Mapping[str, int]) -> int:
    """The value of `index` where each symbol has the given value; ZeroDivisionError for a zero divisor."""
    if isinstance(index, int):
        return index
    if isinstance(index, str):
        return values[index]
    left, right = evaluate(index.left, values), evaluate(index.right, values)
    match index.operator:
        case "+":
            return left + right
        case "*":
            return left * right
        case "//":
            return left // right
        case "%":
            return left % right
        case "min":
            return min(left, right)
        case "max":
            return max(left, right)


def is_nonnegative(index: Index) -> bool:
    """Whether `index` is >= 0 for every value of its symbols, as far as its form shows."""
    if isinstance(index, int):
        return index >= 0
    if isinstance(index, str):
        return True
    left, right = is_nonnegative(index.left), is_nonnegative(index.right)
    if index.operator == "%":
        return right
    return left or right if index.operator == "max" else left and right


def affine(index: Index, name: str) -> tuple[Index, Index] | None:
    """(a, b) with `index == a * name + b` and neither holding `name`; None where there is no such form."""
    if isinstance(index, int):
        return 0, index
    if isinstance(index, str):
        return (1, 0) if index == name else (0, index)
    if name not in symbols_of(index):
        return 0, index
    left, right = affine(index.left, name), affine(index.right, name)
    if left is None or right is None:
        return None
    if index.operator == "+":
        return add(left[0], right[0]), add(left[1], right[1])
    if index.operator == "*":
        if right[0] == 0:
            return multiply(left[0], right[1]), multiply(left[1], right[1])
        if left[0] == 0:
            return multiply(right[0], left[1]), multiply(right[1], left[1])
    return None


# ---- other forms ----------------------------------------------------------------------------------------------------


def to_json(index: Index) -> Json:
    """The JSON form: an int, a name, or `[operator, left, right]`."""
    if isinstance(index, Binary):
        return [index.operator, to_json(index.left), to_json(index.right)]
    return index


def from_json(data: Json, symbols: Collection[str]) -> Index:
    """Reads the JSON form; every name must be in `symbols`.

    Raises:
        ProgramFileError: anything else than the grammar, an undeclared name, an integer beyond 64 bits, a constant
            divisor <= 0, more than MAX_NODES nodes or MAX_DEPTH levels.
    """
    budget = MAX_NODES

    def read(item: Json, depth: int) -> Index:
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            raise ProgramFileError("an index expression is too large")
        if isinstance(item, int) and not isinstance(item, bool):
            if not -_INT64 <= item < _INT64:
                raise ProgramFileError(f"the integer {item} does not fit in 64 bits")
            return item
        if isinstance(item, str):
            if item not in symbols or not is_name(item):
                raise ProgramFileError(f"index expression names the undeclared symbol {item[:64]!r}")
            return item
        if isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and item[0] in OPERATORS:
            operator = cast(Operator, item[0])
            left, right = read(item[1], depth + 1), read(item[2], depth + 1)
            if operator in ("//", "%") and isinstance(right, int) and right <= 0:
                raise ProgramFileError(f"index expression divides by {right}")
            return Binary(operator, left, right)
        raise ProgramFileError(f"not an index expression: {str(item)[:80]}")

    return read(data, 0)


def to_cpp(index: Index, rename: Mapping[str, str] | None = None) -> str:
    """A C++ expression of type std::int64_t, fully parenthesised.

    `rename` gives the C++ variable of a symbol where it differs. Divisions that may meet a negative number use
    `floor_div` and `floor_mod` of kernels/loops.h, minima and maxima its `index_min` and `index_max`.
    """
    if isinstance(index, int):
        # A bare 64-bit minimum is not a literal in C++.
        return f"std::int64_t{{{index}}}" if abs(index) < _INT64 else "INT64_MIN"
    if isinstance(index, str):
        return rename.get(index, index) if rename else index
    left, right = to_cpp(index.left, rename), _cpp_operand(index.right, rename)
    if index.operator in ("+", "*"):
        return f"({left} {index.operator} {right})"
    if index.operator in ("//", "%"):
        positive = is_nonnegative(index.left) and is_nonnegative(index.right)
        if positive:
            return f"({left} {index.operator[0]} {right})"
        right = to_cpp(index.right, rename)
        return f"{'floor_div' if index.operator == '//' else 'floor_mod'}({left}, {right})"
    return f"index_{index.operator}({left}, {right})"


def _cpp_operand(index: Index, rename: Mapping[str, str] | None) -> str:
    # Beside a 64-bit left operand a small literal needs no type of its own.
    if isinstance(index, int) and 0 <= index < 1 << 31:
        return str(index)
    return to_cpp(index, rename)


_OPCODES: dict[str, int] = {
    "+": native.ADD,
    "*": native.MUL,
    "//": native.FLOOR_DIV,
    "%": native.MOD,
    "min": native.MIN,
    "max": native.MAX,
}


def to_postfix(index: Index, positions: Mapping[str, int]) -> tuple[int, ...]:
    """The executor's postfix program; `positions` numbers the symbols as the values are handed to `NativePlan.run`.

    Raises:
        UnsupportedError: a symbol without position, or an expression too deep for the executor's stack.
    """
    code: list[int] = []
    deepest = 0

    def emit(item: Index, height: int) -> None:
        nonlocal deepest
        deepest = max(deepest, height + 1)
        if isinstance(item, int):
            code.extend((native.PUSH, item))
        elif isinstance(item, str):
            if item not in positions:
                raise UnsupportedError(f"the size {item} has no value when the step starts")
            code.extend((native.SYMBOL, positions[item]))
        else:
            emit(item.left, height)
            emit(item.right, height + 1)
            code.append(_OPCODES[item.operator])

    emit(index, 0)
    if deepest > EXECUTOR_STACK:
        raise UnsupportedError("an index expression is too deep for the executor")
    return tuple(code)
