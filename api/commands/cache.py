"""`llmopt cache`: what compiled kernels and graphs take on disk, and removing them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.commands.common import AsJson
from llmopt.compiler.errors import OptionError

if TYPE_CHECKING:
    from llmopt.codegen.cpu.cache_upkeep import Entry

app = typer.Typer(
    help="Show or empty the folder of compiled kernels and graphs. What is removed is compiled again when it is "
    "needed; programs that run do not notice, but one that is compiling just then may have to be started again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_DAY_S = 86400.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


@app.command()
def info(as_json: AsJson = False) -> None:
    """Print the folder, and number and size of what lies in it."""
    folder, found = _contents()
    kinds: dict[str, dict[str, int]] = {}
    for entry in found:
        mine = kinds.setdefault(entry.kind, {"files": 0, "bytes": 0})
        mine["files"] += 1
        mine["bytes"] += entry.size
    if as_json:
        typer.echo(json.dumps({"folder": folder, "bytes": _size(found), "kinds": kinds}, indent=2))
        return
    typer.echo(f"{folder}: {_amount(found)}")
    for kind, mine in kinds.items():
        typer.echo(f"  {kind.ljust(26)}{mine['files']:>8} files{mine['bytes'] / 1e6:>12.1f} MB")


@app.command(
    epilog="""Examples:

\b
  llmopt cache prune --days 30
  llmopt cache prune --max-size 2G --dry-run"""
)
def prune(
    days: Annotated[
        float | None, typer.Option(metavar="N", help="Remove what was not used for N days.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Remove the longest unused beyond SIZE, such as 500M or 2G.", show_default=False
        ),
    ] = None,
    dry_run: _DryRun = False,
) -> None:
    """Remove what was not used for long. Times of use are kept to the day."""
    if days is None and max_size is None:
        raise OptionError("days", None, "a number, unless --max-size is given")
    if days is not None and not days >= 0:
        raise OptionError("days", days, "a number of at least 0")
    limit = None if max_size is None else _bytes(max_size)
    from llmopt.codegen.cpu.cache_upkeep import dispensable

    _, found = _contents()
    _remove(dispensable(found, unused_s=None if days is None else days * _DAY_S, limit=limit), dry_run)


@app.command()
def clear(dry_run: _DryRun = False) -> None:
    """Remove everything that llmopt keeps in the folder."""
    _, found = _contents()
    _remove(found, dry_run)


def _contents() -> tuple[str, list[Entry]]:
    """The configured folder, as it is, usable or not, and its entries."""
    from llmopt.codegen.cpu.cache_upkeep import entries
    from llmopt.codegen.cpu.object_cache import configured_folder

    folder = configured_folder()
    return str(folder), entries(folder)


def _remove(chosen: Sequence[Entry], dry_run: bool) -> None:
    from llmopt.codegen.cpu.cache_upkeep import remove

    if not dry_run:
        remove(chosen)
    typer.echo(f"{'would remove' if dry_run else 'removed'} {_amount(chosen)}")


def _size(found: Sequence[Entry]) -> int:
    return sum(entry.size for entry in found)


def _amount(found: Sequence[Entry]) -> str:
    return f"{len(found)} file{'' if len(found) == 1 else 's'}, {_size(found) / 1e6:.1f} MB"


def _bytes(text: str) -> int:
    """A size with a decimal unit: "2G" is 2 * 10**9."""
    match: Any = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError("max_size", text, "a number of bytes, or one with K, M, G or T")
    return int(float(match[1]) * _UNITS[match[2].upper()])
