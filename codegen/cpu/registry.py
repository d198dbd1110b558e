"""C++ kernels that users have registered for ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch.fx.node import Node

from llmopt.codegen.cpu.templates import FLOATS, HEADERS, PLANNERS, REGISTERED_SOURCES, Plan, PlannedCall
from llmopt.codegen.layout import layout
from llmopt.codegen.program import KernelSpec
from llmopt.compiler.errors import InputError

# What computed an op before a kernel was registered for it, None for loops or ATen.
_EARLIER: dict[Any, Callable[[Node], Plan | None] | None] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}", re.ASCII)


def register_kernel(op: Any, template: str, source: str, plan: Callable[[Node], Plan]) -> None:
    """Lets a C++ template of your own compute an op.

    Args:
        op: the op as it stands in graphs, such as `torch.ops.llmopt.my_op.default`.
        template: name of a function template in namespace llmopt, `template <class T> void name(const Args&,
            const Worker&)`, or of a function.
        source: C++17 text that defines it. It may include the headers of `codegen/cpu/kernels`.
        plan: takes the graph node and returns the kernel calls (`PlannedCall`), or the reason why the kernel cannot
            take this one; then a fused loop or ATen computes it and `explain` shows the reason.

    A kernel that is registered again for the same op replaces the earlier one. Raises InputError for a template name
    that is not lower case with underscores or belongs to a kernel of llmopt.
    """
    if not _NAME.fullmatch(template):
        raise InputError(f"a template's name is lower case with underscores, got {template!r}")
    if template in HEADERS or template == "loop":
        raise InputError(f"{template!r} is a kernel of llmopt; choose another name")
    if not callable(plan):
        raise InputError(f"plan takes a node and returns calls or a reason, got {plan!r}")
    if op not in _EARLIER:
        _EARLIER[op] = PLANNERS.get(op)
    REGISTERED_SOURCES[template] = source
    PLANNERS[op] = plan


def unregister_kernel(op: Any, template: str) -> None:
    """Takes a registered kernel out again: what computed the op before does so from now on.

    Raises InputError if there is none of this name.
    """
    if template not in REGISTERED_SOURCES:
        raise InputError(f"no registered kernel is named {template!r}: {sorted(REGISTERED_SOURCES)}")
    del REGISTERED_SOURCES[template]
    PLANNERS.pop(op, None)
    earlier = _EARLIER.pop(op, None)
    if earlier is not None:
        PLANNERS[op] = earlier


__all__ = ["FLOATS", "KernelSpec", "Plan", "PlannedCall", "layout", "register_kernel", "unregister_kernel"]
