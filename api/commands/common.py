"""Arguments, options and small helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmopt.compiler.errors import OptionError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a program file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def complain(text: str) -> None:
    """One red line on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"error: {text}", style="red", markup=False)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes long; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


def given(**options: Any) -> dict[str, Any]:
    """What the user has set; the rest is left to the environment and the library's defaults."""
    return {name: setting for name, setting in options.items() if setting is not None}


def is_program(model: str) -> bool:
    """Whether the argument names a file; models are folders."""
    return Path(model).is_file()


def check_for_program(model: str, options: dict[str, Any]) -> None:
    """A program file has dtype, pages and kernels compiled in; asking for others must not be passed over."""
    for name in ("dtype", "block_size", "kv_cache_dtype", "batch_invariant"):
        if is_program(model) and name in options:
            raise OptionError(name, options[name], "nothing: a program file has it compiled in; export it again")
