"""The Triton kernel templates: how a planned call becomes launches, and what the GPU side refuses and why.

A call is planned once for all targets (`codegen/cpu/templates.py`): operands, sizes and strides of an op do not depend
on who computes it. What differs is here: whether a Triton kernel takes the call, temporary memory of its own, and tile
shapes and grids, which are chosen at launch from the sizes of the call and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from llmopt.codegen.cpu import templates as planning
from llmopt.codegen.cpu.templates import FLOATS, Plan, PlannedCall, Workspace
from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.triton.attention import CONTIGUOUS, MAX_HEAD_SIZE, PAGED, paged_workspace
from llmopt.codegen.triton.calls import ACTIVATIONS, Call, ceil_div, power
from llmopt.codegen.triton.launch import Device, Launch
from llmopt.codegen.triton.lora import LORA
from llmopt.codegen.triton.moe import MOE, moe_workspace
from llmopt.codegen.triton.products import BATCHED, GROUPED, LINEAR, linear_workspace

MAX_COLUMNS = 32768  # of a norm's row, which one program holds whole
MAX_TOPK = 16384  # likewise


# ---- launches -------------------------------------------------------------------------------------------------------


def _norm(call: Call) -> list[Launch]:
    mean = call.template == "layer_norm"
    x, residual, weight, *rest = call.tensors
    bias, (out, total) = (rest[0], rest[1:]) if mean else (None, rest)
    outer, inner, cols, x_outer, x_inner, out_outer, out_inner = call.ints
    constants = {
        "BLOCK": power(cols),
        "RESIDUAL": residual is not None,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "TOTAL": total is not None,
        "MEAN": mean,
        "CAST_FIRST": not mean and call.arguments[2] == "true",
    }
    tensors = call.present(x, residual, weight, bias, out, total)
    args = (*tensors, inner, cols, x_outer, x_inner, out_outer, out_inner, *call.floats)
    return [Launch("rowwise.norm", (outer * inner,), args, constants, warps=min(16, max(1, power(cols) // 512)))]


def _rope(call: Call) -> list[Launch]:
    tokens, heads, size, rotary, *strides = call.ints
    width = power(size)
    block = max(1, min(power(heads), 1024 // width))
    constants = {
        "SIZE": size,
        "ROTARY": rotary,
        "BLOCK_H": block,
        "BLOCK_D": width,
        "INTERLEAVED": call.arguments[2] == "true",
    }
    grid = (tokens, ceil_div(heads, block))
    return [Launch("rowwise.rope", grid, (*call.tensors, heads, *strides), constants)]


def _kv_write(call: Call) -> list[Launch]:
    tokens, groups, size, value_size, page, blocks, *strides = call.ints
    args = (*call.tensors, call.status, groups, size, value_size, page, blocks, *strides)
    constants = {"BLOCK": power(max(size, value_size))}
    return [Launch("attention.kv_write", (tokens, groups), args, constants, warps=1)]


def _gated_act(call: Call) -> list[Launch]:
    rows, cols, *strides = call.ints
    block = min(1024, power(cols))
    constants = {"BLOCK": block, "ACT": ACTIVATIONS[call.arguments[1]]}
    return [Launch("rowwise.gated_act", (rows, ceil_div(cols, block)), (*call.tensors, cols, *strides), constants)]


def _embedding(call: Call) -> list[Launch]:
    count, width, rows, stride = call.ints
    block = min(1024, power(width))
    args = (*call.tensors, call.status, width, rows, stride)
    return [Launch("rowwise.embedding", (count, ceil_div(width, block)), args, {"BLOCK": block})]


def _topk(call: Call) -> list[Launch]:
    rows, cols, k, stride, _ = call.ints
    x, values, places = call.tensors
    # Where nobody reads the indices, the kernel has a workspace for them.
    places = places.view(torch.int64)
    args = (x, *call.present(values), places, cols, k, stride)
    constants = {"BLOCK": power(cols), "VALUES": values is not None}
    return [Launch("rowwise.topk", (rows,), args, constants, warps=min(8, max(1, power(cols) // 256)))]


def _softmax(call: Call) -> list[Launch]:
    rows, cols, *strides = call.ints
    return [Launch("rowwise.softmax", (rows,), (*call.tensors, cols, *strides), {"BLOCK": min(2048, power(cols))})]


def _cumsum(call: Call) -> list[Launch]:
    rows, cols, *strides = call.ints
    constants = {"BLOCK": min(1024, power(cols)), "FLOAT": call.tensors[1].is_floating_point()}
    return [Launch("rowwise.cumsum", (rows,), (*call.tensors, cols, *strides), constants)]


def _index_copy(call: Call) -> list[Launch]:
    outer, size, inner, count = call.ints
    x, index, source, out = call.tensors
    numel, block = outer * size * inner, min(1024, power(inner))
    args = (index, source, out, call.status, size, inner, count)
    return [
        Launch("rowwise.copy", (ceil_div(numel, 1024),), (x, out, numel), {"BLOCK": 1024}),
        Launch("rowwise.index_copy", (outer * count, ceil_div(inner, block)), args, {"BLOCK": block}),
    ]


# ---- what is taken --------------------------------------------------------------------------------------------------

_FLOAT_TOKENS = frozenset(FLOATS.values())
_INT_TOKENS = frozenset({"std::int64_t", "std::int32_t"})
_FLAGS = frozenset({"true", "false"})
_ACTS = frozenset(ACTIVATIONS)
_NUMBERS = _FLOAT_TOKENS | _INT_TOKENS | {"bool"}

Check = Callable[[PlannedCall], str | None]
Replan = Callable[[PlannedCall], PlannedCall]


def _number(size: Any) -> int | None:
    return int(size) if isinstance(size, int) or getattr(size, "is_Integer", False) else None


def _limit(position: int, most: int, what: str) -> Check:
    """The int at `position` must be a number, at most `most`: one program holds so many elements."""

    def check(call: PlannedCall) -> str | None:
        size = _number(call.ints[position])
        return None if size is not None and size <= most else f"the GPU kernel takes {what} of at most {most}"

    return check


def _heads(*positions: int) -> Check:
    def check(call: PlannedCall) -> str | None:
        sizes = [_number(call.ints[p]) for p in positions]
        fine = all(size is not None and size <= MAX_HEAD_SIZE for size in sizes)
        return None if fine else f"the GPU kernel takes heads of at most {MAX_HEAD_SIZE}"

    return check


def _any(call: PlannedCall) -> str | None:
    return None


def _workspace(size: Callable[[PlannedCall], sympy.Expr | None]) -> Replan:
    """Temporary memory as the GPU kernel needs it: the last operand, in place of one for the CPU."""

    def replan(call: PlannedCall) -> PlannedCall:
        tensors = tuple(t for t in call.tensors if not isinstance(t, Workspace))
        needed = size(call)
        return replace(call, tensors=(*tensors, None if needed is None else Workspace(needed)))

    return replan


@dataclass(frozen=True)
class Template:
    """A kernel template: its module in `kernels/`, the argument tokens that it takes, and what it does with a call."""

    module: str
    tokens: tuple[frozenset[str], ...]
    launches: Callable[[Call], list[Launch]]
    check: Check = _any
    replan: Replan = lambda call: call


TEMPLATES: dict[str, Template] = {
    "linear": Template("linear", (_FLOAT_TOKENS,), LINEAR, replan=_workspace(linear_workspace)),
    "batched_linear": Template("linear", (_FLOAT_TOKENS,), BATCHED),
    "grouped_linear": Template("linear", (_FLOAT_TOKENS, _INT_TOKENS), GROUPED),
    "moe": Template("moe", (_FLOAT_TOKENS, _FLOAT_TOKENS, _ACTS), MOE, replan=_workspace(moe_workspace)),
    "lora": Template("lora", (_FLOAT_TOKENS,), LORA),
    "attention": Template("attention", (_FLOAT_TOKENS,), PAGED, _heads(3, 4), _workspace(paged_workspace)),
    "attention_contiguous": Template("attention", (_FLOAT_TOKENS, _FLOAT_TOKENS | {"bool"}), CONTIGUOUS, _heads(5, 6)),
    "rms_norm": Template("rowwise", (_FLOAT_TOKENS, _FLOAT_TOKENS, _FLAGS), _norm, _limit(2, MAX_COLUMNS, "rows")),
    "layer_norm": Template("rowwise", (_FLOAT_TOKENS, _FLOAT_TOKENS), _norm, _limit(2, MAX_COLUMNS, "rows")),
    "rope": Template("rowwise", (_FLOAT_TOKENS, _FLOAT_TOKENS, _FLAGS), _rope),
    "kv_write": Template("attention", (_FLOAT_TOKENS,), _kv_write),
    "gated_act": Template("rowwise", (_FLOAT_TOKENS, _ACTS), _gated_act),
    "embedding": Template("rowwise", (_FLOAT_TOKENS, _INT_TOKENS), _embedding),
    "topk": Template("rowwise", (_FLOAT_TOKENS,), _topk, _limit(1, MAX_TOPK, "rows")),
    "softmax": Template("rowwise", (_FLOAT_TOKENS, _FLOAT_TOKENS), _softmax),
    "cumsum": Template("rowwise", (_NUMBERS, _NUMBERS), _cumsum),
    "index_copy": Template("rowwise", (_NUMBERS,), _index_copy),
}


def plan_template(node: Node) -> Plan | None:
    """The calls that compute a node on the GPU, the reason why none do, or None for an op without a template."""
    plan = planning.plan_template(node)
    if plan is None or isinstance(plan, str):
        return plan
    calls = []
    for call in plan:
        template = TEMPLATES.get(call.kernel.template)
        if template is None:
            return f"no GPU kernel for {call.kernel.template}"
        given = call.kernel.arguments
        if len(given) != len(template.tokens) or any(a not in t for a, t in zip(given, template.tokens, strict=True)):
            return f"the GPU kernel {call.kernel.template} does not take {', '.join(given)}"
        reason = template.check(call)
        if reason is not None:
            return reason
        calls.append(template.replan(call))
    return calls


def template_source(template: str) -> str:
    """The text of the module that a template's kernels are in."""
    return (Path(__file__).parent / "kernels" / f"{TEMPLATES[template].module}.py").read_text("utf-8")


def launches(
    template: str,
    arguments: Sequence[str],
    tensors: Sequence[Any],
    ints: Sequence[int],
    floats: Sequence[float],
    status: torch.Tensor,
    device: Device,
    epilogue: LoopKernel | None = None,
) -> list[Launch]:
    """The launches of one call on tensors that begin at its operands' first elements; None is an absent operand.

    `status` is an int32 on the device that a kernel sets to 1 when it meets an index out of range; `epilogue` as in
    `Call`.
    """
    call = Call(template, tuple(arguments), tuple(tensors), tuple(ints), tuple(floats), status, device, epilogue)
    return TEMPLATES[template].launches(call)
