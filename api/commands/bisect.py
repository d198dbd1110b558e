"""`llmopt bisect`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from llmopt.commands.common import AsJson, progress
from llmopt.compiler.errors import InputError

# Of what a check has written last.
MOST_LINES = 10

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}

EPILOG = """Examples:

\b
  llmopt bisect python check.py
  llmopt bisect --json python check.py --model ./model

A check compiles a model, compares its result and ends with another status than 0 when it is wrong:

\b
  import torch, my_model
  compiled = torch.compile(my_model.net, backend="llmopt")
  torch.testing.assert_close(compiled(my_model.x), my_model.net(my_model.x))"""


def bisect(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The check and its arguments.")],
    show: Annotated[bool, typer.Option("--show", help="Show the output of the check in every run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the first rewrite that makes a check fail.

    Runs COMMAND again and again with LLMOPT_FUEL set to the number of rewrites that are allowed, and halves the range
    until one rewrite is left. Prints the pass and the lines of the graph that the rewrite changed. Options of llmopt
    stand before COMMAND. The exit status is 1 when the check passes with all rewrites.
    """
    from llmopt.testing.bisection import search

    compiled = False
    with tempfile.TemporaryDirectory(prefix="llmopt-bisect-") as folder:
        log = Path(folder) / "rewrites.jsonl"

        def passes(fuel: int) -> bool:
            nonlocal compiled
            log.unlink(missing_ok=True)
            environment = {**os.environ, "LLMOPT_FUEL": str(fuel), "LLMOPT_REWRITE_LOG": str(log)}
            output, errors = (None, None) if show else (subprocess.DEVNULL, subprocess.PIPE)
            try:
                run = subprocess.run(command, env=environment, stdout=output, stderr=errors, check=False)
            except FileNotFoundError:
                raise InputError(f"no such command: {command[0]}") from None
            except OSError as error:
                raise InputError(f"{command[0]} cannot be run: {error.strerror}") from None
            compiled = compiled or log.exists()
            if run.returncode != 0 and fuel == 0 and not compiled:
                # With all rewrites it may have died in one of them; without any it would have got beyond the passes.
                said = (run.stderr or b"").decode(errors="replace").strip().splitlines()[-MOST_LINES:]
                raise InputError("\n".join(["the check fails and compiles nothing with llmopt", *said]))
            return run.returncode == 0

        with progress(f"bisecting {' '.join(command)}"):
            found = search(passes, log)
    if found is None:
        typer.echo("the check passes with all rewrites" if not as_json else "null")
        raise typer.Exit(1)
    typer.echo(json.dumps(vars(found), indent=2) if as_json else str(found))
