"""Turns a cache-less causal model into one step over a ragged batch with a paged KV cache.

The captured graph computes `logits[1, S, V]` from `input_ids[1, S]`. Nothing in it knows about caches. If all that
mixes positions is causal attention, then the S rows may as well be the tokens of many requests, provided that attention
looks up each request's own keys and that positions are given instead of counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import (
    Rewriter,
    aten,
    is_op,
    is_tensor,
    location,
    nodes_of,
    outputs,
    placeholders,
    refresh_values,
    tensor,
    to_expr,
)
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.step import STEP_INPUTS, WINDOW_INPUTS, CacheSpec
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.matching import depends_only_on
from llmopt.passes.positions import replace_positions
from llmopt.passes.row_locality import ATTENTION, RowLocality, is_row_map
from llmopt.passes.step_inputs import add_input, new_size


@dataclass
class StepInputs:
    """The placeholders of a step graph, by name; caches in layer order, K and V in turn."""

    nodes: dict[str, Node] = field(default_factory=dict)
    caches: list[CacheSpec] = field(default_factory=list)


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Before: `logits[1, S, V] = f(input_ids[1, S])` with `attention(q, k, v, causal)` inside.
    After: `logits[R, V] = f(input_ids[T], positions[T], slot_mapping[T], cu_seqlens_q[B + 1], seq_lens[B],
    block_tables[B, N], logits_indices[R], k_cache_0, v_cache_0, ...)` with `paged_attention`.

    Counted positions (`positions.py`) become `positions`; the rest of the graph is proved row-local;
    logits are computed only for the rows `logits_indices`. Where only some layers have a window, these use pages of
    their own (`WINDOW_INPUTS`). What cannot be proved raises UnsupportedError with the op
    and the line of the user's model. `kv_dtype` is how pages store keys and values (`compiler/kv_formats.py`).
    """

    name = "insert_kv_cache"
    preserves_signature = False
    required = True

    block_size: int = 16
    kv_dtype: str = "auto"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        size, ids = _inputs(graph)
        symbol = to_expr(tensor(ids).shape[1])
        if not isinstance(symbol, sympy.Symbol):
            raise UnsupportedError("the sequence length was specialised during capture")
        rewriter = Rewriter(graph)
        step = _add_inputs(graph, rewriter, ids, size, self.block_size)
        graph.eliminate_dead_code()
        _check_masks(graph, step)
        report.matched += replace_positions(graph, rewriter, step.nodes["positions"], symbol)
        _replace_attention(graph, rewriter, step, symbol, self, report)
        _gather_logits(graph, rewriter, step, symbol)
        graph.eliminate_dead_code()
        refresh_values(graph)
        stored = "" if self.kv_dtype == "auto" else f", keys and values in {self.kv_dtype}"
        windowed = sum(spec.group for spec in step.caches)
        apart = f", {windowed} of them with a window and pages of their own" if windowed else ""
        report.notes.append(f"{len(step.caches)} attention layers{stored}{apart}")
        return report


def _inputs(graph: fx.Graph) -> tuple[Node | None, Node]:
    """The sequence length and the token ids: all that a cache-less forward may take besides weights."""
    user = [n for n in placeholders(graph) if not n.meta.get("weight")]
    ids = [n for n in user if is_tensor(n)]
    sizes = [n for n in user if not is_tensor(n)]
    if len(ids) != 1 or len(sizes) > 1 or tensor(ids[0]).ndim != 2 or tensor(ids[0]).shape[0] != 1:
        names = [n.name for n in user]
        raise UnsupportedError(f"a step graph is made from input_ids[1, S], not from {names}")
    return (sizes[0] if sizes else None), ids[0]


def _add_inputs(graph: fx.Graph, rewriter: Rewriter, ids: Node, size: Node | None, block_size: int) -> StepInputs:
    step = StepInputs()
    tokens = tensor(ids).shape[1]
    seqs, blocks, rows = (new_size(rewriter, n) for n in ("num_seqs", "max_blocks", "num_rows"))
    shapes: dict[str, tuple[Any, ...]] = {
        "input_ids": (tokens,),
        "positions": (tokens,),
        "slot_mapping": (tokens,),
        "cu_seqlens_q": (seqs + 1,),
        "seq_lens": (seqs,),
        "block_tables": (seqs, blocks),
        "logits_indices": (rows,),
    }
    first = placeholders(graph)[0]
    for name, dtype in STEP_INPUTS.items():
        step.nodes[name] = add_input(rewriter, first, name, shapes[name], dtype, tensor(ids).device)
    after = placeholders(graph)[-1].next
    with rewriter.before(after):
        flat = rewriter.call(aten.unsqueeze.default, step.nodes["input_ids"], 0)
        ids.replace_all_uses_with(flat)
        if size is not None:
            size.replace_all_uses_with(rewriter.call(aten.sym_size.int, step.nodes["input_ids"], 0))
    for node in (ids, size):
        if node is not None:
            graph.erase_node(node)
    return step


def _check_masks(graph: fx.Graph, step: StepInputs) -> None:
    """A mask of positions alone has become a rule before, if it follows one."""
    counts = {n for n in graph.nodes if is_op(n, aten.sym_size.int) and n.args[0] is step.nodes["input_ids"]}
    formulas = depends_only_on(graph.nodes, counts)
    for node in nodes_of(graph, ATTENTION):
        if node.args[3] in formulas:
            raise UnsupportedError(
                "the model cannot run over a paged KV cache: an attention mask follows no known rule",
                operation=str(node.args[3].target),
                location=location(node),
            )


def _replace_attention(
    graph: fx.Graph,
    rewriter: Rewriter,
    step: StepInputs,
    symbol: sympy.Symbol,
    settings: InsertKVCache,
    report: PassReport,
) -> None:
    rows = RowLocality(symbol)
    for node in graph.nodes:
        if node.op == "call_function":
            rows.check(node)
    first_weight = next(n for n in placeholders(graph) if n.name not in STEP_INPUTS)
    nodes = list(nodes_of(graph, ATTENTION))
    grouped = len({bool(node.args[7]) for node in nodes}) == 2
    num_blocks = [new_size(rewriter, name) for name in ("num_blocks", "num_window_blocks")[: 1 + grouped]]
    if grouped:
        _add_window_inputs(rewriter, step, first_weight)
    for layer, node in enumerate(nodes):
        q, k, v, mask, causal, scale, softcap, window, slopes, sinks = node.args
        if mask is not None or not causal:
            why = "attention is not causal" if mask is None else "an attention mask depends on data"
            raise UnsupportedError(
                f"the model cannot run over a paged KV cache: {why}",
                operation=str(node.target),
                location=location(node),
            )
        heads, key_size, value_size = (int(s) for s in (*tensor(k).shape[2:], tensor(v).shape[3]))
        kept = (int(window), settings.kv_dtype, int(grouped and window > 0))
        spec = CacheSpec(layer, heads, key_size, value_size, tensor(k).dtype, *kept)
        step.caches.append(spec)
        caches = []
        for name, width in zip((f"k_cache_{layer}", f"v_cache_{layer}"), spec.row_sizes, strict=True):
            shape = (num_blocks[spec.group], heads, settings.block_size, width)
            cache = add_input(rewriter, first_weight, name, shape, spec.storage_dtype, tensor(k).device)
            cache.meta["cache"] = spec
            caches.append(cache)
        pages = tuple(WINDOW_INPUTS) if spec.group else ("slot_mapping", "block_tables")
        lookup = [step.nodes[n] for n in (*pages, "cu_seqlens_q", "seq_lens")]
        with rewriter.before(node):
            new = rewriter.call(
                llmopt_ops.paged_attention.default,
                *(q, k, v, *caches, *lookup, scale, softcap, window, slopes, sinks),
                *(() if settings.kv_dtype == "auto" else (settings.kv_dtype,)),
            )
        rewriter.replace(node, new)
        report.matched += 1
    if not step.caches:
        raise UnsupportedError(
            "no attention was recognised, so there is nothing to cache; see the near misses in explain"
        )


def _add_window_inputs(rewriter: Rewriter, step: StepInputs, before: Node) -> None:
    """The block tables of layers with a window: of the others' shapes, since both list every page of a request."""
    for name, dtype in WINDOW_INPUTS.items():
        like = tensor(step.nodes[name.removeprefix("window_")])
        step.nodes[name] = add_input(rewriter, before, name, like.shape, dtype, like.device)


def _gather_logits(graph: fx.Graph, rewriter: Rewriter, step: StepInputs, symbol: sympy.Symbol) -> None:
    """Chooses the wanted rows as early as possible after the last attention: before the head and its norm."""
    logits = outputs(graph)[0]
    rows = RowLocality(symbol)
    top = logits
    while is_row_map(top):
        inputs = [n for n in top.all_input_nodes if is_tensor(n) and rows.row_dim(tensor(n), n) is not None]
        if len(inputs) != 1 or len(inputs[0].users) != 1:
            break
        top = inputs[0]
    dim = rows.row_dim(tensor(top), top)
    if dim is None or tensor(logits).ndim != 3 or rows.row_dim(tensor(logits), logits) != 1:
        raise UnsupportedError("the model's first output is not logits[1, S, V]")
    with rewriter.after(top):
        chosen = rewriter.call(aten.index_select.default, top, dim, step.nodes["logits_indices"])
    top.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    logits = outputs(graph)[0]
    refresh_values(graph)
    output = graph.output_node()
    with rewriter.before(output):
        flat = rewriter.call(aten.squeeze.dim, logits, 0)
    output.args = ([flat],)
