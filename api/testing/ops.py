"""Checks an op of the vocabulary, or one of your own, against its reference."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import sympy
import torch

from llmopt.codegen.lower import Lowered, lower
from llmopt.compiler.errors import InputError, VerificationError
from llmopt.compiler.opspec import OPS, OpSpec
from llmopt.runtime.compiled import CompiledGraph
from llmopt.testing.graphs import one_op_graph

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_op(spec: OpSpec, sample: tuple[Any, ...], threads: int = 2) -> tuple[list[torch.Tensor], Lowered]:
    """What the compiled op returns on `sample` (writing to what it mutates), and how it was lowered."""
    graph, tensors = one_op_graph(spec, sample)
    lowered = lower(graph)
    return list(CompiledGraph(lowered.program, graph, lowered.weights, (), threads)(tensors)), lowered


def _spec(op: str | OpSpec) -> OpSpec:
    if isinstance(op, OpSpec):
        return op
    if op not in OPS:
        raise InputError(f"no op is named {op!r}; there are {sorted(OPS)}")
    return OPS[op]


def check_op(
    op: str | OpSpec,
    dtypes: Iterable[torch.dtype] = DTYPES,
    *,
    seed: int = 0,
    threads: Iterable[int] = (1, 2),
    kernel: str | None = None,
) -> int:
    """Runs the compiled op on all of its samples and compares it with its reference; the number of comparisons.

    Also checked: `fake` gives the shape and dtype that the reference gives, and the cost is a number of operations and
    bytes that is not negative.

    Args:
        op: its name without `llmopt::`, or its OpSpec.
        dtypes, threads: all combinations are tried.
        kernel: the template that must have computed every sample; None for whatever does (a loop, or ATen).

    Raises VerificationError, naming op, sample and dtype, for the first difference beyond the op's tolerance.
    """
    spec, count = _spec(op), 0
    for dtype in dtypes:
        tolerance = spec.tolerances[dtype]
        samples = list(spec.samples(dtype, torch.Generator().manual_seed(seed)))
        for number, sample in enumerate(samples):
            where = f"llmopt::{spec.name}, sample {number} in {dtype}"
            expected = _tensors(spec.reference(*copy.deepcopy(sample)))
            _check_cost(spec, sample, where)
            for workers in threads:
                given = copy.deepcopy(sample)
                results, lowered = run_op(spec, given, workers)
                used = [item.template for item in lowered.program.kernels]
                if kernel is not None and kernel not in used:
                    reasons = [*lowered.selection.rejected.values(), *lowered.selection.fallbacks.values()]
                    raise VerificationError(f"{where}: computed by {used or 'ATen'}, not by {kernel}: {reasons}")
                for index, (got, want) in enumerate(zip(results, expected, strict=True)):
                    if got.shape != want.shape or got.dtype != want.dtype:
                        raise VerificationError(
                            f"{where}: result {index} is {got.dtype}{list(got.shape)}, the reference gives "
                            f"{want.dtype}{list(want.shape)}"
                        )
                    try:
                        torch.testing.assert_close(got, want, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)
                    except AssertionError as error:
                        raise VerificationError(f"{where}, {workers} threads, result {index}: {error}") from None
                    count += 1
    return count


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _check_cost(spec: OpSpec, sample: tuple[Any, ...], where: str) -> None:
    for name, part in vars(spec.cost(*sample)).items():
        value = sympy.Integer(0) + part
        if value.is_number and value < 0:
            raise VerificationError(f"{where}: its cost has {name} = {value}")
