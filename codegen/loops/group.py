"""Divides a graph into fused loops.

Nodes that a template kernel takes (*claimed*) and nodes that nothing can lower (*rejected*) are barriers: they read and
write buffers. Of the rest, aliases are never computed, and cheap nodes that read at most one tensor are computed
wherever they are used. The others are placed into groups in graph order, each into the group of its producers where
the iteration space is the same.

A group runs where its last node stands. A node joins a group only if everything else that reads the group comes later
than the node, so the groups in order of their last nodes, between the claimed nodes in graph order, are a schedule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, Node

from llmopt.codegen.loops.emit import DTYPE_NAMES
from llmopt.codegen.loops.gathers import gathered_source
from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.loops.lower import lower_outputs
from llmopt.codegen.loops.operations import CHEAP, CREATIONS, OPERATIONS
from llmopt.codegen.loops.reductions import REDUCTIONS, reduction_dims
from llmopt.codegen.loops.symbolic import Expr, Unlowerable, product, same
from llmopt.codegen.loops.views import (
    SPLITS,
    base_of,
    bound_arguments,
    is_alias,
    shape,
    transform_of,
    view_source,
)

aten = torch.ops.aten

MAX_MEMBERS = 48  # nodes of a group: bounds the size of a kernel and the depth of its lowering
MAX_CHEAP_DEPTH = 12  # length of a chain of cheap nodes that is computed again in every consumer

_ASSEMBLY = {aten.cat.default, aten.stack.default, aten.constant_pad_nd.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}


@dataclass(frozen=True)
class LoopGroup:
    """Nodes computed by one kernel.

    Attributes:
        nodes: what the kernel computes, in graph order; it runs at the place of the last one.
        inputs: the nodes whose buffers are read: placeholders, claimed or rejected nodes, outputs of other groups.
        outputs: the nodes whose buffers are written. Tensor operands are inputs, then outputs; each operand's address
            is that of the node's first element (its `data_ptr`), its layout the strides of the node's `meta["val"]`.
        kernel: the kernel; equal for groups of equal structure.
        symbols: the sympy symbols whose values are the kernel's ints, in order.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    kernel: LoopKernel
    symbols: tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class LoopPlan:
    """The groups in an order consistent with the graph, and why each remaining node is in none."""

    groups: tuple[LoopGroup, ...]
    rejected: dict[Node, str]


def plan_loops(graph: Graph, claimed: Callable[[Node], bool], outputs: Sequence[Node]) -> LoopPlan:
    """Plans the loops of a functional ATen graph.

    Args:
        graph: every node has `meta["val"]`.
        claimed: whether something else computes a node into a buffer with the strides of its meta.
        outputs: the nodes whose values leave the graph. Of an alias the base is materialised (`views.base_of`).
    """
    rejected: dict[Node, str] = {}
    alone: set[Node] = set()
    while True:
        planner = _Planner(graph, claimed, outputs, rejected, alone)
        groups, settled = [], True
        for group in planner.groups:
            wanted = planner.outputs_of(group)
            if not wanted:
                continue  # dead code, or computed where it is used
            try:
                groups.append(planner.lower(group, wanted))
            except Unlowerable as why:
                settled = False
                blamed = why.node or (group.members[0] if len(group.members) == 1 else None)
                if blamed is None:
                    alone.update(group.members)
                elif blamed not in planner.rejected:
                    planner.rejected[blamed] = str(why)
                else:  # refused before, and still in the way
                    planner.rejected.update(dict.fromkeys(group.members, str(why)))
        rejected = planner.rejected
        if settled:
            return LoopPlan(tuple(groups), {n: reason for n, reason in rejected.items() if not is_alias(n)})


@dataclass(eq=False)
class _Group:
    """Members in graph order, how many points they compute, and how many rows where there are reductions."""

    members: list[Node]
    points: Expr
    rows: Expr | None


class _Planner:
    """One pass over the graph, given the nodes known to be rejected and those that must not share a kernel."""

    def __init__(
        self,
        graph: Graph,
        claimed: Callable[[Node], bool],
        outputs: Sequence[Node],
        rejected: dict[Node, str],
        alone: set[Node],
    ) -> None:
        self.position = {node: n for n, node in enumerate(graph.nodes)}
        self.rejected, self.alone = dict(rejected), alone
        self.computed: set[Node] = set()  # lowerable nodes that are no aliases
        self.views: set[Node] = set()  # every view op, aliases and copies
        self.cheap: dict[Node, int] = {}  # node -> length of its chain of cheap nodes
        self.constant: set[Node] = set()  # cheap nodes that read no tensor
        barriers = [node for node in graph.nodes if not self._classify(node, claimed)]
        # What is read at places that only the running kernel knows must lie in memory.
        sources = {node: gathered_source(node) for node in self.computed}
        self.gathered = {node: base_of(source) for node, source in sources.items() if source is not None}
        self.needed = {base_of(node) for node in outputs} | set(self.gathered.values())
        for node in barriers:
            self.needed.update(base_of(a) for a in node.all_input_nodes if self._is_tensor(a))
        self.anchors = [node for node in graph.nodes if self._is_anchor(node)]
        self.readers: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
        self.producers: dict[Node, list[Node]] = {}
        for node in [*barriers, *self.anchors]:
            self.producers[node] = found = list(dict.fromkeys(self._sources(node)))
            for source in found:
                self.readers[source].append(node)
        self.group_of: dict[Node, _Group] = {}
        self.groups: list[_Group] = []
        for node in self.anchors:
            self._place(node)
        self.groups.sort(key=lambda group: self.position[group.members[-1]])

    # ---- what a node is ----

    @staticmethod
    def _is_tensor(node: Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor)

    def _classify(self, node: Node, claimed: Callable[[Node], bool]) -> bool:
        """Sorts a node; False for a barrier that reads buffers."""
        if node.op != "call_function":
            return True  # a placeholder or attribute is a buffer; of the graph's outputs, `outputs` tells
        if claimed(node):
            return False
        if node.target in SPLITS:
            return True
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if value is None or isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
                # Sizes are symbols and checks are no work of loops; item() reads memory.
                return node.target is not aten.item.default
            self.rejected.setdefault(node, f"{node.target} has no loop form")
            return False
        if node.target is operator.getitem and transform_of(node) is None:
            return True  # one result of a barrier
        if is_alias(node):
            if node in self.rejected:  # no index arithmetic leads through it: its memory is read as it lies
                return False
            self.views.add(node)
            return True
        reason = self.rejected.get(node) or self._refusal(node)
        if reason is not None:
            self.rejected[node] = reason
            return False
        if transform_of(node) is not None:
            self.views.add(node)
        self.computed.add(node)
        self._rate(node)
        return True

    @staticmethod
    def _refusal(node: Node) -> str | None:
        for tensor in (node, *node.all_input_nodes):
            value = tensor.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype not in DTYPE_NAMES:
                return f"{value.dtype} has no loop form"
        if transform_of(node) is None and node.target not in OPERATIONS:
            return f"{node.target} has no loop form"
        if node.target in _PRODUCTS and shape(node.all_input_nodes[0])[-1] != 1:
            return "a matrix product over more than one inner element has no loop form"
        return None

    def _rate(self, node: Node) -> None:
        """Enters a node that costs next to nothing into `cheap`, and `constant` where it reads no tensor."""
        if node.target in CREATIONS:
            self.cheap[node] = 0
            self.constant.add(node)
            return
        if node not in self.views and node.target not in CHEAP:
            return
        operands = [self._origin(a) for a in node.all_input_nodes if self._is_tensor(a)]
        reading = {a for a in operands if a not in self.constant}
        if node not in self.views and any(self._continues(node, a) for a in reading):
            return
        depth = 1 + max((self.cheap.get(a, 0) for a in operands), default=0)
        if len(reading) <= 1 and depth <= MAX_CHEAP_DEPTH:
            self.cheap[node] = depth
            if not reading:
                self.constant.add(node)

    def _continues(self, node: Node, origin: Node) -> bool:
        """Whether `node` is all that becomes of a computed value: then it is better computed with it, and stored."""
        if origin not in self.computed or origin in self.cheap:
            return False
        waiting, readers = [origin], set()
        while waiting:
            for user in waiting.pop().users:
                if self._is_tensor(user) and is_alias(user):
                    waiting.append(user)
                elif user.op == "output" or user.meta.get("val") is not None:  # an assertion on metadata reads nothing
                    readers.add(user)
        return readers == {node} and same(product(shape(node)), product(shape(origin)))

    @staticmethod
    def _passes(node: Node) -> bool:
        """No tensor itself, but a way to one: the pieces of a split, or a number read from a tensor."""
        return node.target in SPLITS or node.target is aten.item.default

    def _origin(self, node: Node) -> Node:
        """Through aliases to the node that is computed or read; a piece of a split counts as its source."""
        while node in self.views and node not in self.computed:
            node = view_source(node)
        return node

    def _is_anchor(self, node: Node) -> bool:
        """Whether the node is placed into a group: computed, and not merely wherever it is used."""
        return node in self.computed and (node not in self.cheap or node in self.needed)

    def _sources(self, node: Node) -> Iterator[Node]:
        """The anchors and buffers that a node's kernel reads or computes on the way."""
        waiting = list(reversed(node.all_input_nodes))
        seen: set[Node] = set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            buffer = self._is_tensor(current) and current not in self.computed and current not in self.views
            if buffer or self._is_anchor(current):
                yield current
            if current in self.views or current in self.cheap or self._passes(current):
                waiting.extend(reversed(current.all_input_nodes))

    # ---- where it goes ----

    def _space(self, node: Node) -> tuple[Expr, Expr | None]:
        """Points and rows of the loops that compute a node."""
        if node.target not in REDUCTIONS:
            return product(shape(node)), None
        source = shape(node.all_input_nodes[0])
        dims = reduction_dims(node, bound_arguments(node))
        return product(source), product([size for d, size in enumerate(source) if d not in dims])

    def _place(self, node: Node) -> None:
        """Puts an anchor into the groups of its producers, else beside a reader of the same data, else on its own."""
        points, rows = self._space(node)
        merged = _Group([node], points, rows)
        if node not in self.alone:
            near = [self.group_of.get(p) for p in self.producers[node]]
            beside = [self.group_of.get(r) for p in self.producers[node] for r in self.readers[p]]
            for group in dict.fromkeys(g for g in (*reversed(near), *beside) if g is not None):
                joint = self._joint(group, merged, node)
                if joint is not None:
                    self.groups.remove(group)
                    merged = joint
        self.groups.append(merged)
        for member in merged.members:
            self.group_of[member] = merged

    def _joint(self, group: _Group, new: _Group, node: Node) -> _Group | None:
        """Both as one group that runs where `node` stands, None where that is impossible or no gain."""
        if self.alone.intersection(group.members) or len(group.members) + len(new.members) > MAX_MEMBERS:
            return None
        members = sorted({*group.members, *new.members}, key=self.position.__getitem__)
        inside = set(members)
        if any(self.gathered.get(member) in inside for member in members):
            return None
        for member in members:
            if any(r not in inside and self.position[r] < self.position[node] for r in self.readers[member]):
                return None
        rows = group.rows if new.rows is None else new.rows
        points = group.points
        if not same(group.points, new.points):
            if new.rows is None and group.rows is not None and same(new.points, group.rows):
                pass  # one value a row
            elif node.target in _ASSEMBLY and new.members == [node] and rows is None and self._internal(group, node):
                points = new.points
            else:
                return None
        if group.rows is not None and new.rows is not None and not same(group.rows, new.rows):
            return None
        joint = _Group(members, points, rows)
        if rows is not None:
            try:
                lower_outputs([node], lambda n: self._inlined(n, inside))
            except Unlowerable:
                return None
        return joint

    def _internal(self, group: _Group, node: Node) -> bool:
        """Whether nothing but `node` reads the group."""
        return all(
            member not in self.needed and all(r is node or r in group.members for r in self.readers[member])
            for member in group.members
        )

    # ---- lowering ----

    def _inlined(self, node: Node, members: set[Node]) -> bool:
        return node in members or node in self.cheap or (node in self.views and node not in self.computed)

    def outputs_of(self, group: _Group) -> list[Node]:
        """The members that somebody outside reads from memory."""
        inside = set(group.members)
        return [
            member
            for member in group.members
            if member in self.needed
            or (member not in self.cheap and any(r not in inside for r in self.readers[member]))
        ]

    def lower(self, group: _Group, outputs: list[Node]) -> LoopGroup:
        """The group's kernel; raises Unlowerable."""
        inside = set(group.members)
        nodes: set[Node] = set()
        waiting = list(outputs)
        while waiting:
            node = waiting.pop()
            if node in nodes or not (self._inlined(node, inside) or self._passes(node)):
                continue
            nodes.add(node)
            waiting.extend(node.all_input_nodes)
        computed = sorted(nodes & self.computed, key=self.position.__getitem__)
        title = [getattr(n.target, "_opname", n.name) for n in computed if n.target not in CREATIONS][:8]
        lowered = lower_outputs(outputs, lambda n: self._inlined(n, inside), title)
        return LoopGroup(tuple(computed), lowered.inputs, lowered.outputs, lowered.kernel, lowered.symbols)
