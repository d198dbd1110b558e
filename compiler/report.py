"""What a compilation did, as data: the source of `llmopt explain`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmopt.compiler.pass_manager import PassReport


@dataclass(frozen=True)
class KernelUse:
    """One kernel of a program: what it computes, how often it is called, and its source."""

    template: str
    arguments: str
    origin: str
    calls: int
    source: str


@dataclass(frozen=True)
class Fallback:
    """An op that runs on ATen: why, and the line of the user's model."""

    op: str
    reason: str
    location: str | None
    count: int = 1


@dataclass
class GraphReport:
    """One compiled graph.

    kind: "backend" (the caller's own arguments) or "step" (a ragged batch over a paged KV cache).
    refused: why the graph is not compiled at all and runs in eager mode, else None.
    rejected: op -> reasons why a template did not take it although something else compiles it.
    """

    kind: str
    inputs: list[str] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    kernels: list[KernelUse] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    rejected: list[Fallback] = field(default_factory=list)
    native_calls: int = 0
    arena: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str | None = None


@dataclass
class Report:
    """Everything that was compiled for one model, and how `generate` is served."""

    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"graphs": [_graph_json(graph) for graph in self.graphs], "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n\n".join([*(graph_text(i, graph) for i, graph in enumerate(self.graphs)), *self.notes]) or (
            "nothing has been compiled yet: call the model, or generate with it, first"
        )


def _graph_json(graph: GraphReport) -> dict[str, Any]:
    data = {k: v for k, v in vars(graph).items() if k not in ("passes", "kernels", "fallbacks", "rejected")}
    data["passes"] = [{**vars(p), "skipped": dict(p.skipped)} for p in graph.passes]
    for name in ("kernels", "fallbacks", "rejected"):
        data[name] = [vars(item) for item in getattr(graph, name)]
    return data


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def graph_text(number: int, graph: GraphReport) -> str:
    """One graph as text for a terminal."""
    lines = [f"graph {number}: {graph.kind}, {', '.join(graph.inputs)}"]
    if graph.refused is not None:
        return "\n".join([*lines, f"  runs in eager mode: {graph.refused}"])
    lines.append("passes (rewrites, then near misses with their reasons)")
    rows: list[tuple[str, ...]] = []
    for item in graph.passes:
        misses = "; ".join(f"{reason} ({count})" for reason, count in item.skipped.items())
        state = "disabled" if item.disabled else str(item.matched)
        rows.append((item.name, state, "; ".join(filter(None, [misses, *dict.fromkeys(item.notes)]))))
    lines += _columns(rows) if rows else ["  none"]
    lines.append(f"kernels ({sum(k.calls for k in graph.kernels)} calls in {graph.native_calls} native calls)")
    lines += _columns(
        [(k.template, k.arguments, f"{k.calls} x", k.origin) for k in graph.kernels] or [("none", "", "", "")]
    )
    lines.append("fallbacks to ATen")
    counted = Counter((f.op, f.reason, f.location or "") for f in graph.fallbacks)
    lines += [f"  {n} x {op}: {why}{f' at {place}' if place else ''}" for (op, why, place), n in counted.items()] or [
        "  none"
    ]
    if graph.rejected:
        lines.append("templates that were not taken (a fused loop computes the op)")
        rejected = Counter((f.op, f.reason) for f in graph.rejected)
        lines += [f"  {n} x {op}: {why}" for (op, why), n in rejected.items()]
    if graph.arena:
        lines.append(f"temporary memory: {graph.arena} bytes")
    if graph.seconds:
        lines.append("time: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in graph.seconds.items()))
    return "\n".join(lines)
