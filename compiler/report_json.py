"""A report as plain data for JSON."""

from __future__ import annotations

from typing import Any

from llmopt.compiler.report import CallReport, Details, GraphReport, Report
from llmopt.compiler.roofline import CallTime, call_times, evaluate


def report_json(report: Report) -> dict[str, Any]:
    """The whole report: lists, dictionaries, strings and numbers."""
    return {
        "graphs": [graph_json(graph) for graph in report.graphs],
        "graph_breaks": [vars(found) for found in report.all_breaks()],
        "notes": list(report.notes),
    }


def graph_json(graph: GraphReport) -> dict[str, Any]:
    """One graph. Expressions are strings over `symbols`; `sizes` are those that numbers are given for."""
    data: dict[str, Any] = {
        "kind": graph.kind,
        "inputs": list(graph.inputs),
        "refused": graph.refused,
        "batch_invariant": graph.batch_invariant,
        "from_cache": graph.from_cache,
        "frame": graph.frame,
        "ends_at": vars(graph.ends_at) if graph.ends_at is not None else None,
        "guards": list(graph.guards),
        "captured": graph.captured,
        "passes": [{**vars(item), "skipped": dict(item.skipped)} for item in graph.passes],
        "native_calls": graph.native_calls,
        "seconds": dict(graph.seconds),
    }
    for name in ("kernels", "fallbacks", "rejected"):
        data[name] = [vars(item) for item in getattr(graph, name)]
    details = graph.details
    if details is not None:
        sizes = details.sizes(graph.timing.sizes if graph.timing is not None else None)
        times = call_times(graph, sizes)
        data["symbols"], data["sizes"] = details.symbols, sizes
        data["calls"] = [_call(call, time) for call, time in zip(details.calls, times, strict=True)]
        data["memory"] = _memory(details, sizes)
    if graph.timing is not None:
        data["limits"] = vars(graph.timing.limits)
        data["rounds"] = graph.timing.rounds
    return data


def _call(call: CallReport, time: CallTime) -> dict[str, Any]:
    cost = call.cost
    return {
        "kernel": call.kernel,
        "origin": call.origin,
        "location": call.location,
        "cost": {name: str(value) for name, value in vars(cost).items()},
        **vars(time),
    }


def _memory(details: Details, sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "arena": str(details.arena),
        "arena_bytes": int(evaluate(details.arena, sizes)),
        "values": [
            {
                "name": life.name,
                "size": str(life.size),
                "bytes": int(evaluate(life.size, sizes)),
                "offset": int(evaluate(life.offset, sizes)),
                "first": life.first,
                "last": life.last,
            }
            for life in details.lives
        ],
    }
