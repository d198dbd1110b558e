"""From a group's fx nodes to one `LoopKernel`.

Every output is lowered on its own, by demand, down to the buffers it reads (`draft.py`). Drafts over the same range
then share a nest; the loops that the reductions depend on become its rows, equal values and equal reductions are
merged, and neighbouring loops that walk straight through all their buffers are joined into one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
from torch.fx import Node

from llmopt.codegen import index as indices
from llmopt.codegen.index import Index
from llmopt.codegen.loops.draft import (
    Draft,
    DraftIndex,
    DraftLoad,
    DraftPosition,
    DraftReduction,
    DraftSweep,
    refinements,
)
from llmopt.codegen.loops.emit import dtype_name
from llmopt.codegen.loops.ir import (
    POSITION,
    Accumulate,
    Accumulator,
    IndexValue,
    Load,
    Local,
    LoopKernel,
    Nest,
    Position,
    Store,
    Sweep,
    Value,
    arguments,
    renumbered,
)
from llmopt.codegen.loops.symbolic import (
    ONE,
    ZERO,
    Expr,
    Loop,
    Unlowerable,
    expand,
    is_nonnegative,
    loop_variable,
    product,
    same,
)
from llmopt.codegen.loops.views import shape, tensor_of
from llmopt.compiler.errors import UnsupportedError

LoopKey: TypeAlias = tuple[tuple[sympy.Symbol, Expr], ...]


@dataclass(frozen=True)
class Lowered:
    """A kernel, the nodes whose buffers are its operands, and the sympy symbols that its symbols stand for."""

    kernel: LoopKernel
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    symbols: tuple[sympy.Symbol, ...]


def lower_outputs(outputs: Sequence[Node], inlined: Callable[[Node], bool], title: Iterable[str] = ()) -> Lowered:
    """Lowers `outputs` into one kernel.

    Args:
        outputs: the nodes to store, each dense at its meta's strides.
        inlined: whether a node is computed in this kernel; any other one is an input buffer.
        title: words for the kernel's name.

    Raises:
        Unlowerable: an op has no loop form, or the nodes do not fit into one kernel; the message says why.
    """
    drafts = [draft for output in outputs for draft in _drafts(output, inlined)]
    clusters: dict[LoopKey, list[Draft]] = {}
    for draft in drafts:
        clusters.setdefault(_key(draft.final.loops), []).append(draft)
    builder = _Builder(tuple(outputs), drafts)
    nests: dict[LoopKey, _NestBuilder] = {}
    plain: list[tuple[LoopKey, list[Draft]]] = []
    for key, members in clusters.items():
        reductions = [r for draft in members for r in draft.reductions]
        if not reductions:
            plain.append((key, members))
            continue
        rows = _memory_order(_row_loops(key, reductions), members[0].store_index)
        nest = nests.setdefault(_key(rows), _NestBuilder(builder, rows))
        for draft in members:
            nest.add(draft)
    reducing = set(nests)
    for key, members in plain:
        if key in reducing:  # one element a row of a nest that is there already
            nest = nests[key]
        else:
            rows = _collapsed(members)[:-1]
            nest = nests.setdefault(_key(rows), _NestBuilder(builder, rows))
        for draft in members:
            nest.add(draft)
    words = [re.sub(r"[^a-z0-9_]", "", word.lower()) for word in title]
    name = "_".join(["fused", *dict.fromkeys(w for w in words if w)])[:60].rstrip("_")
    try:
        kernel = LoopKernel(
            name,
            tuple(builder.names[s] for s in builder.symbols),
            tuple(dtype_name(tensor_of(n).dtype) for n in (*builder.inputs, *outputs)),
            len(builder.inputs),
            tuple(nest.build() for nest in nests.values()),
        )
    except UnsupportedError as error:
        raise Unlowerable(str(error)) from error
    return Lowered(kernel, tuple(builder.inputs), tuple(outputs), tuple(builder.symbols))


def _drafts(output: Node, inlined: Callable[[Node], bool]) -> list[Draft]:
    sizes = shape(output)
    index = tuple(ZERO if size == 1 else loop_variable(f"d{d}") for d, size in enumerate(sizes))
    loops = [Loop(i, size) for i, size in zip(index, sizes, strict=True) if size != 1]

    def attempt(piece: list[Loop], at: tuple[Expr, ...], refine: bool) -> Draft:
        draft = Draft(output, piece, at, inlined, refine)
        _drop_unused(draft)
        return draft

    return refinements(loops, index, attempt)


def _drop_unused(draft: Draft) -> None:
    """Leaves only the reductions that the result needs: an abandoned range of an inner loop leaves others behind."""
    used: set[int] = set()

    def visit(sweep: DraftSweep) -> None:
        for value in sweep.values:
            if isinstance(value, Local) and value.number not in used:
                used.add(value.number)
                for part, _ in draft.reductions[value.number].parts:
                    visit(part)

    visit(draft.final)
    order = sorted(used)
    renumber = {old: new for new, old in enumerate(order)}
    sweeps = [draft.final, *(part for n in order for part, _ in draft.reductions[n].parts)]
    for sweep in sweeps:
        sweep.values = [replace(v, number=renumber[v.number]) if isinstance(v, Local) else v for v in sweep.values]
    draft.reductions = [draft.reductions[n] for n in order]


def _key(loops: Sequence[Loop]) -> LoopKey:
    return tuple((loop.variable, loop.size) for loop in loops)


def _expressions(sweep: DraftSweep) -> list[Expr]:
    sizes = [v.size for v in sweep.values if isinstance(v, DraftPosition)]
    return sizes + [v.index for v in sweep.values if isinstance(v, DraftLoad | DraftIndex)]


def _row_loops(key: LoopKey, reductions: Sequence[DraftReduction]) -> list[Loop]:
    """The loops that the reductions depend on.

    Raises:
        Unlowerable: a reduction would be computed more than once, or depends on the inside of another one.
    """
    outer = {variable for variable, _ in key}
    used: set[Any] = set()
    for reduction in reductions:
        for sweep, _ in reduction.parts:
            own = {loop.variable for loop in sweep.loops} | sweep.positions.keys()
            free = set().union(*(e.free_symbols for e in _expressions(sweep))) - own
            if any(re.fullmatch(r"r\d+[abio]*|p\d+_\d+", s.name) for s in free):
                raise Unlowerable("a reduction inside another one needs a kernel of its own")
            used |= free & outer
    rows = [Loop(variable, size) for variable, size in key if variable in used]
    repeats = product([loop.size for loop in rows])
    for reduction in reductions:
        if not is_nonnegative(reduction.rows - repeats, {}):
            raise Unlowerable("a reduction would be computed again for every row of another one")
    return rows


def _collapsed(drafts: Sequence[Draft]) -> list[Loop]:
    """Chooses the innermost loop of drafts over the same range, joins loops, and rewrites the drafts' indices."""
    loops = drafts[0].final.loops
    tables = [[*_expressions(d.final), d.store_index] for d in drafts]
    everything = [e for table in tables for e in table]
    if not loops:
        return [Loop(loop_variable("d"), ONE)]
    stores = [d.store_index for d in drafts]
    *rows, last = _innermost_last(loops, stores, everything)
    loops = [*_memory_order(rows, stores[0]), last]
    swaps: dict[Expr, Expr] = {e: e for e in everything}
    position = len(loops) - 2
    while position >= 0:
        outer, inner = loops[position : position + 2]
        joined = Loop(loop_variable(f"{outer.variable.name}_"), product([outer.size, inner.size]))
        trial = {e: _joined(now, outer, inner, joined.variable) for e, now in swaps.items()}
        if all(now is not None for now in trial.values()):
            swaps = {e: now for e, now in trial.items() if now is not None}
            loops[position : position + 2] = [joined]
        position -= 1
        position = min(position, len(loops) - 2)
    for draft in drafts:
        draft.final.loops = loops
        draft.store_index = swaps[draft.store_index]
        draft.final.values = [
            replace(v, index=swaps[v.index]) if isinstance(v, DraftLoad | DraftIndex) else v for v in draft.final.values
        ]
    return loops


def _joined(index: Expr, outer: Loop, inner: Loop, variable: sympy.Symbol) -> Expr | None:
    """`index` over the loop that runs through both, None where the two steps do not follow each other."""
    a, b = outer.variable, inner.variable
    slope, step = index.coeff(a, 1), index.coeff(b, 1)
    rest = expand(index - slope * a - step * b)
    if {a, b} & (rest.free_symbols | slope.free_symbols | step.free_symbols):
        return None
    return expand(rest + step * variable) if same(slope, step * inner.size) else None


def _memory_order(loops: Sequence[Loop], store: Expr) -> list[Loop]:
    """The loops so that the stored buffer is walked in the order of its addresses, as far as strides compare."""
    ordered: list[Loop] = []
    for loop in loops:
        step, at = store.coeff(loop.variable, 1), len(ordered)
        while at > 0 and is_nonnegative(step - store.coeff(ordered[at - 1].variable, 1) - 1, {}):
            at -= 1
        ordered.insert(at, loop)
    return ordered


def _innermost_last(loops: Sequence[Loop], stores: Sequence[Expr], everything: Sequence[Expr]) -> list[Loop]:
    """The loops with the one last that steps by one through most buffers, the stored ones first of all."""

    def contiguous(loop: Loop) -> tuple[int, int]:
        steps = [[e.coeff(loop.variable, 1) == 1 for e in table] for table in (stores, everything)]
        return sum(steps[0]), sum(steps[1])

    best = max(range(len(loops)), key=lambda n: (contiguous(loops[n]), n))
    return [*loops[:best], *loops[best + 1 :], loops[best]]


class _Builder:
    """Numbers buffers and symbols by first use, and converts indices."""

    def __init__(self, outputs: tuple[Node, ...], drafts: Sequence[Draft]) -> None:
        self.outputs = outputs
        sweeps = [s for d in drafts for s in (*(p for r in d.reductions for p, _ in r.parts), d.final)]
        loads = [v for sweep in sweeps for v in sweep.values if isinstance(v, DraftLoad)]
        self.inputs = list(dict.fromkeys(load.node for load in loads))
        # Sizes in order of appearance, so that the numbering depends on structure and not on the symbols' names.
        mentioned = [size for node in (*outputs, *self.inputs) for size in shape(node)]
        shapes = len(mentioned)
        mentioned += [e for sweep in sweeps for e in _expressions(sweep)]
        mentioned += [loop.size for sweep in sweeps for loop in sweep.loops] + [d.store_index for d in drafts]
        variables = {loop.variable for sweep in sweeps for loop in sweep.loops}
        variables |= {symbol for sweep in sweeps for symbol in sweep.positions}
        found: dict[sympy.Symbol, None] = {}
        used: set[Any] = set().union(*(e.free_symbols for e in mentioned[shapes:])) - variables
        for expression in mentioned:
            found.update(dict.fromkeys(s for s in sorted(expression.free_symbols & used, key=str)))
        self.symbols = list(found)
        self.names = {symbol: f"s{n}" for n, symbol in enumerate(self.symbols)}

    def index(self, expression: Expr, variables: dict[sympy.Symbol, str]) -> Index:
        return indices.from_sympy(expression, {**self.names, **variables})


class _SweepBuilder:
    """A sweep under construction: values of several drafts, equal ones merged."""

    def __init__(self, sizes: tuple[Index, ...]) -> None:
        self.sizes = sizes
        self.values: list[Value] = []
        self.numbers: dict[Value, int] = {}
        self.accumulates: list[Accumulate] = []
        self.stores: list[Store] = []

    def add(self, values: Sequence[Value]) -> list[int]:
        """Adds a list of values and returns their numbers here."""
        placed: list[int] = []
        for value in values:
            value = renumbered(value, placed)
            if value not in self.numbers:
                self.numbers[value] = len(self.values)
                self.values.append(value)
            placed.append(self.numbers[value])
        return placed

    def build(self) -> Sweep:
        """The sweep without the values that nothing uses."""
        live = {a.value for a in self.accumulates} | {s.value for s in self.stores}
        for number in reversed(range(len(self.values))):
            if number in live:
                live |= set(arguments(self.values[number]))
        kept = _SweepBuilder(self.sizes)
        renumber: dict[int, int] = {}
        for number in sorted(live):
            value = renumbered(self.values[number], renumber)
            renumber[number] = len(kept.values)
            kept.values.append(value)
        return Sweep(
            self.sizes,
            tuple(kept.values),
            tuple(replace(a, value=renumber[a.value]) for a in self.accumulates),
            tuple(replace(s, value=renumber[s.value]) for s in self.stores),
        )


class _NestBuilder:
    """A nest under construction over given row loops."""

    def __init__(self, builder: _Builder, rows: Sequence[Loop]) -> None:
        self.builder = builder
        self.rows = {loop.variable: f"i{n}" for n, loop in enumerate(rows)}
        self.sizes = tuple(builder.index(loop.size, {}) for loop in rows)
        self.accumulators: list[Accumulator] = []
        self.finished: list[int] = []  # for each accumulator, the last sweep that adds to it
        self.known: dict[Any, int] = {}
        self.sweeps: list[_SweepBuilder] = []

    def add(self, draft: Draft) -> None:
        """Adds what a draft computes, reusing equal reductions."""
        locals_: list[int] = []
        for reduction in draft.reductions:
            parts = [self._converted(sweep, locals_, [ref])[:3] for sweep, ref in reduction.parts]
            key = (reduction.kind, reduction.dtype, tuple(parts))
            if key not in self.known:
                number = self.known[key] = len(self.accumulators)
                self.accumulators.append(Accumulator(reduction.kind, reduction.dtype))
                self.finished.append(-1)
                for sizes, values, refs in parts:
                    at, sweep = self._place(sizes, values)
                    sweep.accumulates.append(Accumulate(number, sweep.add(values)[refs[0]]))
                    self.finished[number] = max(self.finished[number], at)
            locals_.append(self.known[key])
        sizes, values, refs, variables = self._converted(draft.final, locals_, [draft.result], draft.store_index)
        _, sweep = self._place(sizes, values)
        buffer = len(self.builder.inputs) + self.builder.outputs.index(draft.output)
        index = self.builder.index(draft.store_index, variables)
        sweep.stores.append(Store(buffer, index, sweep.add(values)[refs[0]]))

    def _converted(
        self, sweep: DraftSweep, locals_: Sequence[int], refs: Sequence[int], store: Expr | None = None
    ) -> tuple[tuple[Index, ...], tuple[Value, ...], tuple[int, ...], dict[sympy.Symbol, str]]:
        """Sizes, values and names of a draft's sweep in terms of this nest."""
        loops = [loop for loop in sweep.loops if loop.variable not in self.rows]
        if len(loops) > 1:
            stores = [store] if store is not None else []
            loops = _innermost_last(loops, stores, _expressions(sweep))
        variables = {**self.rows, **{loop.variable: f"j{n}" for n, loop in enumerate(loops)}}
        places = {**variables, **{symbol: f"{POSITION}{number}" for symbol, number in sweep.positions.items()}}
        values: list[Value] = []
        for value in sweep.values:
            if isinstance(value, DraftLoad):
                buffer = self.builder.inputs.index(value.node)
                values.append(Load(buffer, self.builder.index(value.index, places), value.dtype, value.guard))
            elif isinstance(value, DraftPosition):
                values.append(Position(value.arg, self.builder.index(value.size, {}), value.wraps))
            elif isinstance(value, DraftIndex):
                values.append(IndexValue(self.builder.index(value.index, variables)))
            elif isinstance(value, Local):
                values.append(replace(value, number=locals_[value.number]))
            else:
                values.append(value)
        sizes = tuple(self.builder.index(loop.size, variables) for loop in loops)
        return sizes, tuple(values), tuple(refs), variables

    def _place(self, sizes: tuple[Index, ...], values: Sequence[Value]) -> tuple[int, _SweepBuilder]:
        """The first sweep of these sizes that comes after every accumulator that the values read."""
        needed = [self.finished[v.number] for v in values if isinstance(v, Local)]
        for at in range(max(needed, default=-1) + 1, len(self.sweeps)):
            if self.sweeps[at].sizes == sizes:
                return at, self.sweeps[at]
        self.sweeps.append(_SweepBuilder(sizes))
        return len(self.sweeps) - 1, self.sweeps[-1]

    def build(self) -> Nest:
        return Nest(self.sizes, tuple(self.accumulators), tuple(sweep.build() for sweep in self.sweeps))
