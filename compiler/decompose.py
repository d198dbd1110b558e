"""Takes an op apart into the ops that PyTorch itself would compute it with, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter, is_tensor


def expand_op(rewriter: Rewriter, node: Node, function: Callable[..., Any] | None = None) -> Node | None:
    """Inserts what `function` (None: the op's own composite form) does with `node`'s arguments; its one result.

    None, and nothing inserted, where the op has no composite form or does not return one tensor. `rewriter` must stand
    at `node`.
    """
    function = function or composite(node.target)
    if function is None or not is_tensor(node):
        return None
    operands = list(node.all_input_nodes)

    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return function(*args, **kwargs)

    # Without the Python dispatcher, ops that PyTorch composes in C++ would fix symbolic sizes at their present values.
    with rewriter.mode, torch.no_grad(), enable_python_dispatcher():
        values = [n.meta["val"] for n in operands]
        traced = make_fx(run)(*values).graph
        if any(map(_writes, traced.nodes)):
            traced = make_fx(torch.func.functionalize(run, remove="mutations"))(*values).graph
    if not all(n.op in ("placeholder", "output") or _is_pure(n) for n in traced.nodes):
        return None
    made: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    for item in traced.nodes:
        if item.op == "call_function":
            args, kwargs = map_arg((item.args, item.kwargs), made.__getitem__)
            made[item] = rewriter.call(item.target, *args, **kwargs)
    (result,) = traced.output_node().args
    return made[result] if isinstance(result, Node) else None


def _is_pure(node: Node) -> bool:
    """Whether a node only computes a value; a check of one (of a singular matrix, say) returns nothing."""
    return node.op == "call_function" and node.meta.get("val") is not None and not _writes(node)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def composite(target: Any) -> Callable[..., Any] | None:
    """The op as a function of simpler ops, if PyTorch defines it so."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) or key in target.py_kernels:
        return target.decompose
    return None


__all__ = ["composite", "expand_op"]
