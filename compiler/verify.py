"""What a graph must look like at each of its three levels, and the numeric comparison of two graphs."""

from __future__ import annotations

import copy
import enum
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.errors import VerificationError
from llmopt.compiler.graph import is_tensor, outputs, placeholders, tensor, view_base
from llmopt.compiler.opspec import DEFAULT_TOLERANCES
from llmopt.compiler.step import STEP_INPUTS


class Level(enum.IntEnum):
    """How far a graph has come. What a level allows, the later levels allow too.

    CAPTURED: functional ops of PyTorch's dispatcher (ATen, and libraries that the model brings), `operator.getitem`
        and arithmetic on symbolic sizes.
    RAISED: the ops of the vocabulary as well. `paged_attention` alone may write, and only to its caches.
    BOUND: every value that is computed has exactly one maker; see `check_bindings`.
    """

    CAPTURED = 1
    RAISED = 2
    BOUND = 3


@dataclass(frozen=True)
class Violation:
    """A node that its level does not allow, and why."""

    node: Node
    reason: str


def find_violation(graph: fx.Graph, level: Level) -> Violation | None:
    """The first node of `graph` that `level` does not allow, or None."""
    for node in graph.nodes:
        reason = _illegal(node, level)
        if reason is not None:
            return Violation(node, reason)
    return None


def check_graph(graph: fx.Graph, level: Level, after: str) -> None:
    """Raises VerificationError, naming what ran last (`after`), when a node is not allowed at `level`."""
    found = find_violation(graph, level)
    if found is not None:
        raise VerificationError(f"after {after}: {found.node.name} ({found.node.target}): {found.reason}")


def _illegal(node: Node, level: Level) -> str | None:
    if node.op == "output":
        return None
    if node.op not in ("placeholder", "call_function"):
        return f"a {node.op}, which no level allows"
    if node.op == "placeholder":
        return None if "val" in node.meta else "no value in its metadata"
    schema = getattr(node.target, "_schema", None)
    if "val" not in node.meta:
        # A check computes nothing; exporting leaves it without a value, and `normalize` drops it.
        is_check = schema is not None and not schema.returns
        return None if is_check and level == Level.CAPTURED else "no value in its metadata"
    if node.target is operator.getitem:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        ours = node.target.namespace == "llmopt"
        if ours and level < Level.RAISED:
            return "an op of the vocabulary before any pass has raised one"
        if node.target._schema.is_mutable and not ours:
            return "it writes to its arguments, and the graph must be functional"
        return None
    val = node.meta["val"]
    if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
        return None
    return "neither an op of PyTorch's dispatcher nor arithmetic on sizes"


@dataclass(frozen=True)
class Binding:
    """One piece of work that code generation has planned.

    maker: what does it, for messages ("template linear", "loop", "ATen").
    writes: the nodes whose memory it fills; reads: the nodes whose memory it needs.
    reason: why ATen does it, None for everything that is compiled.
    """

    maker: str
    writes: tuple[Node, ...]
    reads: tuple[Node, ...]
    reason: str | None = None


def check_bindings(graph: fx.Graph, constants: Iterable[Node], bindings: Sequence[Binding]) -> None:
    """The BOUND level: whatever anybody reads from memory was put there, by one maker only.

    Nodes without a maker of their own are legal where the loops that need them compute them on the way, which shows in
    that no binding and no output reads their memory. Raises VerificationError.
    """
    check_graph(graph, Level.BOUND, "kernel selection")
    makers: dict[Node, str] = dict.fromkeys(constants, "constant")
    inputs = set(placeholders(graph))
    for binding in bindings:
        if binding.reason is not None and not binding.reason.strip():
            raise VerificationError(f"after kernel selection: {binding.writes} is left to ATen without a reason")
        for node in dict.fromkeys(binding.writes):
            if node in inputs:  # a cache, which each layer writes in place
                continue
            if node in makers:
                raise VerificationError(
                    f"after kernel selection: {node.name} ({node.target}) is computed by {makers[node]} and again by "
                    f"{binding.maker}"
                )
            makers[node] = binding.maker
    reads = [(binding.maker, node) for binding in bindings for node in binding.reads]
    reads += [("the caller", node) for node in outputs(graph) if is_tensor(node)]
    for reader, node in reads:
        base = view_base(node)
        if base not in makers and base not in inputs:
            raise VerificationError(
                f"after kernel selection: nothing computes {base.name} ({base.target}), which {reader} reads"
            )


def sample_inputs(graph: fx.Graph, seed: int = 0) -> list[Any]:
    """Fresh random arguments for every placeholder: floats around zero, integers that index safely, hints for sizes.

    Masks hide some places, but never two neighbours, so that whatever attends to a window sees something.

    A step graph gets a consistent ragged batch, because its integers say where in the cache each token goes.
    """
    rng = torch.Generator().manual_seed(seed)
    if STEP_INPUTS.keys() <= {node.name for node in placeholders(graph)}:
        return _sample_step(placeholders(graph), rng)
    made: list[Any] = []
    for node in placeholders(graph):
        val = node.meta["val"]
        if isinstance(val, torch.SymInt):
            made.append(val.node.hint)
        elif not isinstance(val, torch.Tensor):
            made.append(val)
        else:
            shape = [s.node.hint if isinstance(s, torch.SymInt) else s for s in val.shape]
            made.append(_random_tensor(shape, val.dtype, rng).to(val.device))
    return made


def _random_tensor(shape: Sequence[int], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    if dtype == torch.bool:
        hidden = torch.rand(tuple(shape), generator=rng) < 0.3
        if hidden.ndim:
            hidden[..., 0::2] = False
        return ~hidden
    if dtype.is_floating_point:
        scale = max(1, shape[-1]) ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(tuple(shape), generator=rng) * scale).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=rng, dtype=dtype)


def _sample_step(nodes: Sequence[Node], rng: torch.Generator) -> list[Any]:
    """Three requests: a decode step, a whole prompt, and a prompt's later chunk; one block of the cache stays free."""
    counts, lengths = (1, 4, 3), (7, 4, 9)
    caches = [node for node in nodes if node.name.startswith(("k_cache_", "v_cache_"))]
    block_size = int(tensor(caches[0]).shape[2])
    needed = [-(-length // block_size) for length in lengths]
    positions = [i for count, length in zip(counts, lengths, strict=True) for i in range(length - count, length)]
    ends = torch.tensor(counts).cumsum(0)
    step = {
        "input_ids": torch.randint(0, 2, (sum(counts),), generator=rng),
        "positions": torch.tensor(positions),
        "cu_seqlens_q": torch.cat([torch.zeros(1), ends]),
        "seq_lens": torch.tensor(lengths),
        "logits_indices": ends - 1,
        "adapter_index": torch.arange(sum(counts)) % 2 - 1,
        "prompt_embeds_index": torch.arange(sum(counts)) % 3 - 1,
    }
    for prefix in ("", "window_"):
        order = torch.randperm(sum(needed) + 1, generator=rng).tolist()
        tables = torch.zeros((len(lengths), max(needed)), dtype=torch.int32)
        slots: list[int] = []
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            blocks = [order.pop() for _ in range(needed[row])]
            tables[row, : len(blocks)] = torch.tensor(blocks)
            slots += [blocks[i // block_size] * block_size + i % block_size for i in range(length - count, length)]
        step[f"{prefix}slot_mapping"], step[f"{prefix}block_tables"] = torch.tensor(slots), tables
    made = []
    for node in nodes:
        if node.name in step:
            made.append(step[node.name].to(tensor(node).dtype))
        elif node.name == "prompt_embeds":
            made.append(_random_tensor([2, int(tensor(node).shape[1])], tensor(node).dtype, rng))
        elif node in caches:
            made.append(_random_tensor([sum(needed) + 1, *map(int, tensor(node).shape[1:])], tensor(node).dtype, rng))
        else:
            made.append(_random_tensor([int(size) for size in tensor(node).shape], tensor(node).dtype, rng))
    return made


def compare_graphs(before: fx.Graph, after: fx.Graph, inputs: Sequence[Any], name: str, budget: float) -> float:
    """Largest difference of two graphs on `inputs`, in units of the dtype's tolerance.

    Both draw the same random numbers, as long as they draw equally many in the same order.
    Raises VerificationError, with the name of the pass, when it exceeds `budget` or a shape or dtype differs.
    """
    results = []
    for graph in (before, after):
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            results.append(fx.Interpreter(fx.GraphModule({}, graph)).run(*copy.deepcopy(list(inputs))))
    worst = 0.0
    for index, (old, new) in enumerate(zip(*results, strict=True)):
        if not isinstance(old, torch.Tensor):
            if old != new:
                raise VerificationError(f"{name} changed output {index} from {old!r} to {new!r}")
            continue
        if old.shape != new.shape or old.dtype != new.dtype:
            raise VerificationError(
                f"{name} changed output {index} from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
            )
        tolerance = DEFAULT_TOLERANCES.get(old.dtype, DEFAULT_TOLERANCES[torch.float32])
        # Whole models accumulate: the bound of a single op, relative to the largest entry.
        scale = tolerance.atol * 10 + tolerance.rtol * 10 * float(
            _as_double(old).abs().nan_to_num(0.0, 0.0, 0.0).max() if old.numel() else 0
        )
        error = _largest_difference(old, new) / scale
        worst = max(worst, error)
        if error > budget:
            raise VerificationError(
                f"{name} changed output {index} by {error:.2f} times the tolerance; its budget is {budget}"
            )
    return worst


def _as_double(x: torch.Tensor) -> torch.Tensor:
    """The entries in float64; those of a complex tensor as pairs of numbers."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double()


def _largest_difference(old: torch.Tensor, new: torch.Tensor) -> float:
    """Largest difference of entries; infinite where one is NaN or infinite and the other is not the same."""
    if not old.numel():
        return 0.0
    a, b = _as_double(old), _as_double(new)
    same = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).abs().nan_to_num(float("inf")).masked_fill(same, 0.0).max())
