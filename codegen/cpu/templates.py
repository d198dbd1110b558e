"""The C++ kernel templates: which ops they compute, what they refuse and why, and how a call of each is laid out.

Every function below takes a graph node and returns the kernel calls that compute it, or the reason why it cannot. The
order of operands is that of the comment at the head of the kernel's header.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx.node import Node

from llmopt.codegen.cpu.toolchain import headers_of
from llmopt.codegen.layout import Layout, layout
from llmopt.codegen.program import KernelSpec
from llmopt.compiler.graph import aten, is_op, tensor, to_expr
from llmopt.compiler.vocabulary import llmopt_ops

Expr: TypeAlias = sympy.Expr

FLOATS = {torch.float32: "float", torch.bfloat16: "llmopt::bf16", torch.float16: "llmopt::f16"}
_ACTIVATION = {
    "silu": "llmopt::Silu",
    "gelu_erf": "llmopt::GeluErf",
    "gelu_tanh": "llmopt::GeluTanh",
    "relu": "llmopt::Relu",
}

# Template name -> header. The names and argument tokens here are all that a program file may ask for.
HEADERS: dict[str, str] = {
    "linear": "linear.h",
    "batched_linear": "batched_linear.h",
    "grouped_linear": "grouped_linear.h",
    "moe": "moe.h",
    "lora": "lora.h",
    "attention": "attention.h",
    "attention_contiguous": "attention.h",
    "rms_norm": "norm.h",
    "layer_norm": "norm.h",
    "rope": "rope.h",
    "kv_write": "kv_write.h",
    "gated_act": "gated_act.h",
    "embedding": "embedding.h",
    "topk": "topk.h",
    "softmax": "topk.h",
    "cumsum": "scan.h",
    "index_copy": "index_copy.h",
    "largest": "largest.h",
}
# Templates that hand their results to an epilogue, if there is one (`Epilogue` of kernels/abi.h).
EPILOGUES = frozenset({"linear"})
# Template name -> C++ text, for kernels that users have registered (`registry.py`).
REGISTERED_SOURCES: dict[str, str] = {}
_NUMBERS = {**FLOATS, torch.int64: "std::int64_t", torch.int32: "std::int32_t", torch.bool: "bool"}
# Formats of a quantized KV cache: kernels/kv_formats.h.
KV_FORMATS = {"int8": "llmopt::i8", "fp8": "llmopt::f8e4m3", "int4": "llmopt::i4"}
ARGUMENT_TOKENS = frozenset(
    {*FLOATS.values(), *_ACTIVATION.values(), *KV_FORMATS.values()}
    | {"bool", "true", "false", "std::int64_t", "std::int32_t"}
)

MAX_HEAD_SIZE = 576  # kMaxHeadDim of kernels/kv_formats.h
LORA_PARTS = 8  # kMaxParts of kernels/lora.h


@dataclass(frozen=True)
class Workspace:
    """Temporary memory of one call, in bytes."""

    size: Expr


@dataclass(frozen=True)
class PlannedCall:
    """A kernel call on graph nodes: operands in order, `writes` the nodes among them whose memory it changes.

    `absorbs`: nodes that the call computes on the way, whose values nobody else needs; they get no memory.
    """

    kernel: KernelSpec
    tensors: tuple[Node | Workspace | None, ...]
    ints: tuple[Any, ...]
    floats: tuple[float, ...] = ()
    writes: tuple[Node, ...] = field(default=())
    absorbs: tuple[Node, ...] = ()


Plan = list[PlannedCall] | str


def _float(node: Node) -> str | None:
    return FLOATS.get(tensor(node).dtype)


def _elements(node: Node, count: int) -> list[Node | None]:
    """The `getitem` nodes of a tuple result by index; None for a part that nobody reads."""
    found: list[Node | None] = [None] * count
    for user in node.users:
        if is_op(user, operator.getitem):
            found[user.args[1]] = user
    return found


def _rows(node: Node) -> tuple[Expr, Expr] | str:
    rows = layout(node).rows()
    return rows if rows is not None else f"rows of {list(tensor(node).shape)} are not evenly spaced"


def _differ(given: Sequence[Expr], wanted: Sequence[Expr]) -> bool:
    """Whether sizes differ so that one is repeated along the other, or nothing fits.

    Two symbols may stand for one number: that they are equal is what PyTorch checks where the op was traced.
    """
    pairs = zip(given, wanted, strict=False)
    return len(given) != len(wanted) or any(
        a != b and (1 in (a, b) or (a.is_Integer and b.is_Integer)) for a, b in pairs
    )


def _is_row(values: Node | None, size: Expr) -> bool:
    """Whether an optional operand is what a kernel reads as `size` numbers, one behind the other."""
    return values is None or (not _differ(layout(values).sizes, (size,)) and layout(values).is_contiguous)


def plan_linear(node: Node, result: Node | None = None) -> Plan:
    """llmopt::linear over weight segments; `result` is where the product is written, when not to its own memory."""
    x, weights, biases = node.args
    out = node if result is None else result
    dtypes = {tensor(t).dtype for t in (x, *weights, *biases) if t is not None}
    if len(dtypes) > 1:
        return "operands of different dtypes"
    dtype = FLOATS.get(dtypes.pop())
    if dtype is None:
        return f"no kernel for {tensor(node).dtype}"
    source, target = _rows(x), _rows(out)
    if isinstance(source, str):
        return source
    if isinstance(target, str):
        return target
    for weight in (*weights, *(b for b in biases if b is not None)):
        if not layout(weight).is_contiguous:
            return "a weight is not contiguous"
    sizes = [to_expr(tensor(w).shape[0]) for w in weights]
    if any(not _is_row(b, n) for b, n in zip(biases, sizes, strict=True)):
        return "a bias is not one number for each column"
    segments = [t for pair in zip(weights, biases, strict=True) for t in pair]
    ints = (source[0], to_expr(tensor(x).shape[-1]), source[1], target[1], len(sizes), *sizes)
    absorbs = () if result is None else (node,)
    return [PlannedCall(KernelSpec("linear", (dtype,)), (x, out, *segments), ints, (), (out,), absorbs)]


def plan_lora(node: Node) -> Plan:
    """llmopt::lora, added where the product that nobody else reads is written."""
    y, x, pool, ranks, scales, index, most, targets, columns, sizes, offsets = node.args
    dtype = _float(node)
    if dtype is None or any(tensor(t).dtype != tensor(node).dtype for t in (x, y, pool)):
        return f"no kernel for {tensor(x).dtype}, {tensor(y).dtype} and adapters of {tensor(pool).dtype}"
    if not all(layout(t).is_contiguous for t in (pool, ranks, scales, index)):
        return "adapters or their index are not contiguous"
    rows = [layout(t).rows() for t in (x, y, node)]
    if None in rows:
        return "rows are not evenly spaced"
    own = y.target is llmopt_ops.linear.default and len(y.users) == 1
    product = plan_linear(y, node) if own else ""
    calls = [] if isinstance(product, str) else product
    (count, x_stride), (_, y_stride), (_, out_stride) = (row for row in rows if row is not None)
    slots, slot_size = (to_expr(s) for s in tensor(pool).shape)
    shape = (count, to_expr(tensor(x).shape[-1]), x_stride, y_stride, out_stride, to_expr(tensor(node).shape[-1]))
    parts = list(zip(targets, columns, sizes, offsets, strict=True))
    for begin in range(0, len(parts), LORA_PARTS):
        here = parts[begin : begin + LORA_PARTS]
        numbers = (len(here), *(number for part in here for number in part))
        space = Workspace(128 + 4 * count * (1 + len(here) * most))
        operands = (x, None if calls else y, node, index, pool, ranks, scales, space)
        calls.append(
            PlannedCall(KernelSpec("lora", (dtype,)), operands, (*shape, slots, slot_size, most, *numbers), (), (node,))
        )
    return calls


def plan_batched_linear(node: Node) -> Plan:
    """llmopt::batched_linear."""
    x, weight = node.args
    dtype = _float(x)
    if dtype is None or tensor(weight).dtype != tensor(x).dtype:
        return f"no kernel for {tensor(x).dtype} and {tensor(weight).dtype}"
    parts = [layout(t) for t in (x, weight, node)]
    for part in parts:
        if part.sizes[-1] != 1 and part.strides[-1] != 1:
            return "rows are not dense"
    n, k = parts[1].sizes[-2:]
    if n != 1 and sympy.expand(parts[1].strides[-2] - k) != 0:
        return "rows of the second factor are not one behind the other"
    batch, strides = _batch_levels(parts)
    if len(batch) > 3:
        return "more than three levels of batch"
    lead = 3 - len(batch)
    sizes = (*(sympy.Integer(1),) * lead, *batch)
    flat = [s for part in strides for s in (*(sympy.Integer(0),) * lead, *part)]
    ints = (*sizes, parts[0].sizes[-2], n, k, *flat, parts[0].strides[-2], parts[2].strides[-2])
    return [PlannedCall(KernelSpec("batched_linear", (dtype,)), (x, weight, node), ints, (), (node,))]


def _batch_levels(parts: Sequence[Layout]) -> tuple[list[Expr], list[list[Expr]]]:
    """Sizes of the batch of matrices and each operand's strides along it, merged as far as all of them allow."""
    count = len(parts[-1].sizes) - 2
    columns = []
    for part in parts:
        own = list(zip(part.sizes[:-2], part.strides[:-2], strict=True))
        own = [(sympy.Integer(1), sympy.Integer(0))] * (count - len(own)) + own
        columns.append([sympy.Integer(0) if size == 1 else stride for size, stride in own])
    batch: list[Expr] = []
    strides: list[list[Expr]] = [[] for _ in parts]
    for level, size in enumerate(parts[-1].sizes[:-2]):
        here = [column[level] for column in columns]
        if size == 1:
            continue
        if batch and all(sympy.expand(done[-1] - size * s) == 0 for done, s in zip(strides, here, strict=True)):
            batch[-1] *= size
            strides = [[*done[:-1], s] for done, s in zip(strides, here, strict=True)]
        else:
            batch.append(size)
            strides = [[*done, s] for done, s in zip(strides, here, strict=True)]
    return batch, strides


def plan_grouped_linear(node: Node) -> Plan:
    """llmopt::grouped_linear."""
    x, weights, ends = node.args
    dtype = _float(x)
    index = {torch.int64: "std::int64_t", torch.int32: "std::int32_t"}.get(tensor(ends).dtype)
    if dtype is None or index is None or tensor(weights).dtype != tensor(x).dtype:
        return f"no kernel for {tensor(x).dtype} and {tensor(weights).dtype}, ends of {tensor(ends).dtype}"
    if not layout(weights).is_contiguous or not layout(ends).is_contiguous:
        return "weights or ends are not contiguous"
    source, target = _rows(x), _rows(node)
    if isinstance(source, str):
        return source
    if isinstance(target, str):
        return target
    groups, n, k = (to_expr(s) for s in tensor(weights).shape)
    ints = (source[0], k, n, groups, source[1], target[1])
    return [PlannedCall(KernelSpec("grouped_linear", (dtype, index)), (x, weights, ends, node), ints, (), (node,))]


def _plan_norm(node: Node, x: Node, residual: Node | None, rest: tuple[Any, ...], parts: list[Node | None]) -> Plan:
    out, total = parts
    is_rms = "rms_norm" in str(node.target)
    weight, bias = (rest[0], None) if is_rms else rest[:2]
    dtype = _float(x)
    weight_dtype = _float(weight) if weight is not None else dtype
    if dtype is None or weight_dtype is None or (bias is not None and _float(bias) != weight_dtype):
        return "dtypes of input, weight and bias are not supported together"
    cols = to_expr(tensor(x).shape[-1])
    if not _is_row(weight, cols) or not _is_row(bias, cols):
        return "weight or bias is not one number for each column, one behind the other"
    source = layout(x).two_levels()
    if source is None:
        return f"rows of {list(tensor(x).shape)} are not evenly spaced"
    if residual is not None and not (layout(residual).is_contiguous and layout(x).is_contiguous):
        return "the residual is not contiguous"
    if out is None:
        return "the normalised value is not used"
    # The output is fresh: contiguous in the input's order of rows.
    target = layout(out).two_levels()
    if target is None or target[:2] != source[:2]:
        outer, inner = source[:2]
        if not layout(out).is_contiguous:
            return "the output is not contiguous"
        target = (outer, inner, inner * cols, cols)
    ints = (source[0], source[1], cols, *source[2:], *target[2:])
    if is_rms:
        eps, offset, cast_first = rest[1:4]
        kernel = KernelSpec("rms_norm", (dtype, weight_dtype, "true" if cast_first else "false"))
        operands: tuple[Any, ...] = (x, residual, weight, out, total)
    else:
        eps, offset = rest[2], 0.0
        kernel = KernelSpec("layer_norm", (dtype, weight_dtype))
        operands = (x, residual, weight, bias, out, total)
    writes = tuple(n for n in (out, total) if n is not None)
    return [PlannedCall(kernel, operands, ints, (float(eps), float(offset)), writes)]


def plan_norm(node: Node) -> Plan:
    """llmopt::rms_norm and llmopt::layer_norm."""
    return _plan_norm(node, node.args[0], None, node.args[1:], [node, None])


def plan_add_norm(node: Node) -> Plan:
    """llmopt::add_rms_norm and llmopt::add_layer_norm."""
    return _plan_norm(node, node.args[0], node.args[1], node.args[2:], _elements(node, 2))


def _tokens_heads(node: Node) -> tuple[Expr, Expr, Expr] | str:
    """(tokens, token stride, head stride) of `[..., H, D]`."""
    shape = layout(node)
    merged = shape.levels(2)
    if merged is None or len(merged) > 1:
        return f"tokens of {list(tensor(node).shape)} are not evenly spaced"
    tokens, stride = merged[0] if merged else (sympy.Integer(1), sympy.Integer(0))
    return tokens, stride, shape.strides[-2]


def _broadcasts(table: Node, x: Node) -> bool:
    """Whether `table[1, S, R]` serves every sequence of `x[B, S, H, D]`."""
    few, many = tensor(table).shape, tensor(x).shape
    return len(few) == 3 and len(many) == 4 and few[0] == 1 and to_expr(few[1]) == to_expr(many[1])


def plan_rope(node: Node) -> Plan:
    """llmopt::rope."""
    x, cos, sin, interleaved = node.args
    dtype, table = _float(x), _float(cos)
    if dtype is None or table is None or _float(sin) != table:
        return f"no kernel for {tensor(node).dtype}"
    source, target = _tokens_heads(x), _tokens_heads(node)
    rows = [_rows(t) for t in (cos, sin)]
    if isinstance(source, str) or isinstance(target, str) or isinstance(rows[0], str) or rows[0] != rows[1]:
        return "tokens are not evenly spaced"
    # The sequences of a batch may share one table; then its rows repeat.
    if rows[0][0] != source[0] and not _broadcasts(cos, x):
        return "the tables of angles do not match the tokens"
    heads, size = (to_expr(s) for s in tensor(x).shape[-2:])
    rotary = to_expr(tensor(cos).shape[-1])
    ints = (source[0], heads, size, rotary, *source[1:], *target[1:], rows[0][1], rows[0][0])
    kernel = KernelSpec("rope", (dtype, table, "true" if interleaved else "false"))
    return [PlannedCall(kernel, (x, cos, sin, node), ints, (), (node,))]


def _per_head(values: Node | None, heads: Expr) -> bool:
    """Whether an optional number per head is what the attention kernels read."""
    return values is None or (tensor(values).dtype == torch.float32 and _is_row(values, heads))


def _fit_heads(*sizes: Expr) -> bool:
    """Whether the attention kernels have room for heads of these sizes."""
    return all(size.is_Integer and size <= MAX_HEAD_SIZE for size in sizes)


def plan_paged_attention(node: Node) -> Plan:
    """llmopt::paged_attention: the cache is written, then read."""
    q, k, v, k_cache, v_cache, slots, tables, starts, lengths, scale, softcap, window, slopes, sinks = node.args[:14]
    kv_dtype = node.args[14] if len(node.args) > 14 else "auto"
    dtype = _float(q)
    stored = tensor(q).dtype if kv_dtype == "auto" else torch.uint8
    if dtype is None or any(tensor(t).dtype != tensor(q).dtype for t in (k, v)):
        return "queries, keys and values differ in dtype"
    if any(tensor(t).dtype != stored for t in (k_cache, v_cache)):
        return f"the cache is not {stored}"
    if not all(_per_head(t, to_expr(tensor(q).shape[-2])) for t in (slopes, sinks)):
        return "slopes or sinks are not a contiguous float32 for each head"
    if not all(layout(t).is_contiguous for t in (k_cache, v_cache, slots, tables, starts, lengths)):
        return "the cache or the batch's description is not contiguous"
    places = [p for p in map(_tokens_heads, (q, k, v, node)) if not isinstance(p, str)]
    if len(places) < 4:
        return "tokens are not evenly spaced"
    (tokens, *q_strides), (_, *k_strides), (_, *v_strides), (_, *out_strides) = places
    blocks, groups, block_size = (to_expr(s) for s in tensor(k_cache).shape[:3])
    size, value_size, heads = (to_expr(s) for s in (tensor(k).shape[-1], tensor(v).shape[-1], tensor(q).shape[-2]))
    if not _fit_heads(size, value_size):
        return f"heads of symbolic size, or larger than {MAX_HEAD_SIZE}"
    sequences, width = (to_expr(s) for s in tensor(tables).shape)
    arguments = (dtype,) if kv_dtype == "auto" else (dtype, KV_FORMATS[kv_dtype])
    write = PlannedCall(
        KernelSpec("kv_write", arguments),
        (k, v, slots, k_cache, v_cache),
        (tokens, groups, size, value_size, block_size, blocks, *k_strides, *v_strides),
        (),
        (k_cache, v_cache),
    )
    read = PlannedCall(
        KernelSpec("attention", arguments),
        (q, k_cache, v_cache, tables, starts, lengths, node, slopes, sinks),
        (
            *(sequences, heads, groups, size, value_size, block_size, width),
            *(*q_strides, *out_strides, window, tokens, blocks),
        ),
        (float(scale), float(softcap)),
        (node,),
    )
    return [write, read]


def plan_attention(node: Node) -> Plan:
    """llmopt::attention over contiguous keys."""
    q, k, v, mask, causal, scale, softcap, window, slopes, sinks = node.args
    if not all(_per_head(t, to_expr(tensor(q).shape[-2])) for t in (slopes, sinks)):
        return "slopes or sinks are not a contiguous float32 for each head"
    dtype = _float(q)
    if dtype is None or any(tensor(t).dtype != tensor(q).dtype for t in (k, v)):
        return f"no kernel for {tensor(node).dtype}"
    layouts = [layout(t) for t in (q, k, v, node)]
    if any(t.sizes[-1] != 1 and t.strides[-1] != 1 for t in layouts):
        return "heads are not contiguous"
    mask_dtype, mask_strides = dtype, [sympy.Integer(0)] * 4
    if mask is not None:
        kinds = {**FLOATS, torch.bool: "bool"}
        mask_dtype = kinds.get(tensor(mask).dtype, "")
        if not mask_dtype:
            return f"no kernel for a mask of {tensor(mask).dtype}"
        shape = layout(mask)
        pairs = zip(shape.sizes, shape.strides, strict=True)
        mask_strides = [sympy.Integer(0) if n == 1 else s for n, s in pairs]
        mask_strides = [sympy.Integer(0)] * (4 - len(mask_strides)) + mask_strides
    batch, length, heads, size = layouts[0].sizes
    keys, groups, value_size = layouts[1].sizes[1], layouts[1].sizes[2], layouts[2].sizes[3]
    shapes = ((batch, keys, groups, size), (batch, keys, groups, value_size))
    if any(_differ(t.sizes, shape) for t, shape in zip(layouts[1:3], shapes, strict=True)):
        return "queries, keys and values differ in batch, length or heads"
    if not _fit_heads(size, value_size):
        return f"heads of symbolic size, or larger than {MAX_HEAD_SIZE}"
    strides = [s for t in layouts for s in t.strides[:3]]
    ints = (batch, length, keys, heads, groups, size, value_size, *strides, *mask_strides, int(causal), 0, window)
    kernel = KernelSpec("attention_contiguous", (dtype, mask_dtype))
    return [PlannedCall(kernel, (q, k, v, mask, node, slopes, sinks), ints, (float(scale), float(softcap)), (node,))]


def plan_gated_act(node: Node) -> Plan:
    """llmopt::gated_act."""
    gate, up, act = node.args
    dtype = _float(gate)
    if dtype is None or act not in _ACTIVATION:
        return f"no kernel for {act} in {tensor(node).dtype}"
    rows = [_rows(t) for t in (gate, up, node)]
    if any(isinstance(r, str) for r in rows):
        return "rows are not evenly spaced"
    ints = (rows[0][0], to_expr(tensor(node).shape[-1]), *(r[1] for r in rows))
    kernel = KernelSpec("gated_act", (dtype, _ACTIVATION[act]))
    return [PlannedCall(kernel, (gate, up, node), ints, (), (node,))]


def plan_moe(node: Node) -> Plan:
    """llmopt::moe."""
    x, ids, weights, gate_up, down, act = node.args
    dtype, router = _float(x), _float(weights)
    if dtype is None or router is None or act not in _ACTIVATION:
        return f"no kernel for {act} in {tensor(node).dtype}"
    if any(tensor(t).dtype != tensor(x).dtype for t in (gate_up, down)):
        return "expert weights of another dtype"
    if not all(layout(t).is_contiguous for t in (ids, weights, gate_up, down)):
        return "ids, router weights or expert weights are not contiguous"
    source, target = _rows(x), _rows(node)
    if isinstance(source, str) or isinstance(target, str):
        return "rows are not evenly spaced"
    rows, k = (to_expr(s) for s in tensor(ids).shape)
    experts, hidden, inner = (to_expr(s) for s in tensor(down).shape)
    ints = (rows, hidden, inner, experts, k, source[1], target[1])
    workspace = Workspace(moe_workspace_bytes(rows, k, hidden, inner, experts, tensor(x).element_size()))
    kernel = KernelSpec("moe", (dtype, router, _ACTIVATION[act]))
    operands = (x, ids, weights, gate_up, down, node, workspace)
    return [PlannedCall(kernel, operands, ints, (), (node,))]


def moe_workspace_bytes(rows: Expr, k: Expr, hidden: Expr, inner: Expr, experts: Expr, itemsize: int) -> Expr:
    """Bytes of temporary memory of the moe kernel; see kernels/moe.h."""
    slots = rows * k
    return 128 + 4 * (2 * slots + experts + 1) + slots * (2 * inner + hidden) * itemsize


def plan_embedding(node: Node) -> Plan:
    """aten.embedding, and aten.index_select of rows, which is the same."""
    if is_op(node, aten.embedding.default):
        table, ids = node.args[:2]
        if tensor(table).ndim != 2:
            return "the table is no matrix"
    else:
        table, dim, ids = node.args[:3]
        sizes = layout(table).sizes
        if len(sizes) < 2 or dim % len(sizes) != len(sizes) - 2 or any(s != 1 for s in sizes[:-2]):
            return "index_select of something else than rows"
    index = {torch.int64: "std::int64_t", torch.int32: "std::int32_t"}.get(tensor(ids).dtype)
    dtype = _float(table)
    if dtype is None or index is None:
        return f"no kernel for {tensor(node).dtype}"
    if not layout(table).is_contiguous or not layout(ids).is_contiguous:
        return "table or ids are not contiguous"
    target = _rows(node)
    if isinstance(target, str):
        return target
    rows, width = (to_expr(s) for s in tensor(table).shape[-2:])
    ints = (layout(ids).numel, width, rows, target[1])
    return [PlannedCall(KernelSpec("embedding", (dtype, index)), (ids, table, node), ints, (), (node,))]


def _is_last(node: Node, dim: Any) -> bool:
    return dim in (-1, tensor(node).ndim - 1)


def plan_topk(node: Node) -> Plan:
    """aten.topk over the last dimension, sorted, largest first."""
    x, k, dim, largest, in_order = (*node.args, *(-1, True, True)[len(node.args) - 2 :])[:5]
    dtype = _float(x)
    if dtype is None or not _is_last(x, dim) or not largest:
        return "topk of another dimension, dtype or order"
    source = _rows(x)
    if isinstance(source, str):
        return source
    values, indices = _elements(node, 2)
    ints = (source[0], to_expr(tensor(x).shape[-1]), to_expr(k), source[1], int(in_order))
    places = Workspace(8 * source[0] * to_expr(k)) if indices is None else indices  # the kernel sorts there
    writes = tuple(part for part in (values, indices) if part is not None)
    return [PlannedCall(KernelSpec("topk", (dtype,)), (x, values, places), ints, (), writes)]


def plan_softmax(node: Node) -> Plan:
    """aten.softmax over the last dimension."""
    x, dim = node.args[:2]
    dtype, target_dtype = _float(x), _float(node)
    if dtype is None or target_dtype is None or not _is_last(x, dim):
        return "softmax of another dimension or dtype"
    source, target = _rows(x), _rows(node)
    if isinstance(source, str) or isinstance(target, str):
        return "rows are not evenly spaced"
    ints = (source[0], to_expr(tensor(x).shape[-1]), source[1], target[1])
    return [PlannedCall(KernelSpec("softmax", (dtype, target_dtype)), (x, node), ints, (), (node,))]


def plan_cumsum(node: Node) -> Plan:
    """aten.cumsum over the last dimension."""
    x, dim = node.args[:2]
    dtypes = [_NUMBERS.get(tensor(t).dtype) for t in (x, node)]
    if None in dtypes or dtypes[1] == "bool" or (dtypes[0] in FLOATS.values()) != (dtypes[1] in FLOATS.values()):
        return f"no kernel for sums of {tensor(x).dtype} in {tensor(node).dtype}"
    if not _is_last(x, dim):
        return "cumsum of another dimension"
    source, target = _rows(x), _rows(node)
    if isinstance(source, str) or isinstance(target, str):
        return "rows are not evenly spaced"
    ints = (source[0], to_expr(tensor(x).shape[-1]), source[1], target[1])
    return [PlannedCall(KernelSpec("cumsum", (str(dtypes[0]), str(dtypes[1]))), (x, node), ints, (), (node,))]


def plan_index_copy(node: Node) -> Plan:
    """aten.index_copy."""
    x, dim, index, source = node.args
    dtype = _NUMBERS.get(tensor(x).dtype)
    if dtype is None or tensor(index).dtype != torch.int64:
        return f"no kernel for {tensor(x).dtype} indexed by {tensor(index).dtype}"
    if not all(layout(t).is_contiguous for t in (x, index, source, node)):
        return "operands are not contiguous"
    sizes = layout(x).sizes
    if not sizes:
        return "a tensor without dimensions"
    at = dim % len(sizes)
    ints = (sympy.prod(sizes[:at]), sizes[at], sympy.prod(sizes[at + 1 :]), layout(index).numel)
    return [PlannedCall(KernelSpec("index_copy", (dtype,)), (x, index, source, node), ints, (), (node,))]


PLANNERS: dict[Any, Callable[[Node], Plan | None]] = {
    llmopt_ops.linear.default: plan_linear,
    llmopt_ops.batched_linear.default: plan_batched_linear,
    llmopt_ops.grouped_linear.default: plan_grouped_linear,
    llmopt_ops.rms_norm.default: plan_norm,
    llmopt_ops.layer_norm.default: plan_norm,
    llmopt_ops.add_rms_norm.default: plan_add_norm,
    llmopt_ops.add_layer_norm.default: plan_add_norm,
    llmopt_ops.rope.default: plan_rope,
    llmopt_ops.paged_attention.default: plan_paged_attention,
    llmopt_ops.attention.default: plan_attention,
    llmopt_ops.gated_act.default: plan_gated_act,
    llmopt_ops.moe.default: plan_moe,
    llmopt_ops.lora.default: plan_lora,
    aten.embedding.default: plan_embedding,
    aten.index_select.default: plan_embedding,
    aten.topk.default: plan_topk,
    aten.softmax.int: plan_softmax,
    aten.cumsum.default: plan_cumsum,
    aten.index_copy.default: plan_index_copy,
}


def plan_template(node: Node) -> Plan | None:
    """The calls that compute a node, the reason why not, or None for an op without a template."""
    planner = PLANNERS.get(node.target)
    return planner(node) if planner is not None else None


def source_of(spec: KernelSpec, entry: str, batch_invariant: bool = False) -> str:
    """The translation unit of a template instance; `batch_invariant`: one algorithm for any number of rows.

    That is said to every source that may ask: two that share a function must agree, for a library has it once.
    """
    arguments = f"<{', '.join(spec.arguments)}>" if spec.arguments else ""
    call = f"llmopt::{spec.template}{arguments}(args, worker);"
    registered = REGISTERED_SOURCES.get(spec.template)
    head = f'#include "{HEADERS[spec.template]}"' if registered is None else registered
    define = batch_invariant and "invariance.h" in headers_of(head)
    head = f"#define LLMOPT_BATCH_INVARIANT 1\n{head}" if define else head
    return f"{head}\nLLMOPT_KERNEL({entry}) {{ {call} }}\n"


__all__ = ["Layout", "PlannedCall", "Workspace", "plan_template", "source_of"]
