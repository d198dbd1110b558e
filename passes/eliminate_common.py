"""Common subexpression elimination: equal calls on equal arguments are computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.aliasing import escapes
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport


def _key(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return ("list", *map(_key, arg))
    if isinstance(arg, dict):
        return ("dict", *sorted((k, _key(v)) for k, v in arg.items()))
    if isinstance(arg, slice):
        return ("slice", arg.start, arg.stop, arg.step)
    # 1, 1.0 and True are equal and hash alike, but mean different dtypes; so are 0.0 and -0.0.
    return (type(arg), arg, math.copysign(1, arg) if isinstance(arg, float) else None)


def _is_pure(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    if schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Before: `a = cos(x); b = cos(x); a + b`. After: `a = cos(x); a + a`.

    Random and mutating ops are left alone, and two results that the caller may write to one by one.
    """

    name = "eliminate_common"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        seen: dict[Any, Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or not _is_pure(node):
                continue
            key = (node.target, _key(node.args), _key(dict(node.kwargs)))
            first = seen.setdefault(key, node)
            if first is not node:
                if escapes(first) and escapes(node):
                    report.skipped["the caller sees both"] += 1
                    continue
                if not context.burn():
                    break
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                report.matched += 1
        return report
