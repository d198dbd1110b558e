"""C++ kernels that users have registered for ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx.node import Node

from llmopt.codegen.cpu.templates import FLOATS, HEADERS, PLANNERS, REGISTERED_SOURCES, Plan, PlannedCall
from llmopt.codegen.layout import layout
from llmopt.codegen.program import KernelSpec
from llmopt.compiler.errors import InputError


@dataclass(frozen=True)
class _Registered:
    template: str
    plan: Callable[[Node], Plan]


# The kernels that are registered for each op; the last one computes it.
_REGISTERED: dict[Any, list[_Registered]] = {}
# What computes such an op without them, None for loops or ATen.
_BUILT_IN: dict[Any, Callable[[Node], Plan | None] | None] = {}
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

    The latest kernel that is registered for an op computes it; one of the same name is replaced. Raises InputError for
    a template name that is not lower case with underscores, or belongs to a kernel of llmopt or of another op.
    """
    if not _NAME.fullmatch(template):
        raise InputError(f"a template's name is lower case with underscores, got {template!r}")
    if template in HEADERS or template == "loop":
        raise InputError(f"{template!r} is a kernel of llmopt; choose another name")
    if not callable(plan):
        raise InputError(f"plan takes a node and returns calls or a reason, got {plan!r}")
    owner = next((o for o, kernels in _REGISTERED.items() if any(k.template == template for k in kernels)), op)
    if owner is not op:
        raise InputError(f"{template!r} is registered for {owner}; choose another name")
    if op not in _BUILT_IN:
        _BUILT_IN[op] = PLANNERS.get(op)
    REGISTERED_SOURCES[template] = source
    others = [k for k in _REGISTERED.get(op, []) if k.template != template]
    _REGISTERED[op] = [*others, _Registered(template, plan)]
    PLANNERS[op] = plan


def unregister_kernel(op: Any, template: str) -> None:
    """Takes a registered kernel out again: the latest other one of the op computes it then, or what did before all.

    Raises InputError if the op has none of this name.
    """
    kernels = _REGISTERED.get(op, [])
    left = [k for k in kernels if k.template != template]
    if len(left) == len(kernels):
        raise InputError(f"no kernel of {op} is named {template!r}: {[k.template for k in kernels]}")
    del REGISTERED_SOURCES[template]
    if left:
        _REGISTERED[op] = left
        PLANNERS[op] = left[-1].plan
        return
    del _REGISTERED[op], PLANNERS[op]
    built_in = _BUILT_IN.pop(op)
    if built_in is not None:
        PLANNERS[op] = built_in


__all__ = ["FLOATS", "KernelSpec", "Plan", "PlannedCall", "layout", "register_kernel", "unregister_kernel"]
