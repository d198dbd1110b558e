"""A report as tables on a terminal."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmopt.compiler.report import GraphReport, Report
from llmopt.compiler.report_text import pass_remarks, quantity, seconds_text, sizes_text
from llmopt.compiler.roofline import CallTime, evaluate, kernel_times, total


def print_report(report: Report, console: Console) -> None:
    """Prints graphs, graph breaks and notes; a report without graphs says what to do first."""
    if not report.graphs:
        console.print(str(report))
        return
    for number, graph in enumerate(report.graphs):
        _print_graph(number, graph, console)
    breaks = report.all_breaks()
    if breaks:
        table = _table("graph breaks", "why", "where")
        for found in breaks:
            table.add_row(Text(found.reason), Text(found.location, style="dim"))
        console.print(table)
    for note in report.notes:
        console.print(Text(note))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        numeric = column in ("rewrites", "calls", "FLOP", "bytes", "roofline", "measured", "of it", "error", "ms")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    return table


def _print_graph(number: int, graph: GraphReport, console: Console) -> None:
    inputs = [item for item in graph.inputs if "_cache_" not in item]
    hidden = len(graph.inputs) - len(inputs)
    console.rule(f"[bold]graph {number}[/bold]: {graph.kind}", align="left")
    console.print(Text(", ".join(inputs) + (f" and {hidden} caches" if hidden else "")), style="dim")
    if graph.frame:
        console.print(Text(f"captured from {graph.frame}"), style="dim")
    if graph.refused is not None:
        console.print(Text(f"runs in eager mode: {graph.refused}"), style="red")
        return
    if graph.passes:
        _print_passes(graph, console)
    _print_kernels(graph, console)
    _print_choices(graph, console)
    if graph.guards:
        table = _table("guards", "what must hold for this graph")
        for guard in graph.guards:
            table.add_row(Text(guard))
        console.print(table)
    details = graph.details
    if details is not None:
        arena = evaluate(details.arena, details.sizes(graph.timing.sizes if graph.timing else None))
        console.print(f"temporary memory: {quantity(arena, 'B')} in {len(details.lives)} values", style="dim")
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in graph.seconds.items())
    if spent:
        console.print(f"compiled in: {spent}", style="dim")


def _print_passes(graph: GraphReport, console: Console) -> None:
    table = _table("passes", "pass", "rewrites", "ms", "near misses and remarks")
    for item in graph.passes:
        style = "dim" if item.disabled or not item.matched else ""
        matched = "disabled" if item.disabled else str(item.matched)
        remark = Text(pass_remarks(item), style="red" if item.reverted else "")
        table.add_row(item.name, matched, f"{item.seconds * 1e3:.0f}", remark, style=style)
    console.print(table)


def _print_kernels(graph: GraphReport, console: Console) -> None:
    timing, details = graph.timing, graph.details
    title = f"kernels: {sum(k.calls for k in graph.kernels)} calls in {graph.native_calls} native calls"
    columns = ["kernel", "computes", "calls"]
    if details is not None:
        title += f", at {sizes_text(details.sizes(timing.sizes if timing else None))}"
        columns += ["FLOP", "bytes", *(("roofline", "measured", "of it") if timing else ())]
    table = _table(title, *columns)
    times = kernel_times(graph, timing.sizes if timing else None)
    for number, use in enumerate(graph.kernels):
        time = times.get(number)
        table.add_row(
            Text(use.name), Text(use.origin, style="dim"), str(use.calls), *_numbers(time, timing is not None)
        )
    if times:
        whole = total(list(times.values()))
        table.add_row("all", "", "", *_numbers(whole, timing is not None), style="bold")
    console.print(table)
    if timing is not None:
        limits = timing.limits
        peaks = ", ".join(f"{peak:.0f} GFLOP/s {dtype}" for dtype, peak in limits.gflop_s.items())
        console.print(
            f"roofline of {limits.threads} threads, probed now: {limits.read_gb_s:.1f} GB/s read, {peaks}. "
            "More than 100 % of it: the data lay in the caches, or the probe was disturbed.",
            style="dim",
        )


def _numbers(time: CallTime | None, timed: bool) -> list[str]:
    if time is None:
        return []
    cells = [quantity(time.flops, ""), quantity(time.bytes_read + time.bytes_written, "B")]
    if timed:
        predicted, measured = time.predicted or 0.0, time.measured or 0.0
        cells += [seconds_text(predicted), seconds_text(measured), f"{predicted / measured:.0%}" if measured else ""]
    return cells


def _print_choices(graph: GraphReport, console: Console) -> None:
    """What no kernel computes, and what a template refused."""
    if not graph.fallbacks:
        console.print(Text("no op falls back to ATen", style="green"))
    for title, found in (
        ("fallbacks to ATen", graph.fallbacks),
        ("templates that were not taken (a fused loop computes the op)", graph.rejected),
    ):
        if found:
            table = _table(title, "calls", "op", "why", "where")
            for (op, why, place), count in Counter((f.op, f.reason, f.location or "") for f in found).items():
                table.add_row(str(count), Text(op), Text(why), Text(place, style="dim"))
            console.print(table)
