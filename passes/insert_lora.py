"""Lets every request of a step bring a low-rank adapter of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import Rewriter, aten, is_op, nodes_of, placeholders, tensor, to_expr
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.step import LORA_INPUTS, LoraSpec, LoraTarget
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.step_inputs import add_input, behind_caches

LINEAR = llmopt_ops.linear.default

# A weight that lies [K, N] is turned once, when it is bound; it is still the weight of its module.
_TURNS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.clone.default)


@dataclass(frozen=True)
class _Site:
    """A product and those of its parts that have a module of their own: (module, first column, columns)."""

    node: Node
    index: str
    parts: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class InsertLora(Pass):
    """Before: `y = linear(x, [wq, wk, wv], ...)`.
    After: `y = lora(linear(x, [wq, wk, wv], ...), x, lora_pool, lora_ranks, lora_scales, adapter_index, max_rank,
    targets, columns, sizes, offsets)`, where the last four say which columns each projection has, and where its A and
    B lie in a slot of the pool.

    Runs on a step graph, after linears are merged: x is read once for all parts. Adds the inputs LORA_INPUTS behind the
    caches; the pool's placeholder carries the `LoraSpec` as `meta["lora"]`. A target is the module that a weight is
    named after.
    """

    name = "insert_lora"
    preserves_signature = False
    required = True

    max_loras: int = 4
    max_rank: int = 16

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        named = {node.name: node for node in placeholders(graph)}
        if "lora_pool" in named:
            return report
        if "input_ids" not in named or "logits_indices" not in named:
            raise UnsupportedError("adapters are for step programs")
        sites = _sites(graph, named, context, report)
        if not sites:
            raise UnsupportedError(f"no product can have an adapter: {dict(report.skipped)}")
        targets = tuple(
            LoraTarget(module, int(tensor(site.node.args[0]).shape[-1]), size)
            for site in sites
            for module, _, size in site.parts
        )
        spec = LoraSpec(targets, self.max_loras, self.max_rank, tensor(sites[0].node).dtype)
        rewriter = Rewriter(graph)
        inputs = _add_inputs(graph, rewriter, spec, named["input_ids"])
        first = 0
        for site in sites:
            self._insert(rewriter, site, spec, inputs, first, named["logits_indices"])
            first += len(site.parts)
            report.matched += 1
        report.notes.append(f"{len(targets)} projections, {self.max_loras} adapters of rank {self.max_rank} or less")
        return report

    def _insert(
        self, rewriter: Rewriter, site: _Site, spec: LoraSpec, inputs: dict[str, Node], first: int, rows: Node
    ) -> None:
        numbers = range(first, first + len(site.parts))
        if site.index not in inputs:
            with rewriter.before(site.node):
                inputs[site.index] = rewriter.call(aten.index_select.default, inputs["adapter_index"], 0, rows)
        with rewriter.after(site.node):
            new = rewriter.call(
                llmopt_ops.lora.default,
                site.node,
                site.node.args[0],
                *(inputs[name] for name in ("lora_pool", "lora_ranks", "lora_scales", site.index)),
                self.max_rank,
                list(numbers),
                [column for _, column, _ in site.parts],
                [size for _, _, size in site.parts],
                [spec.offsets[number] for number in numbers],
            )
        site.node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _sites(graph: fx.Graph, named: dict[str, Node], context: PassContext, report: PassReport) -> list[_Site]:
    uses = Counter(_placeholder(weight) for node in nodes_of(graph, LINEAR) for weight in node.args[1])
    rows = {
        to_expr(tensor(named["input_ids"]).shape[0]): "adapter_index",
        to_expr(tensor(named["logits_indices"]).shape[0]): "logits_adapter_index",
    }
    sites: list[_Site] = []
    for node in nodes_of(graph, LINEAR):
        x = tensor(node.args[0])
        index = rows.get(sympy.prod([to_expr(size) for size in x.shape[:-1]]))
        if index is None:
            report.skipped["its rows are not the tokens of the step"] += 1
            continue
        if sites and tensor(node).dtype != tensor(sites[0].node).dtype:
            report.skipped["another dtype than the products before it"] += 1
            continue
        parts, column = [], 0
        for weight in node.args[1]:
            source, size = _placeholder(weight), int(tensor(weight).shape[0])
            name = str(source.meta["weight"]) if source is not None else ""
            if source is None or not name.endswith(".weight"):
                report.skipped["a weight is computed, or not named after a module"] += 1
            elif uses[source] > 1:
                report.skipped["one weight serves several products"] += 1
            else:
                parts.append((name.removesuffix(".weight"), column, size))
            column += size
        if parts:
            if not context.burn():
                break
            sites.append(_Site(node, index, tuple(parts)))
    return sites


def _placeholder(weight: Node) -> Node | None:
    """The parameter that is a product's weight as it is, or turned; None for what is computed otherwise."""
    while is_op(weight, *_TURNS):
        weight = weight.args[0]
    return weight if weight.op == "placeholder" and weight.meta.get("weight") else None


def _add_inputs(graph: fx.Graph, rewriter: Rewriter, spec: LoraSpec, ids: Node) -> dict[str, Node]:
    table = (len(spec.targets), spec.max_loras)
    described: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
        "adapter_index": ((tensor(ids).shape[0],), torch.int32),
        "lora_pool": ((spec.max_loras, spec.slot_elements), spec.dtype),
        "lora_ranks": (table, torch.int32),
        "lora_scales": (table, torch.float32),
    }
    before = behind_caches(placeholders(graph))
    made = {name: add_input(rewriter, before, name, *described[name], tensor(ids).device) for name in LORA_INPUTS}
    made["lora_pool"].meta["lora"] = spec
    return made
