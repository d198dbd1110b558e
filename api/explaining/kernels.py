"""The kernels of a program, for reports."""

from __future__ import annotations

from collections import Counter

from llmopt.codegen.program import KernelCall, Program
from llmopt.compiler.report import KernelUse
from llmopt.runtime.executable import kernel_source


def kernel_uses(program: Program) -> list[KernelUse]:
    """Every kernel with its source, the op that it first computes, and the number of its calls."""
    calls = [step for step in program.steps if isinstance(step, KernelCall)]
    count = Counter(call.kernel for call in calls)
    origin = {call.kernel: call.origin for call in reversed(calls)}
    return [
        KernelUse(
            spec.template,
            ", ".join(spec.arguments).replace("llmopt::", ""),
            origin.get(number, ""),
            count[number],
            kernel_source(spec, program.batch_invariant, program.target),
            spec.loop.name if spec.loop is not None and spec.product is not None else "",
        )
        for number, spec in enumerate(program.kernels)
    ]
