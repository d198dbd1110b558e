"""Fused loops: groups of pointwise ops and reductions of a graph, as a typed IR that prints as C++ or Triton.

`plan_loops` divides a graph, `print_kernel` prints a kernel of the plan, `kernel_to_json` and `kernel_from_json` carry
one through a file.
"""

from __future__ import annotations

from llmopt.codegen.loops.group import LoopGroup, LoopPlan, plan_loops
from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.loops.print_cpp import print_kernel
from llmopt.codegen.loops.serialize import kernel_from_json, kernel_to_json
from llmopt.codegen.loops.views import base_of, is_alias

__all__ = [
    "LoopGroup",
    "LoopKernel",
    "LoopPlan",
    "base_of",
    "is_alias",
    "kernel_from_json",
    "kernel_to_json",
    "plan_loops",
    "print_kernel",
]
