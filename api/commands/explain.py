"""`llmopt explain`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
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

if TYPE_CHECKING:
    from llmopt.compiler.report import Report
    from llmopt.runtime.program_file import LoadedProgram

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
    operations and bytes, temporary memory, and fallbacks to ATen with their reasons. For a program file: its inputs,
    kernels and schedule. Tables on a terminal, plain columns in a pipe.
    """
    check_for_program(model, engine)
    sizes = parse_sizes(at) if at is not None else {}
    if is_program(model):
        if graph or verify:
            name = "graph" if graph else "verify"
            raise OptionError(name, True, "False: a program file holds no graph, only what was made of it")
        if not (measure or html):
            _explain_program(model, kernels, as_json)
            return
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


def _explain_program(path: str, with_sources: bool, as_json: bool) -> None:
    from llmopt.runtime.executable import kernel_name, kernel_source
    from llmopt.runtime.program_file import load_program

    with progress("loading"):
        loaded = load_program(path)
    program = loaded.program.program
    if as_json:
        typer.echo(json.dumps(_program_json(loaded, with_sources), indent=2))
        return
    for line in _program_lines(loaded):
        typer.echo(line)
    if with_sources:
        for spec in program.kernels:
            typer.echo(f"\n// {kernel_name(spec)}\n{kernel_source(spec, program.batch_invariant, program.target)}")


def _program_json(loaded: LoadedProgram, with_sources: bool) -> dict[str, Any]:
    from llmopt.codegen import program_json
    from llmopt.runtime.executable import kernel_source

    program = loaded.program.program
    data: dict[str, Any] = {
        "kind": "program",
        "vocab_size": loaded.vocab_size,
        "max_model_len": loaded.max_model_len,
        "eos_token_ids": loaded.eos_token_ids,
        "block_size": loaded.program.block_size,
        "program": program_json.to_json(program),
    }
    if with_sources:
        data["sources"] = [kernel_source(spec, program.batch_invariant, program.target) for spec in program.kernels]
    return data


def _program_lines(loaded: LoadedProgram) -> Iterator[str]:
    from llmopt.codegen.program import KernelCall
    from llmopt.runtime.executable import kernel_name

    step = loaded.program
    program = step.program
    weights = sum(w.numel() * w.element_size() for w in step.executable.weights)
    yield (
        f"program: vocabulary {loaded.vocab_size}, sequences to {loaded.max_model_len} tokens, "
        f"{len(program.weights)} weights of {weights / 1e6:.1f} MB"
    )
    yield (
        f"KV cache: {len(step.caches)} layers, blocks of {step.block_size} tokens and {step.bytes_per_block()} bytes"
    )
    calls = [call for call in program.steps if isinstance(call, KernelCall)]
    count = Counter(call.kernel for call in calls)
    yield f"kernels ({len(calls)} calls)"
    for number, spec in enumerate(program.kernels):
        yield f"  [{number}] {kernel_name(spec)}  {count[number]} x"
    yield "schedule (call, kernel, what it computes; | waits for all threads)"
    for number, call in enumerate(calls):
        yield f"  {number:4d}  [{call.kernel}] {call.origin}{'  |' if call.sync_after else ''}"
