"""From a graph in the vocabulary to a Program: work in order, memory, operands, sizes as index expressions."""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.cpu.templates import PlannedCall, Workspace
from llmopt.codegen.decompose import decompose
from llmopt.codegen.densify import densify
from llmopt.codegen.index import Index, from_sympy
from llmopt.codegen.layout import Layout, layout, to_stride
from llmopt.codegen.loops.group import LoopGroup
from llmopt.codegen.memory import Life, Place, plan_memory
from llmopt.codegen.program import (
    AtenCall,
    KernelCall,
    KernelSpec,
    Operand,
    Program,
    Size,
    SymbolSource,
    Value,
    View,
)
from llmopt.codegen.result_layouts import keep_layouts
from llmopt.codegen.select import Selection, is_size, select_kernels
from llmopt.codegen.target import target_of
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import is_op, is_tensor, is_view, location, outputs, placeholders, tensor, to_expr, view_base


@dataclass
class Lowered:
    """A program, and what is needed to bind weights to it.

    weights: for each weight slot of the program the placeholder it reads, or the node that is computed from weights.
    nodes: for each step of the program the nodes that it computes.
    """

    program: Program
    selection: Selection
    weights: list[Node]
    nodes: list[Sequence[Node]] = field(default_factory=list)


@dataclass(eq=False)
class _Unit:
    """One schedulable piece of work: the kernel calls of a template, a fused loop, or an ATen op."""

    nodes: Sequence[Node]
    calls: list[PlannedCall] = field(default_factory=list)
    loop: LoopGroup | None = None
    reason: str = ""
    reads: set[Node] = field(default_factory=set)
    writes: set[Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Step:
    """One step of the program and the memory that it reads and writes: places in the arena, else values by number."""

    work: KernelCall | AtenCall
    reads: set[Place | int] = field(default_factory=set)
    writes: set[Place | int] = field(default_factory=set)


def lower(graph: fx.Graph, mutations: Sequence[int] = (), told: Sequence[Any] | None = None) -> Lowered:
    """Lowers `graph`, whose first `len(mutations)` outputs are the new values of those arguments.

    Results will lie in memory as `told` does, see `Captured`; None: as they come.

    Raises UnsupportedError when a size has no source among the inputs, or tensors lie on several kinds of devices.
    """
    target_of(graph)
    decompose(graph)
    densify(graph)
    views = keep_layouts(graph, told) if told is not None else {}
    return _Lowering(graph, select_kernels(graph), mutations, views).run()


class _Lowering:
    def __init__(
        self, graph: fx.Graph, selection: Selection, mutations: Sequence[int], views: Mapping[int, torch.Tensor]
    ) -> None:
        self.graph, self.selection, self.mutations, self.views = graph, selection, mutations, views
        self.symbols: list[SymbolSource] = []
        self.names: dict[sympy.Symbol, str] = {}
        self.values: list[Value] = []
        self.value_of: dict[Node, int] = {}
        self.places: dict[int, Place] = {}
        self.kernels: dict[KernelSpec, int] = {}
        self.weights: list[Node] = []
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def run(self) -> Lowered:
        inputs = self._name_symbols()
        units = self._schedule(self._units())
        arguments = self._add_inputs(inputs)
        self._add_weights(units)
        workspaces = self._place_values(units)
        made = [(unit, step) for unit in units for step in self._steps(unit, workspaces)]
        steps = _with_barriers([step for _, step in made])
        returned = outputs(self.graph)
        results = [self._result(number, item) for number, item in enumerate(returned)][len(self.mutations) :]
        news = [self._view(node) for node in returned[: len(self.mutations)]]
        program = Program(
            self.symbols,
            self.values,
            arguments,
            [self.value_of[node] for node in self.weights],
            list(self.kernels),
            steps,
            results,
            list(zip(self.mutations, news, strict=True)),
            self.arena_bytes,
            target=target_of(self.graph).name,
        )
        return Lowered(program, self.selection, self.weights, [unit.nodes for unit, _ in made])

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def _name_symbols(self) -> list[Node]:
        """Numbers the arguments and finds a source for each symbol among them."""
        inputs = placeholders(self.graph)
        for index, node in enumerate(inputs):
            val = node.meta["val"]
            sizes = [val] if isinstance(val, torch.SymInt) else list(val.shape) if is_tensor(node) else []
            for dim, size in enumerate(sizes):
                symbol = to_expr(size)
                if isinstance(symbol, sympy.Symbol) and symbol not in self.names:
                    self.names[symbol] = f"s{len(self.symbols)}"
                    place = -1 if isinstance(val, torch.SymInt) else dim
                    self.symbols.append(SymbolSource(self.names[symbol], index, place))
        return inputs

    def index(self, expression: Any) -> Index:
        """A size as an index expression over the program's symbols."""
        return from_sympy(
            sympy.expand(to_expr(expression)) if not isinstance(expression, sympy.Expr) else expression, self.names
        )

    # ---- units ------------------------------------------------------------------------------------------------------

    def _units(self) -> list[_Unit]:
        units = []
        for node, calls in self.selection.templates.items():
            unit = _Unit([*(n for call in calls for n in call.absorbs), node], calls=calls)
            for call in calls:
                unit.writes |= {view_base(n) for n in call.writes}
                used = {view_base(n) for n in call.tensors if isinstance(n, Node)}
                unit.reads |= used - {view_base(n) for n in call.writes}
            units.append(unit)
        for group in self.selection.loops:
            reads, writes = (set(map(view_base, part)) for part in (group.inputs, group.outputs))
            unit = _Unit(group.nodes, loop=group, reads=reads, writes=writes)
            units.append(unit)
        for node, reason in self.selection.fallbacks.items():
            reads = {view_base(n) for n in node.all_input_nodes if is_tensor(n)}
            parts = [u for u in node.users if is_op(u, operator.getitem)] if not is_tensor(node) else [node]
            units.append(_Unit([node], reason=reason, reads=reads, writes=set(parts)))
        return units

    def _schedule(self, units: list[_Unit]) -> list[_Unit]:
        """Topological order, as close to the graph's own as the groups allow."""
        maker = {node: unit for unit in units for node in unit.writes if node.op != "placeholder"}
        waiting: dict[_Unit, int] = {}
        users: dict[_Unit, list[_Unit]] = {unit: [] for unit in units}
        for unit in units:
            needs = {maker[n] for n in unit.reads if n in maker} - {unit}
            waiting[unit] = len(needs)
            for need in needs:
                users[need].append(unit)
        # Two writers of one argument (a cache) keep the graph's order, because both sort by their last node.
        rank = {unit: max(self.position[n] for n in unit.nodes) for unit in units}
        ready = [(rank[u], i, u) for i, u in enumerate(units) if waiting[u] == 0]
        heapq.heapify(ready)
        order = []
        while ready:
            _, _, unit = heapq.heappop(ready)
            order.append(unit)
            for user in users[unit]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    heapq.heappush(ready, (rank[user], len(units) + len(order), user))
        if len(order) != len(units):
            raise UnsupportedError("the kernel groups depend on one another in a circle")
        return order

    # ---- values -----------------------------------------------------------------------------------------------------

    def _add(self, node: Node, kind: str, name: str, offset: Index = 0, like: Node | None = None) -> int:
        """A value for `node`, with the sizes and strides of its view `like` if there is one."""
        val = tensor(like or node)
        sizes = tuple(self.index(s) for s in val.shape)
        strides = tuple(self.index(to_stride(s)) for s in val.stride())
        self.value_of[node] = len(self.values)
        self.values.append(Value(kind, name, val.dtype, sizes, strides, offset))
        return self.value_of[node]

    def _add_inputs(self, inputs: list[Node]) -> list[int | None]:
        arguments: list[int | None] = []
        for node in inputs:
            if not is_tensor(node) or node.meta.get("weight"):
                arguments.append(None)
            else:
                arguments.append(self._add(node, "input", node.name))
        return arguments

    def _add_weights(self, units: list[_Unit]) -> None:
        returned = {view_base(n) for n in outputs(self.graph) if isinstance(n, Node) and is_tensor(n)}
        used = {n for unit in units for n in unit.reads} | returned
        constants = self.selection.constants
        for node in self.graph.nodes:
            if node in constants and node in used and is_tensor(node) and view_base(node) is node:
                name = node.meta["weight"] if node.op == "placeholder" else f"derived.{node.name}"
                self._add(node, "weight", name)
                self.weights.append(node)

    def _place_values(self, units: list[_Unit]) -> dict[PlannedCall, int]:
        """Adds all computed values; those that nobody outside the kernels sees go into the arena."""
        outside = {view_base(n) for n in outputs(self.graph) if isinstance(n, Node) and is_tensor(n)}
        for unit in units:
            if unit.reason:
                outside |= unit.reads
        first: dict[Any, int] = {}
        last: dict[Any, int] = {}
        sizes: dict[Any, sympy.Expr] = {}
        kinds: dict[Any, str] = {}
        place = {node: index for index, node in enumerate(self.graph.nodes)}
        for step, unit in enumerate(units):
            for node in unit.reads | unit.writes:
                if node not in self.value_of:
                    first.setdefault(node, step)
                    last[node] = step
            for node in sorted(unit.writes, key=place.__getitem__):  # the same program from the same graph
                if node not in self.value_of:
                    kinds[node] = "runtime" if unit.reason else "output" if node in outside else "arena"
            for call in unit.calls:
                for item in call.tensors:
                    if isinstance(item, Workspace):
                        first[call] = last[call] = step
                        sizes[call] = item.size
                        kinds[call] = "arena"
        arena = [key for key, kind in kinds.items() if kind == "arena"]
        for key in arena:
            if isinstance(key, Node):
                sizes[key] = storage_bytes(layout(key))
        places, total = plan_memory([Life(sizes[k], first[k], last[k]) for k in arena])
        self.arena_bytes = self.index(total)
        where = dict(zip(arena, places, strict=True))
        workspaces: dict[PlannedCall, int] = {}
        for key, kind in kinds.items():
            offset: Index = 0
            if kind == "arena":
                offset, self.places[len(self.values)] = self.index(where[key].offset), where[key]
            if isinstance(key, Node):
                seen = self._returned_whole(key) if kind == "output" else key
                self._add(key, kind, key.name, offset, like=seen)
            else:
                workspaces[key] = len(self.values)
                size = (self.index(sizes[key]),)
                self.values.append(Value("arena", "workspace", torch.uint8, size, (1,), offset))
        return workspaces

    def _returned_whole(self, node: Node) -> Node:
        """The one dense view of all of `node` that the call returns, else `node`: made in that shape at once."""
        views = {n for n in outputs(self.graph) if isinstance(n, Node) and is_tensor(n) and view_base(n) is node}
        if len(views) != 1:
            return node
        (view,) = views
        own, seen = layout(node), layout(view)
        whole = seen.offset == 0 and own.itemsize == seen.itemsize and sympy.expand(own.numel - seen.numel) == 0
        same = tensor(view).dtype == tensor(node).dtype
        return view if whole and same and own.is_contiguous and seen.is_contiguous else node

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _kernel(self, spec: KernelSpec) -> int:
        return self.kernels.setdefault(spec, len(self.kernels))

    def _operand(self, node: Node) -> Operand:
        shape = layout(node)
        return Operand(self.value_of[shape.base], self.index(shape.offset_bytes))

    def _steps(self, unit: _Unit, workspaces: dict[PlannedCall, int]) -> Iterable[_Step]:
        if unit.reason:
            yield _Step(self._aten_call(unit))
        if unit.loop is not None:
            group = unit.loop
            tensors = tuple(self._operand(n) for n in (*group.inputs, *group.outputs))
            ints = tuple(self.index(s) for s in group.symbols)
            origin = " ".join(dict.fromkeys(_short(n) for n in group.nodes if not is_view(n)))
            kernel = self._kernel(KernelSpec("loop", (), group.kernel))
            yield self._step(KernelCall(kernel, tensors, ints, (), True, origin), group.outputs)
        name = " ".join(dict.fromkeys(map(_short, unit.nodes)))
        for call in unit.calls:
            operands = tuple(
                None if t is None else Operand(workspaces[call]) if isinstance(t, Workspace) else self._operand(t)
                for t in call.tensors
            )
            ints = tuple(self.index(i) for i in call.ints)
            native = KernelCall(self._kernel(call.kernel), operands, ints, call.floats, True, name)
            yield self._step(native, call.writes)

    def _step(self, call: KernelCall, written: Sequence[Node]) -> _Step:
        """The call with the memory it touches; workspaces count as written."""
        writes = {self._memory(self.value_of[view_base(n)]) for n in written}
        touched = {self._memory(t.value) for t in call.tensors if t is not None}
        scratch = {self._memory(t.value) for t in call.tensors if t and self.values[t.value].name == "workspace"}
        return _Step(call, touched - writes, writes | scratch)

    def _memory(self, value: int) -> Place | int:
        """What tells two pieces of memory apart: the place in the arena, or the value itself."""
        return self.places.get(value, value)

    def _aten_call(self, unit: _Unit) -> AtenCall:
        node = unit.nodes[0]
        args = tuple(self._argument(a, node) for a in node.args)
        kwargs = {k: self._argument(v, node) for k, v in node.kwargs.items()}
        if is_tensor(node):
            values: tuple[int, ...] = (self.value_of[node],)
        else:
            parts = {u.args[1]: u for u in node.users if is_op(u, operator.getitem)}
            count = len(node.meta["val"])
            values = tuple(self.value_of[parts[i]] if i in parts else -1 for i in range(count))
        return AtenCall(str(node.target), args, kwargs, values, unit.reason, location(node))

    def _argument(self, arg: Any, node: Node) -> Any:
        """An argument of `node` as the program holds it."""
        if isinstance(arg, list | tuple):
            return [self._argument(a, node) for a in arg]
        if not isinstance(arg, Node):
            return arg
        if is_size(arg):
            return Size(self.index(arg.meta["val"]))
        if not is_tensor(arg):
            reason = "its argument, computed from sizes, is no integer, which a program cannot carry"
            raise UnsupportedError(reason, operation=str(node.target), location=location(node))
        return self._view(arg)

    def _result(self, number: int, item: Any) -> Any:
        """What the graph returns, or the view of it that the caller gets."""
        seen = self.views.get(number)
        if seen is None:
            return self._argument(item, self.graph.output_node())
        sizes, strides = (tuple(map(self.index, part)) for part in (seen.shape, map(to_stride, seen.stride())))
        return View(self.value_of[view_base(item)], self.index(seen.storage_offset()), sizes, strides)

    def _view(self, node: Node) -> View:
        shape = layout(node)
        sizes, strides = (tuple(map(self.index, part)) for part in (shape.sizes, shape.strides))
        return View(self.value_of[shape.base], self.index(shape.offset), sizes, strides)


def storage_bytes(shape: Layout) -> sympy.Expr:
    """Bytes that a value takes. One with gaps between its entries (`copy` into a slice leaves such) takes more."""
    reach = sympy.expand(1 + sum((n - 1) * s for n, s in zip(shape.sizes, shape.strides, strict=True)))
    numel = sympy.expand(shape.numel)
    if reach != numel:
        numel = sympy.expand(sum(n * s for n, s in zip(shape.sizes, shape.strides, strict=True)))  # an upper bound
    return numel * shape.itemsize


def _short(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _with_barriers(steps: Sequence[_Step]) -> list[KernelCall | AtenCall]:
    """Keeps the barrier behind a call only where the next call touches what was written since the last barrier."""
    result: list[KernelCall | AtenCall] = []
    reads: set[Place | int] = set()
    writes: set[Place | int] = set()
    for step in steps:
        conflict = _meet(step.reads, writes) or _meet(step.writes, reads | writes)
        if isinstance(step.work, AtenCall) or conflict:
            reads, writes = set(), set()
        elif result and isinstance(result[-1], KernelCall):
            result[-1] = dataclasses.replace(result[-1], sync_after=False)
        if not isinstance(step.work, AtenCall):
            reads, writes = reads | step.reads, writes | step.writes
        result.append(step.work)
    return result


def _meet(left: set[Place | int], right: set[Place | int]) -> bool:
    """Whether the two have memory in common, be it only parts of their values."""
    if not left.isdisjoint(right):
        return True
    ours, theirs = ([item for item in items if isinstance(item, Place)] for items in (left, right))
    return any(one.overlaps(other) for one in ours for other in theirs)


__all__ = ["Lowered", "lower"]
