"""Copies of operands whose memory layout a kernel template does not take: before selection, and only there."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.layout import layout
from llmopt.codegen.target import plan_template
from llmopt.compiler.graph import Rewriter, fake_call, is_tensor, refresh_values

aten = torch.ops.aten


def densify(graph: fx.Graph) -> None:
    """Before: a template rejects a node for the strides of an operand. After: it reads a dense copy.

    Operands are copied one after the other until the template takes the node; if it never does, the node is left as it
    was. What an op writes to is never copied.
    """
    rewriter = Rewriter(graph)
    changed = False
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(plan_template(node), str):
            changed |= _densify_operands(rewriter, node)
    if changed:
        refresh_values(graph)


def _densify_operands(rewriter: Rewriter, node: Node) -> bool:
    before = node.args, node.meta["val"]
    for operand in _copyable(node):
        with rewriter.before(node):
            copy = rewriter.call(aten.clone.default, operand, memory_format=torch.contiguous_format)
        node.replace_input_with(operand, copy)
        node.meta["val"] = fake_call(rewriter.mode, node.target, node.args, node.kwargs)
        if not isinstance(plan_template(node), str):
            return True
    copies = [n for n in node.all_input_nodes if n not in fx_nodes(before[0])]
    node.args, node.meta["val"] = before
    for copy in copies:
        rewriter.erase(copy)
    return False


def fx_nodes(args: object) -> set[Node]:
    """All nodes in nested arguments."""
    found: set[Node] = set()
    fx.node.map_arg(args, found.add)
    return found


def _copyable(node: Node) -> list[Node]:
    """Operands that are not dense, in order, without those that the op writes to."""
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments if schema is not None else []
    written: set[Node] = set()
    for argument, value in zip(arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= fx_nodes(value)
    operands = [n for n in node.all_input_nodes if is_tensor(n) and n not in written]
    return [n for n in operands if not layout(n).is_contiguous]
