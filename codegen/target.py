"""The machines that code is generated for: whose templates plan a node, decided by the device of its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.cpu import templates as cpu
from llmopt.codegen.cpu.templates import Plan
from llmopt.codegen.triton import templates as cuda
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import is_tensor, location


@dataclass(frozen=True)
class Target:
    """One kind of machine; `name` is PyTorch's device type, and the target of programs made for it."""

    name: str
    plan_template: Callable[[Node], Plan | None]


CPU = Target("cpu", cpu.plan_template)
CUDA = Target("cuda", cuda.plan_template)
TARGETS: dict[str, Target] = {target.name: target for target in (CPU, CUDA)}


def _device_types(value: Any) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item.device.type for item in items if isinstance(item, torch.Tensor)]


def plan_template(node: Node) -> Plan | None:
    """The kernel calls that compute a node where its value lies, the reason why not, or None without a template."""
    kinds = _device_types(node.meta.get("val"))
    return TARGETS[kinds[0]].plan_template(node) if kinds and kinds[0] in TARGETS else None


def target_of(graph: fx.Graph) -> Target:
    """The target that all tensors of a graph lie on.

    Raises UnsupportedError where they lie on different ones, or on a device that no code is generated for.
    """
    chosen = CPU
    seen = False
    for node in graph.nodes:
        for kind in _device_types(node.meta.get("val")):
            if kind not in TARGETS:
                raise UnsupportedError(
                    f"device {kind} is not supported; llmopt generates code for: {', '.join(TARGETS)}"
                )
            if seen and TARGETS[kind] is not chosen:
                where = location(node) if is_tensor(node) else None
                reason = f"{node.name} lies on {kind}, other tensors on {chosen.name}"
                raise UnsupportedError(reason, operation=str(node.target), location=where)
            chosen, seen = TARGETS[kind], True
    return chosen
