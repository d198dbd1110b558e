"""Which values share memory: what a caller who writes to a result would reach."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from llmopt.compiler.decompose import composite
from llmopt.compiler.graph import VIEW_OPS, aten, fake_call, fake_mode, is_op, is_tensor, reachable, tensor


def memory_of(x: torch.Tensor) -> int:
    """What is equal for two tensors, or two fakes, exactly where they share memory."""
    return int(x.untyped_storage()._cdata)


def may_alias(node: Node) -> bool:
    """Whether a call's result may lie in the memory of an argument: where its schema says so, or nothing says no."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target in VIEW_OPS or any(a.alias_info is not None for a in schema.arguments):
        return True
    # Ops made of others promise memory of their own and may yet pass an argument on: type_as, einsum, dropout.
    return composite(node.target) is not None and _passes_on(node)


def _passes_on(node: Node) -> bool:
    given = {memory_of(tensor(n)) for n in node.all_input_nodes if is_tensor(n)}
    made = fake_call(fake_mode(node.graph), node.target, node.args, node.kwargs)
    results = made if isinstance(made, list | tuple) else [made]
    return any(memory_of(item) in given for item in results if isinstance(item, torch.Tensor))


def escapes(node: Node) -> bool:
    """Whether somebody sees a node's memory itself: the caller, or an `as_strided`, which reads it as it lies.

    Such a value may not become an alias of another where it is none in eager mode: the caller may write to it.
    """
    views = lambda n: [u for u in n.users if u.op == "call_function" and may_alias(u)]  # noqa: E731
    looks = lambda u: u.op == "output" or is_op(u, aten.as_strided.default)  # noqa: E731
    return any(looks(user) for n in reachable([node], views) for user in n.users)


__all__ = ["escapes", "may_alias", "memory_of"]
