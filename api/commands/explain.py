"""`llmopt explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llmopt.commands.common import (
    AsJson,
    Model,
    check_for_program,
    is_program,
    progress,
)
from llmopt.commands.engine_options import takes_engine_options
from llmopt.compiler.errors import OptionError
from llmopt.output_file import check_output

if TYPE_CHECKING:
    from llmopt.compiler.report import Report

EPILOG = """Examples:

\b
  llmopt explain ./model
  llmopt explain ./model --html report.html --measure
  llmopt explain ./model --measure --at tokens=512,context=256
  llmopt explain ./model --dtype bfloat16 --kernels
  llmopt explain ./model --json | jq '.graphs[0].passes'
  llmopt explain model.engine"""


@takes_engine_options("dtype", "threads", "block_size")
def explain(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page, graphs of every pass included.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every kernel, and probe the machine for what it could do at best.")
    ] = False,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the step that numbers are given for [tokens=1,requests=1,context=512].",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Measure every pass's numeric error, and undo what exceeds its budget. Slow."),
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the C++ source of every kernel.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph after all passes.")] = False,
    *,
    engine: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Say what llmopt makes of a model.

    For a folder: compiles the step program and prints passes with their matches and near misses, kernels, work in
    operations and bytes, temporary memory, and fallbacks to ATen with their reasons. For a program file: the same
    without passes and graphs, which it does not hold. Tables on a terminal, plain columns in a pipe.
    """
    check_for_program(model, engine)
    if html is not None:
        check_output(html)
    sizes = parse_sizes(at) if at is not None else {}
    if is_program(model) and (graph or verify):
        name = "graph" if graph else "verify"
        raise OptionError(name, True, "False: a program file holds no graph, only what was made of it")
    if verify:
        engine["verify"] = "revert"
    with progress("loading, compiling and measuring" if measure else "loading and compiling"):
        import llmopt

        report = llmopt.explain(Path(model), sizes=sizes, measure=measure, html=html, options=engine)
    if as_json:
        typer.echo(json.dumps(_slim(report, graph, kernels), indent=2, default=str))
        return
    _print(report)
    if html is not None:
        typer.echo(f"\n{html}: {html.stat().st_size / 1e6:.2f} MB")
    if graph:
        typer.echo(f"\n{report.graphs[0].passes[-1].graph}")
    if kernels:
        for use in report.graphs[0].kernels:
            typer.echo(f"\n// {use.template} {use.arguments}: {use.calls} x {use.origin}\n{use.source}")


def parse_sizes(text: str) -> dict[str, int]:
    """`tokens=512,context=256` as a dictionary; OptionError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if not equals or not number.strip().isdecimal():
            raise OptionError("at", text, "sizes such as tokens=512,requests=1,context=256")
        sizes[name.strip()] = int(number)
    return sizes


def _print(report: Report) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        from llmopt.explaining.tables import print_report

        print_report(report, console)
    else:
        typer.echo(str(report))


def _slim(report: Report, graph: bool, kernels: bool) -> dict[str, Any]:
    """The report without what was not asked for, because it is long."""
    data = report.to_json()
    for item in data["graphs"]:
        if graph and item["passes"]:
            item["graph"] = item["passes"][-1]["graph"]
        del item["captured"]
        for row in item["passes"]:
            del row["graph"]
        if not kernels:
            for kernel in item["kernels"]:
                del kernel["source"]
    return data
