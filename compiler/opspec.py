"""What it takes to be an op of llmopt: schema, meaning, cost, samples and tolerances, all declared in one place.

The reference is plain PyTorch. It is the oracle of every kernel's test, the shape function, and the fallback on any
device, so an op without a kernel still works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from llmopt.compiler.errors import InputError, VerificationError
from llmopt.compiler.graph import may_equal, to_expr

LIBRARY = torch.library.Library("llmopt", "DEF")


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted |kernel - reference| as atol + rtol * |reference|, with the reason for the numbers."""

    rtol: float
    atol: float
    reason: str


@dataclass(frozen=True)
class Cost:
    """Work of one call in symbolic sizes: floating-point operations, bytes read, bytes written."""

    flops: sympy.Expr
    bytes_read: sympy.Expr
    bytes_written: sympy.Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Cost:
        """The cost over other symbols."""
        return Cost(
            *(sympy.Integer(0) + part.xreplace(names) for part in (self.flops, self.bytes_read, self.bytes_written))
        )


# PyTorch's own defaults of assert_close; an op names others only with a reason.
_ROUNDING = "one rounding to the storage type, as torch.testing.assert_close assumes"
DEFAULT_TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1.3e-6, 1e-5, _ROUNDING),
    torch.bfloat16: Tolerance(1.6e-2, 1e-5, _ROUNDING),
    torch.float16: Tolerance(1e-3, 1e-5, _ROUNDING),
    torch.float64: Tolerance(1e-12, 1e-12, _ROUNDING),
}

# Sums over K terms in another order than the reference's: the error grows with the square root of K, and a low
# precision result may land on the neighbouring value.
SUM_ORDER = {
    torch.float32: Tolerance(1e-5, 2e-5, "float32 sums of up to 300 terms in another order"),
    torch.bfloat16: Tolerance(1.6e-2, 1e-2, "sums of up to 300 terms, then one bf16 rounding of cancelled results"),
    torch.float16: Tolerance(2e-3, 2e-3, "sums of up to 300 terms, then one fp16 rounding of cancelled results"),
}


@dataclass(frozen=True)
class OpSpec:
    """One op of the vocabulary.

    reference: the meaning in plain PyTorch, with the op's schema.
    cost: takes the op's (fake) arguments and gives its Cost.
    samples: yields argument tuples of one dtype on fresh random data, odd sizes included.
    tolerances: by dtype, for kernels against the reference.
    row_local: whether each position along the leading dimensions of the first operand is computed by itself, so that
        the op may stand in a step program.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Callable[[torch.dtype, torch.Generator], Iterator[tuple[Any, ...]]]
    tolerances: dict[torch.dtype, Tolerance]
    row_local: bool = False

    @property
    def overload(self) -> Any:
        """The op as it stands in graphs: `torch.ops.llmopt.<name>.default`."""
        return getattr(torch.ops.llmopt, self.name).default


OPS: dict[str, OpSpec] = {}


def register_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    samples: Callable[[torch.dtype, torch.Generator], Iterator[tuple[Any, ...]]],
    tolerances: dict[torch.dtype, Tolerance] | None = None,
    row_local: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares `llmopt::<schema>` with the decorated function as its reference; `fake` gives shapes and dtypes.

    `fake` raises VerificationError for operands whose sizes do not fit one another (`check_sizes`).
    The other arguments are the fields of `OpSpec`. Raises InputError for a name that is taken.
    """
    name = schema.partition("(")[0].strip()
    if name in OPS:
        raise InputError(f"llmopt::{name} is declared already: {OPS[name].schema}")

    def decorate(reference: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmopt::{name}", fake, lib=LIBRARY)
        accepted = {**DEFAULT_TOLERANCES, **(tolerances or {})}
        OPS[name] = OpSpec(name, schema, reference, cost, samples, accepted, row_local)
        return reference

    return decorate


def spec_of(target: object) -> OpSpec | None:
    """The OpSpec of a graph node's target, or None if it is not an llmopt op."""
    name = str(target)
    return OPS.get(name.split(".")[1]) if name.startswith("llmopt.") else None


def check_sizes(op: str, operand: str, given: torch.Tensor | None, expected: Sequence[Any]) -> None:
    """Raises VerificationError where an operand has not the sizes that its op asks for; None is no operand.

    For the `fake` of an op, through which every call in a graph goes: a kernel reads as far as the other operands say,
    so what eager mode would broadcast ends in memory of somebody else.
    """
    if given is None:
        return
    if given.ndim != len(expected) or not all(map(may_equal, given.shape, expected)):
        raise VerificationError(f"llmopt::{op}: {operand} is {list(given.shape)}, not {list(expected)}")


def numel(tensor: torch.Tensor) -> sympy.Expr:
    """Number of elements as a sympy expression."""
    total: sympy.Expr = sympy.Integer(1)
    for size in tensor.shape:
        total = total * to_expr(size)
    return total


def nbytes(*tensors: torch.Tensor | None) -> sympy.Expr:
    """Bytes of all given tensors together."""
    return sum((numel(t) * t.element_size() for t in tensors if t is not None), sympy.Integer(0))
