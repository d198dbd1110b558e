"""Decides for every node of a graph what computes it: weights at bind time, a template, a fused loop, or ATen."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.cpu.templates import PlannedCall
from llmopt.codegen.epilogues import Attached, plan_epilogues
from llmopt.codegen.loops.group import LoopGroup, plan_loops
from llmopt.codegen.target import plan_template
from llmopt.compiler.aliasing import escapes
from llmopt.compiler.graph import aten, is_op, is_tensor, is_view, outputs, placeholders, tensor, to_expr, view_base
from llmopt.compiler.verify import Binding, check_bindings


@dataclass
class Selection:
    """Who computes what.

    constants: nodes that depend on weights alone; they are evaluated when weights are bound.
    templates: the kernel calls of each node that a template takes.
    absorbed: nodes that a template computes on the way to another node's value.
    loops: fused loops over the remaining nodes.
    epilogues: loops that a template's call computes together with the product before them.
    fallbacks: nodes left to ATen, with the reason.
    rejected: why a template did not take a node that something else computes now.
    """

    constants: set[Node] = field(default_factory=set)
    templates: dict[Node, list[PlannedCall]] = field(default_factory=dict)
    absorbed: set[Node] = field(default_factory=set)
    loops: list[LoopGroup] = field(default_factory=list)
    epilogues: list[Attached] = field(default_factory=list)
    fallbacks: dict[Node, str] = field(default_factory=dict)
    rejected: dict[Node, str] = field(default_factory=dict)

    def bindings(self) -> list[Binding]:
        """Who writes and reads which values, for the verifier."""
        found = []
        for node, calls in self.templates.items():
            writes = tuple(view_base(n) for call in calls for n in call.writes)
            operands = (n for call in calls for n in call.tensors if isinstance(n, Node))
            reads = tuple(n for n in operands if view_base(n) not in writes)
            found.append(Binding(f"the template of {node.target}", writes, reads))
        found += [
            Binding(f"the loop of {group.nodes[-1].name}", tuple(map(view_base, group.outputs)), group.inputs)
            for group in self.loops
        ]
        for node, reason in self.fallbacks.items():
            parts = (node,) if is_tensor(node) else tuple(u for u in node.users if is_op(u, operator.getitem))
            found.append(Binding("ATen", parts, tuple(filter(is_tensor, node.all_input_nodes)), reason))
        return found


def weight_only(graph: fx.Graph) -> set[Node]:
    """Weights, and the nodes computed from weights and constants alone whose sizes are numbers."""
    found = {n for n in placeholders(graph) if n.meta.get("weight")}
    for node in graph.nodes:
        if node.op != "call_function" or not all(n in found for n in node.all_input_nodes):
            continue
        val = node.meta["val"]
        items = val if isinstance(val, list | tuple) else [val]
        if not all(isinstance(item, torch.Tensor) and not _symbols(item) for item in items):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if is_op(node, aten.clone.default) and escapes(node):  # the caller's own, to write to: another one at each call
            continue
        found.add(node)
    return found


def _symbols(val: torch.Tensor) -> set[Any]:
    return {s for size in val.shape for s in to_expr(size).free_symbols}


def select_kernels(graph: fx.Graph) -> Selection:
    """Binds every computing node of `graph`."""
    selection = Selection(constants=weight_only(graph))
    unplanned: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in selection.constants or is_view(node):
            continue
        plan = plan_template(node)
        if isinstance(plan, str):
            unplanned[node] = plan
        elif plan is not None:
            selection.templates[node] = plan
    selection.absorbed = {n for calls in selection.templates.values() for call in calls for n in call.absorbs}
    for node in selection.absorbed:
        del selection.templates[node]
    computed = selection.templates.keys() | selection.absorbed | selection.constants
    results = [n for n in outputs(graph) if isinstance(n, Node)]
    loops = plan_loops(graph, computed.__contains__, results)
    for node, reason in loops.rejected.items():
        if is_tensor(node) or isinstance(node.meta.get("val"), list | tuple):
            selection.fallbacks[node] = unplanned.get(node, reason)
    selection.rejected = {n: r for n, r in unplanned.items() if n not in selection.fallbacks}
    _attach_epilogues(graph, selection, loops.groups)
    check_bindings(graph, selection.constants, selection.bindings())
    return selection


def _attach_epilogues(graph: fx.Graph, selection: Selection, loops: Sequence[LoopGroup]) -> None:
    plan = plan_epilogues(graph, selection.templates, loops, selection.fallbacks)
    for item in plan.attached:
        del selection.templates[item.product]
        selection.templates[item.loop.nodes[-1]] = [item.call]
        selection.absorbed.update(item.call.absorbs)
    selection.loops, selection.epilogues = plan.loops, plan.attached
    selection.rejected.update(plan.rejected)


def is_size(node: Any) -> bool:
    """Whether a node stands for a symbolic number; such nodes need no code."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.SymInt | int)


__all__ = ["Selection", "is_op", "is_size", "is_view", "select_kernels", "tensor", "weight_only"]
