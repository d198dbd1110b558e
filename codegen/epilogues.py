"""Moves fused loops into the products that they follow: after selection, where a product has one reader and it fits.

Before: a product is stored, and a loop reads it to add a residual, scale, activate or convert it.
After: one kernel, which computes the loop on the product's entries while they are in the cache, rounded to the
product's type as if they had been stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.cpu.templates import EPILOGUES, PlannedCall
from llmopt.codegen.layout import layout
from llmopt.codegen.loops.epilogue import as_epilogue, covers
from llmopt.codegen.loops.group import LoopGroup
from llmopt.codegen.program import KernelSpec
from llmopt.codegen.triton.products import SEGMENTS as GPU_SEGMENTS
from llmopt.compiler.graph import is_tensor, outputs, tensor, view_base

Templates = Mapping[Node, Sequence[PlannedCall]]


@dataclass(frozen=True)
class Attached:
    """A loop that has become an epilogue: `call` computes `product` and then the loop, and stands for both."""

    product: Node
    loop: LoopGroup
    call: PlannedCall

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that the call computes, in graph order."""
        return (self.product, *self.loop.nodes)


@dataclass
class Epilogues:
    """Which loops became epilogues, which stay, and in `rejected` by their last node why those behind a product do."""

    attached: list[Attached] = field(default_factory=list)
    loops: list[LoopGroup] = field(default_factory=list)
    rejected: dict[Node, str] = field(default_factory=dict)


def plan_epilogues(
    graph: fx.Graph, templates: Templates, loops: Sequence[LoopGroup], fallbacks: Iterable[Node]
) -> Epilogues:
    """Chooses loops that a product computes. Several products of one loop: the last, at which the others are there."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    readers = _readers(graph, templates, loops, fallbacks)
    plan = Epilogues()
    for group in loops:
        reasons = []
        for product in sorted(_products(group, templates), key=position.__getitem__, reverse=True):
            call = _fused(group, product, templates[product][0], readers[product])
            if isinstance(call, PlannedCall):
                plan.attached.append(Attached(product, group, call))
                break
            reasons.append(call)
        else:
            plan.loops.append(group)
            if reasons:
                plan.rejected[group.nodes[-1]] = f"no epilogue of the product before it: {reasons[0]}"
    return plan


def _products(group: LoopGroup, templates: Templates) -> list[Node]:
    """The inputs of a loop that are computed by one call of a template with room for an epilogue."""
    return [
        node
        for node in group.inputs
        if len(calls := templates.get(node, ())) == 1 and calls[0].kernel.template in EPILOGUES
    ]


def _readers(
    graph: fx.Graph, templates: Templates, loops: Sequence[LoopGroup], fallbacks: Iterable[Node]
) -> dict[Node, set[object]]:
    """Who reads each value from memory: calls, loops, and what leaves the graph."""
    found: dict[Node, set[object]] = defaultdict(set)

    def reads(reader: object, nodes: Iterable[object]) -> None:
        for node in nodes:
            if isinstance(node, Node) and is_tensor(node):
                found[view_base(node)].add(reader)

    reads("results", outputs(graph))
    for node, calls in templates.items():
        for call in calls:
            reads(node, (n for n in call.tensors if n not in call.writes))
    for group in loops:
        reads(group, group.inputs)
    for node in fallbacks:
        reads(node, node.all_input_nodes)
    return found


def _fused(group: LoopGroup, product: Node, call: PlannedCall, readers: set[object]) -> PlannedCall | str:
    """The product's call with the loop behind it, or why the loop stays one of its own."""
    if readers != {group}:
        return "the product is read elsewhere, too"
    if tensor(product).is_cuda and len(call.ints) > 5 + GPU_SEGMENTS:
        return f"a GPU kernel takes {GPU_SEGMENTS} weights at once"
    shape = layout(product)
    columns = shape.sizes[-1]
    if not shape.is_contiguous or not columns.is_Integer:
        return "the product is not dense, or of symbolic width"
    epilogue = as_epilogue(group.kernel, group.inputs.index(product), int(columns))
    if isinstance(epilogue, str):
        return epilogue
    operands = (*(node for node in group.inputs if node is not product), *group.outputs)
    if any(view_base(node) is product for node in operands):
        return "a view of the product is read as it lies in memory"
    x, _, *weights = call.tensors
    rows, k, x_stride, _, *segments = call.ints
    if not covers(epilogue, group.symbols, rows):
        return "the loop covers only some rows of the product"
    numbers = (*group.symbols, rows, k, x_stride, sympy.Integer(0), *segments)
    return PlannedCall(
        KernelSpec(call.kernel.template, call.kernel.arguments, epilogue),
        (*operands, x, None, *weights),
        numbers,
        call.floats,
        group.outputs,
        (product, *group.nodes[:-1]),
    )
