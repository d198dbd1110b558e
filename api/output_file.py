"""Files that a caller wants written: whether they could be, before the work whose result goes there."""

from __future__ import annotations

from pathlib import Path

from llmopt.compiler.errors import InputError


def check_output(path: str | Path, what: str = "cannot write") -> None:
    """Raises InputError, which begins with `what`, for a folder and for a file in a folder that does not exist."""
    file = Path(path)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"{what} {path}: {'it is a folder' if file.is_dir() else 'its folder does not exist'}")
