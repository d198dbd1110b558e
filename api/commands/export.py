"""`llmopt export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import llmopt
from llmopt.commands.common import (
    is_program,
    progress,
)
from llmopt.commands.engine_options import takes_engine_options
from llmopt.compiler.errors import InputError
from llmopt.output_file import check_output

EPILOG = """Examples:

\b
  llmopt export ./model model.engine --dtype bfloat16
  llmopt generate model.engine "import os" """


@takes_engine_options("dtype", "max_model_len", "block_size", "kv_cache_dtype", "batch_invariant")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; an existing one is replaced.")],
    *,
    engine: dict[str, Any],
) -> None:
    """Compile a model and write program, weights and tokenizer to one file.

    The file runs without the model's Python code, transformers or Dynamo; its kernels are compiled where it is loaded.
    """
    check_output(out)
    if is_program(model):
        raise InputError(f"{model} is a program file already")
    with progress("loading and compiling"):
        llmopt.export(model, out, **engine)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
