"""Takes ops apart that no kernel computes whole: before selection, and only there.

The passes see graphs in which ops are as large as the model wrote them. What is left of those when kernels are chosen
is rewritten in terms of smaller ops: as PyTorch itself defines them, by its decompositions, or as below.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.node import Node

from llmopt.codegen.loops.emit import DTYPE_NAMES
from llmopt.codegen.loops.operations import OPERATIONS
from llmopt.codegen.loops.views import SPLITS, transform_of
from llmopt.codegen.target import plan_template
from llmopt.compiler.decompose import composite, expand_op
from llmopt.compiler.graph import Rewriter, aten, is_op, is_tensor, same_shape, same_size, tensor


def decompose(graph: fx.Graph) -> None:
    """Before: an op that neither a template nor a loop computes. After: ops that they do compute.

    An op that ATen has a kernel for is taken apart only where every part is computed here: calling it whole is faster
    than calling its parts.
    """
    rewriter = Rewriter(graph)
    waiting = [node for node in graph.nodes if node.op == "call_function"]
    while waiting:
        node = waiting.pop()
        if node._erased or is_computed(node):
            continue
        made = _expand(rewriter, node)
        if made:
            waiting += made
    graph.eliminate_dead_code()


def is_computed(node: Node) -> bool:
    """Whether a kernel computes `node`, or nothing has to."""
    value = node.meta.get("val")
    if not is_tensor(node):
        return node.target in SPLITS or not isinstance(value, list | tuple) or isinstance(plan_template(node), list)
    if is_op(node, operator.getitem) or transform_of(node) is not None:
        return True
    plan = plan_template(node)
    if isinstance(plan, list):
        return True
    return node.target in OPERATIONS and all(tensor(n).dtype in DTYPE_NAMES for n in (node, *_tensors(node)))


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _expand(rewriter: Rewriter, node: Node) -> list[Node]:
    """Replaces `node` by its parts and returns those; an empty list where it stays as it is."""
    target: Any = node.target
    parts = composite(target)
    function = parts or _OWN.get(target) or decomposition_table.get(target)
    if function is None:
        return []
    before = set(node.graph.nodes)
    with rewriter.before(node):
        result = expand_op(rewriter, node, function)
        if result is not None and not _lie_alike(tensor(result), tensor(node)):
            # Views of the node look at its memory as it lay.
            result = rewriter.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    made = [n for n in node.graph.nodes if n not in before]
    if result is None or not same_result(result, node) or (parts is None and not all(map(is_computed, made))):
        for item in reversed(made):
            rewriter.erase(item)
        return []
    rewriter.replace(node, result)
    return made


def same_result(new: Node, old: Node) -> bool:
    """Whether two nodes agree in dtype, shape and strides, so that one can stand for the other."""
    a, b = tensor(new), tensor(old)
    return a.dtype == b.dtype and same_shape(a.shape, b.shape) and _lie_alike(a, b)


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether strides agree, where they matter."""
    if a.ndim != b.ndim:
        return False
    triples = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all((isinstance(size, int) and size == 1) or same_size(one, other) for size, one, other in triples)


def _cumsum(x: torch.Tensor, dim: int, **kwargs: Any) -> torch.Tensor:
    """Along the last dimension, which is what the kernel does."""
    return torch.cumsum(x.movedim(dim, -1).contiguous(), -1, **kwargs).movedim(-1, dim)


_OWN: dict[Any, Callable[..., Any]] = {aten.cumsum.default: _cumsum}

__all__ = ["decompose", "is_computed"]
