"""Works out what a report says about a program on request: cost of every step, symbols, lifetimes of temporaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from llmopt.codegen.index import Index, multiply, to_sympy
from llmopt.codegen.lower import Lowered
from llmopt.codegen.program import AtenCall, KernelCall, Program, View
from llmopt.codegen.step_costs import CONTEXT as CONTEXT_NAME
from llmopt.codegen.step_costs import costs_to_json
from llmopt.compiler.attention_ops import CONTEXT
from llmopt.compiler.costs import group_cost, node_costs
from llmopt.compiler.graph import location, placeholders
from llmopt.compiler.opspec import Cost
from llmopt.compiler.report import CallReport, Details, ValueLife
from llmopt.compiler.step import EMBEDS_INPUTS, STEP_INPUTS, WINDOW_INPUTS

# The sizes of a step program by (input, dimension): the name, what it counts, and the value in a decode step.
_STEP_SIZES: dict[tuple[str, int], tuple[str, str, int]] = {
    ("input_ids", 0): ("tokens", "tokens of all requests in the step", 1),
    ("seq_lens", 0): ("requests", "requests in the batch", 1),
    ("block_tables", 1): ("pages", "most pages of the KV cache that one request holds", 32),
    ("logits_indices", 0): ("rows", "rows whose logits are wanted", 1),
    ("prompt_embeds", 0): ("embeddings", "tokens of prompts that are given as embeddings", 1),
}
_CACHE_PAGES = ("cache_pages", "pages of the KV cache", 64)
_CONTEXT = ("keys that a query sees, on average over the batch", 512)
_CONTEXT_SYMBOL = sympy.Symbol(CONTEXT_NAME, integer=True, positive=True)

_NOTHING = Cost(sympy.Integer(0), sympy.Integer(0), sympy.Integer(0))


def program_symbols(program: Program) -> tuple[dict[str, sympy.Symbol], dict[str, str], dict[str, int]]:
    """(symbol of each of a step program's names, what each symbol stands for, sizes to start with)."""
    symbols: dict[str, sympy.Symbol] = {}
    meanings: dict[str, str] = {}
    hints: dict[str, int] = {}
    grouped = any(value.name in WINDOW_INPUTS for value in program.values)
    inputs = [*STEP_INPUTS, *(WINDOW_INPUTS if grouped else ())]
    for source in program.symbols:
        name, meaning, hint = source.name, f"argument {source.index}, dimension {source.dim}", 1
        if source.dim < 0:
            meaning = f"argument {source.index}"
        value = program.inputs[source.index]
        if value is not None:
            meaning = f"{program.values[value].name}.shape[{source.dim}]"
        key = (inputs[source.index], source.dim) if source.index < len(inputs) else ("cache", source.dim)
        if value is not None and program.values[value].name == EMBEDS_INPUTS[1]:
            key = (EMBEDS_INPUTS[1], source.dim)
        name, meaning, hint = _STEP_SIZES.get(key, _CACHE_PAGES if key[0] == "cache" else (name, meaning, hint))
        symbols[source.name] = sympy.Symbol(name, integer=True, positive=True)
        meanings[name], hints[name] = meaning, hint
    return symbols, meanings, hints


def lifetimes(program: Program, symbols: Mapping[str, sympy.Symbol]) -> list[ValueLife]:
    """Every temporary value of the program with the first and last step that touch it."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(program.steps):
        for value in _touched(step):
            if program.values[value].kind == "arena":
                first.setdefault(value, number)
                last[value] = number
    lives = []
    for value in first:
        item = program.values[value]
        size = multiply(1, item.dtype.itemsize)
        for extent in item.sizes:
            size = multiply(size, extent)
        lives.append(
            ValueLife(item.name, to_sympy(size, symbols), to_sympy(item.offset, symbols), first[value], last[value])
        )
    return sorted(lives, key=lambda life: (life.first, life.last, life.name))


def _touched(step: KernelCall | AtenCall) -> list[int]:
    if isinstance(step, KernelCall):
        return [operand.value for operand in step.tensors if operand is not None]
    flat: list[int] = list(step.values)

    def collect(item: object) -> None:
        if isinstance(item, View):
            flat.append(item.value)
        elif isinstance(item, list | tuple):
            for inner in item:
                collect(inner)

    collect([*step.args, *step.kwargs.values()])
    return [value for value in flat if value >= 0]


def graph_details(graph: fx.Graph, lowered: Lowered, step: bool) -> Details:
    """The details of a lowered graph; costs over the same symbols as the memory plan."""
    program = lowered.program
    symbols, meanings, hints = program_symbols(program) if step else _graph_symbols(graph, program)
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    inputs = placeholders(graph)
    for source in program.symbols:
        val = inputs[source.index].meta["val"]
        size = val if isinstance(val, torch.SymInt) else val.shape[source.dim]
        names[size.node.expr] = symbols[source.name]
    calls = _calls(program, lowered)
    names[CONTEXT] = _CONTEXT_SYMBOL
    calls = [CallReport(c.kernel, c.origin, c.location, c.cost.renamed(names)) for c in calls]
    _add_context(calls, meanings, hints)
    return Details(meanings, hints, calls, to_sympy(program.arena_bytes, symbols), lifetimes(program, symbols))


def _add_context(calls: Sequence[CallReport], meanings: dict[str, str], hints: dict[str, int]) -> None:
    """Names the length that attention sees, where a cost depends on it."""
    if any(_CONTEXT_SYMBOL in part.free_symbols for call in calls for part in vars(call.cost).values()):
        meanings[CONTEXT_NAME], hints[CONTEXT_NAME] = _CONTEXT


def _graph_symbols(graph: fx.Graph, program: Program) -> tuple[dict[str, sympy.Symbol], dict[str, str], dict[str, int]]:
    """As `program_symbols`, under the names that the graph's inputs are printed with; in the program's order."""
    symbols: dict[str, sympy.Symbol] = {}
    meanings: dict[str, str] = {}
    hints: dict[str, int] = {}
    inputs = placeholders(graph)
    for source in program.symbols:
        val = inputs[source.index].meta["val"]
        size = val if isinstance(val, torch.SymInt) else val.shape[source.dim]
        name = size.node.expr.name
        symbols[source.name] = sympy.Symbol(name, integer=True, positive=True)
        places = (
            f"{node.name}.shape[{dim}]"
            for node in inputs
            if isinstance(node.meta["val"], torch.Tensor) and not node.meta.get("weight")
            for dim, extent in enumerate(node.meta["val"].shape)
            if isinstance(extent, torch.SymInt) and extent.node.expr == size.node.expr
        )
        meanings[name] = next(places, f"argument {source.index}")
        hints[name] = int(size.node.hint) if size.node.hint is not None else 1
    return symbols, meanings, hints


def _calls(program: Program, lowered: Lowered) -> list[CallReport]:
    """One entry for each step of the program; several steps of one node share its cost."""
    fused = {tuple(group.nodes): (group.inputs, group.outputs) for group in lowered.selection.loops}
    for item in lowered.selection.epilogues:
        inputs = dict.fromkeys((*item.product.all_input_nodes, *item.loop.inputs))
        del inputs[item.product]
        fused[item.nodes] = (tuple(inputs), item.loop.outputs)
    found: list[CallReport] = []
    position = 0
    while position < len(program.steps):
        nodes = lowered.nodes[position]
        count = 1
        while position + count < len(program.steps) and lowered.nodes[position + count] is nodes:
            count += 1
        ends = fused.get(tuple(nodes))
        if ends is not None:
            costs = [group_cost(nodes, *ends)]
        else:
            # Several nodes and as many calls: one each, such as a product and what adapters add to it.
            costs = [node_costs(node)[0] for node in nodes] if len(nodes) == count else node_costs(nodes[0], count)
        for step, cost in zip(program.steps[position : position + count], costs, strict=True):
            found.append(_call(step, nodes, cost))
        position += count
    return found


def _call(step: KernelCall | AtenCall, nodes: Sequence[fx.Node], cost: Cost) -> CallReport:
    where = next(filter(None, map(location, reversed(nodes))), None)
    if isinstance(step, AtenCall):
        return CallReport(None, step.op.removesuffix(".default"), step.location, cost)
    return CallReport(step.kernel, step.origin, where, cost)


def kept_costs(program: Program, details: Details) -> list[Any]:
    """The costs of a step program's calls as its file keeps them."""
    names = {symbol: name for name, symbol in program_symbols(program)[0].items()}
    return costs_to_json([call.cost for call in details.calls], {**names, _CONTEXT_SYMBOL: CONTEXT_NAME})


def program_details(program: Program, costs: Sequence[tuple[Index, ...] | None] | None) -> Details:
    """The details of a step program without its graph, as read from a file; what it does not know costs nothing."""
    symbols, meanings, hints = program_symbols(program)
    known = {**symbols, CONTEXT_NAME: _CONTEXT_SYMBOL}
    calls = []
    for number, step in enumerate(program.steps):
        parts = costs[number] if costs is not None else None
        cost = Cost(*(to_sympy(part, known) for part in parts)) if parts is not None else _NOTHING
        calls.append(_call(step, [], cost))
    _add_context(calls, meanings, hints)
    return Details(meanings, hints, calls, to_sympy(program.arena_bytes, symbols), lifetimes(program, symbols))
