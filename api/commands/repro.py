"""`llmopt repro`."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmopt.commands.common import AsJson
from llmopt.compiler.errors import InputError
from llmopt.output_file import check_output

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}

EPILOG = """Examples:

\b
  llmopt repro script.py
  llmopt repro --out broken.py --import my_passes script.py --model ./model"""


def repro(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python program that compiles with llmopt.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="What it is given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; an existing one is replaced [repro.py, if there is none].")
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="A module that registers passes, ops or kernels; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a minimal program that fails as a script does.

    Runs SCRIPT in eager mode and checks every graph that it would compile with llmopt: does it compile, run, and give
    eager's result? The first that does not is minified by PyTorch's minifier and written as a runnable file. Options of
    llmopt stand before SCRIPT. The exit status is 1 when no graph fails, and 2 when SCRIPT compiled none or ended with
    an exception before one did.
    """
    if not script.is_file():
        raise InputError(f"{script} is no file")
    path = out or Path("repro.py")
    check_output(path, "--out")
    if path.exists() and (path.samefile(script) or out is None):
        raise InputError(f"{path} {'is SCRIPT' if path.samefile(script) else 'exists'}; name another file by --out")
    sys.path.insert(0, str(script.absolute().parent))  # as Python itself does for a script
    for name in imports or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--import {name}: {error}") from None
    from llmopt.testing.reproduction import minifying

    saved = sys.argv
    sys.argv = [str(script), *(arguments or ())]
    ended, died = "", False
    try:
        with minifying(path, imports or ()) as search:
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as stop:
                ended = f"{script} ended with status {stop.code}"
            except Exception as error:
                ended, died = f"{script} ended with {type(error).__name__}: {error}", True
    finally:
        sys.argv = saved
    if ended:
        typer.echo(ended, err=True)
    found = search.found
    if found is None:
        if died or not search.checked:
            raise InputError(f"{search.checked} graphs of {script} were checked, and none failed")
        same = f"no graph fails: {search.checked} were checked, each compiles, runs and gives eager's result"
        typer.echo("null" if as_json else same)
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps({**vars(found), "path": str(found.path)}, indent=2))
        return
    typer.echo(f"{found.path}: {found.kind}, {found.nodes} of {found.nodes_before} operations")
    if not found.reproduces:
        typer.echo(
            "by itself it does not fail; if the script registers passes, ops or kernels, name their module by --import",
            err=True,
        )
