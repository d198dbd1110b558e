"""A report as one self-contained HTML page: `page.html` with the data in it. No network, nothing to install."""

from __future__ import annotations

import difflib
import html
import json
from pathlib import Path
from typing import Any

import llmopt
from llmopt.codegen.cpu.templates import HEADERS
from llmopt.codegen.cpu.toolchain import KERNEL_FOLDER
from llmopt.compiler.report import GraphReport, Report
from llmopt.compiler.report_json import graph_json, report_json

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(report: Report, path: str | Path, title: str) -> None:
    """Writes the page; OSError when the file cannot be written."""
    Path(path).write_text(page(report, title), "utf-8")


def page(report: Report, title: str) -> str:
    """The page as text."""
    data = report_json(report)
    data["title"], data["version"] = title, llmopt.__version__
    data["graphs"] = [_graph(graph) for graph in report.graphs]
    headers = {HEADERS[k.template] for graph in report.graphs for k in graph.kernels if k.template in HEADERS}
    data["headers"] = {name: (KERNEL_FOLDER / name).read_text("utf-8") for name in sorted(headers)}
    text = json.dumps(data, separators=(",", ":"), default=str)
    # Inside a script element only "<" can end the data early.
    template = _TEMPLATE.read_text("utf-8").replace("{{title}}", html.escape(title))
    return template.replace("{{data}}", text.replace("<", "\\u003c"))


def _graph(graph: GraphReport) -> dict[str, Any]:
    """One graph, with its printed states as numbers of lines, because most lines stay from state to state."""
    data = graph_json(graph)
    data.pop("captured", None)
    numbers: dict[str, int] = {}
    number = lambda line: numbers.setdefault(line, len(numbers))  # noqa: E731
    before = [number(line) for line in graph.captured.splitlines()] if graph.captured is not None else []
    data["captured"] = before
    for row, item in zip(data["passes"], graph.passes, strict=True):
        row.pop("graph")
        if item.graph is None or graph.captured is None:
            continue
        after = [number(line) for line in item.graph.splitlines()]
        if after != before:
            row["graph"], row["hunks"] = after, _hunks(before, after)
        before = after
    data["lines"] = list(numbers)
    return data


def _hunks(before: list[int], after: list[int]) -> list[tuple[int, int, int, int]]:
    """(from, to, from, to) of every stretch of lines that differs."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [(a, b, c, d) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]
