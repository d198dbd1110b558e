"""A report as plain text in columns, for pipes, logs and `print`."""

from __future__ import annotations

from collections import Counter

from llmopt.compiler.pass_manager import PassReport
from llmopt.compiler.report import GraphReport, Report
from llmopt.compiler.roofline import call_times, evaluate, kernel_times, total


def report_text(report: Report) -> str:
    """All graphs, then graph breaks and notes."""
    parts = [graph_text(i, graph) for i, graph in enumerate(report.graphs)]
    breaks = report.all_breaks()
    if breaks:
        parts.append("\n".join(["graph breaks", *(f"  {b.reason} at {b.location}" for b in breaks)]))
    return "\n\n".join([*parts, *report.notes]) or (
        "nothing has been compiled yet: call the model, or generate with it, first"
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def pass_remarks(item: PassReport) -> str:
    """Near misses, notes, the measured error and what was undone, as one line."""
    parts = [f"{reason} ({count})" for reason, count in item.skipped.items()]
    parts += dict.fromkeys(item.notes)
    if item.max_error is not None:
        parts.append(f"error {item.max_error:.2g} of the tolerance")
    if item.reverted is not None:
        parts.append(f"undone: {item.reverted}")
    return "; ".join(parts)


def quantity(value: float, unit: str) -> str:
    """A number with an SI prefix: 1234567 -> "1.23 M" + unit."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def seconds_text(value: float) -> str:
    """A duration in ms or us."""
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def sizes_text(sizes: dict[str, int]) -> str:
    """Sizes as `tokens=1, requests=1`."""
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def graph_text(number: int, graph: GraphReport) -> str:
    """One graph as text for a terminal."""
    lines = [f"graph {number}: {graph.kind}, {', '.join(graph.inputs)}"]
    if graph.frame:
        lines.append(f"  captured from {graph.frame}")
    if graph.refused is not None:
        return "\n".join([*lines, f"  runs in eager mode: {graph.refused}"])
    if graph.batch_invariant:
        lines.append("batch invariant: every row by the kernels of a single row")
    if graph.from_cache:
        lines.append("  taken from the cache; the passes ran in an earlier process")
    if graph.kind != "program":
        lines.append("passes (rewrites, then near misses with their reasons)")
        states = [(p.name, "disabled" if p.disabled else str(p.matched), pass_remarks(p)) for p in graph.passes]
        lines += _columns(list(states)) if states else ["  none"]
    lines.append(f"kernels ({sum(k.calls for k in graph.kernels)} calls in {graph.native_calls} native calls)")
    lines += _columns(
        [(k.title, k.arguments, f"{k.calls} x", k.origin) for k in graph.kernels] or [("none", "", "", "")]
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
    if graph.guards:
        lines.append("guards")
        lines += [f"  {guard}" for guard in graph.guards]
    lines += _work(graph)
    if graph.seconds:
        lines.append("time: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in graph.seconds.items()))
    return "\n".join(lines)


def _work(graph: GraphReport) -> list[str]:
    """Operations, bytes and, where measured, times of each kernel; the arena."""
    details = graph.details
    if details is None:
        return []
    sizes = details.sizes(graph.timing.sizes if graph.timing is not None else None)
    arena = evaluate(details.arena, sizes)
    if graph.timing is None:
        whole = total(call_times(graph, sizes))
        return [
            f"work at {sizes_text(sizes)}: {quantity(whole.flops, 'FLOP')}, {quantity(whole.bytes_read, 'B')} read, "
            f"{quantity(whole.bytes_written, 'B')} written",
            f"temporary memory: {quantity(arena, 'B')} in {len(details.lives)} values",
        ]
    limits = graph.timing.limits
    peaks = ", ".join(f"{peak:.0f} GFLOP/s {dtype}" for dtype, peak in limits.gflop_s.items())
    lines = [f"work at {sizes_text(sizes)}; {limits.threads} threads, {limits.read_gb_s:.1f} GB/s read, {peaks}"]
    rows: list[tuple[str, ...]] = [("kernel", "FLOP", "bytes", "roofline", "measured", "of it")]
    times = kernel_times(graph, sizes)
    for key, time in [*times.items(), (-1, total(list(times.values())))]:
        name = "all" if key == -1 else "ATen" if key is None else graph.kernels[key].name
        predicted, measured = time.predicted or 0.0, time.measured or 0.0
        share = f"{predicted / measured:.0%}" if measured else ""
        moved = quantity(time.bytes_read + time.bytes_written, "B")
        rows.append((name, quantity(time.flops, ""), moved, seconds_text(predicted), seconds_text(measured), share))
    lines += _columns(rows)
    lines.append(f"temporary memory: {quantity(arena, 'B')} in {len(details.lives)} values")
    return lines


__all__ = ["graph_text", "pass_remarks", "quantity", "report_text", "seconds_text", "sizes_text"]
