"""How fast a call could be: the roofline model (Williams et al., 2009) over costs in symbolic sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from llmopt.compiler.errors import OptionError
from llmopt.compiler.report import Details, GraphReport, Limits


@functools.lru_cache(maxsize=4096)
def _evaluate(expression: sympy.Expr, sizes: tuple[tuple[str, int], ...]) -> float:
    values = dict(sizes)
    found = expression.xreplace({s: sympy.Integer(values[s.name]) for s in expression.free_symbols})
    return float(found)


def evaluate(expression: sympy.Expr, sizes: Mapping[str, int]) -> float:
    """The value of an expression whose symbols have the given names; OptionError names one without a value."""
    for symbol in expression.free_symbols:
        if symbol.name not in sizes:
            raise OptionError("sizes", dict(sizes), f"a whole number for {symbol.name}, too")
    return _evaluate(expression, tuple(sorted(sizes.items())))


@dataclass(frozen=True)
class CallTime:
    """One call at stated sizes: work, least seconds on the machine (None without its limits), measured seconds.

    bound: which limit predicts the time, "memory" or "compute".
    """

    flops: float
    bytes_read: float
    bytes_written: float
    predicted: float | None = None
    bound: str = ""
    measured: float | None = None


def check_sizes(details: Details, sizes: Mapping[str, int]) -> dict[str, int]:
    """A value for every symbol of a graph; OptionError for a name that the graph does not have, or a bad value."""
    for name, size in sizes.items():
        if name not in details.symbols:
            raise OptionError("sizes", name, sorted(details.symbols))
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise OptionError(name, size, "a whole number, 1 or more")
    return details.sizes(sizes)


def call_times(graph: GraphReport, sizes: Mapping[str, int] | None = None) -> list[CallTime]:
    """Every step of a graph's program at `sizes`: those of the measurement, else the hints, where they say nothing."""
    details, timing = graph.details, graph.timing
    if details is None:
        return []
    at = details.sizes(timing.sizes if timing is not None and sizes is None else sizes)
    limits = timing.limits if timing is not None else None
    found = []
    for number, call in enumerate(details.calls):
        cost = call.cost
        flops, read, written = (evaluate(e, at) for e in (cost.flops, cost.bytes_read, cost.bytes_written))
        predicted, bound = None, ""
        if limits is not None:
            arguments = graph.kernels[call.kernel].arguments if call.kernel is not None else ""
            predicted, bound = least_seconds(limits, flops, read + written, "bf16" in arguments)
        seconds = timing.seconds[number] if timing is not None else None
        found.append(CallTime(flops, read, written, predicted, bound, seconds))
    return found


def least_seconds(limits: Limits, flops: float, moved: float, half: bool) -> tuple[float, str]:
    """(seconds, which limit): the slower of moving the bytes and doing the operations."""
    peak = limits.gflop_s.get("bfloat16" if half else "float32", limits.gflop_s["float32"])
    memory, compute = moved / limits.read_gb_s / 1e9, flops / peak / 1e9
    return (memory, "memory") if memory >= compute else (compute, "compute")


def kernel_times(graph: GraphReport, sizes: Mapping[str, int] | None = None) -> dict[int | None, CallTime]:
    """The sum over all calls of each kernel; key None holds what runs on ATen."""
    details = graph.details
    if details is None:
        return {}
    sums: dict[int | None, CallTime] = {}
    for call, time in zip(details.calls, call_times(graph, sizes), strict=True):
        sums[call.kernel] = total([sums[call.kernel], time]) if call.kernel in sums else time
    return sums


def total(times: list[CallTime]) -> CallTime:
    """Several calls, one after the other."""
    add = lambda values: None if None in values else sum(values)  # noqa: E731
    bounds = [t.bound for t in sorted(times, key=lambda t: t.predicted or 0.0)]
    return CallTime(
        sum(t.flops for t in times),
        sum(t.bytes_read for t in times),
        sum(t.bytes_written for t in times),
        add([t.predicted for t in times]),
        bounds[-1] if bounds else "",
        add([t.measured for t in times]),
    )
