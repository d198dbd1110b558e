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


def _devices(value: Any) -> list[torch.device]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item.device for item in items if isinstance(item, torch.Tensor)]


def plan_template(node: Node) -> Plan | None:
    """The kernel calls that compute a node where its value lies, the reason why not, or None without a template."""
    devices = _devices(node.meta.get("val"))
    return TARGETS[devices[0].type].plan_template(node) if devices and devices[0].type in TARGETS else None


def device_of(graph: fx.Graph) -> torch.device:
    """The device that all tensors of a graph lie on; the CPU for a graph without any.

    Raises UnsupportedError where they lie on different ones, or on one that no code is generated for.
    """
    chosen: torch.device | None = None
    for node in graph.nodes:
        for device in _devices(node.meta.get("val")):
            if device.type not in TARGETS:
                raise UnsupportedError(
                    f"device {device} is not supported; llmopt generates code for: {', '.join(TARGETS)}"
                )
            if chosen is not None and device != chosen:
                where = location(node) if is_tensor(node) else None
                reason = f"{node.name} lies on {device}, other tensors on {chosen}"
                raise UnsupportedError(reason, operation=str(node.target), location=where)
            chosen = device
    return chosen or torch.device("cpu")


def target_of(graph: fx.Graph) -> Target:
    """The target of the device that all tensors of a graph lie on; raises as `device_of`."""
    return TARGETS[device_of(graph).type]
