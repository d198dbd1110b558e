"""What lies in the cache of compiled things, and removing what nobody uses any more.

Nothing is ever removed unasked: names are hashes of content, so an old entry is not wrong, it only takes room.
"""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    ".o": "compiled kernels",
    ".so": "linked libraries",
    ".graph": "graphs and step programs",
    ".py": "Triton kernels",
}
LEFTOVERS = "unfinished files"

_OURS = re.compile(r"(?:llmopt_loop_)?[0-9a-f]{24,64}")
_TEMPORARY = re.compile(r"tmp[0-9a-z_]{8}")  # as mkstemp names them; a process that was killed leaves its own
_WRITING_S = 3600.0  # a temporary file that is younger may still be written


@dataclass(frozen=True)
class Entry:
    """A file of the cache: what it is, its size in bytes and when it was used last, in seconds since the epoch."""

    path: Path
    kind: str
    size: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """All that llmopt keeps in `folder`, longest unused first. Files with other names are left out: they are not ours.

    Raises OSError where the folder cannot be read; one that is missing is empty.
    """
    return sorted(_entries(folder), key=lambda entry: entry.used)


def _entries(folder: Path) -> Iterator[Entry]:
    for path in folder.iterdir() if folder.is_dir() else ():
        kind = KINDS.get(path.suffix)
        if kind is None:
            continue
        try:
            status = path.lstat()
        except FileNotFoundError:  # another process was quicker
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        if _OURS.fullmatch(path.stem):
            yield Entry(path, kind, status.st_size, status.st_mtime)
        elif _TEMPORARY.fullmatch(path.stem) and time.time() - status.st_mtime > _WRITING_S:
            yield Entry(path, LEFTOVERS, status.st_size, status.st_mtime)


def dispensable(found: Sequence[Entry], *, unused_s: float | None = None, limit: int | None = None) -> list[Entry]:
    """Of entries in the order of `entries`: those unused for `unused_s` seconds, and, longest unused first, as many
    more as leave at most `limit` bytes. What a killed process left behind is among them in any case.
    """
    chosen, kept = [entry for entry in found if entry.kind == LEFTOVERS], [e for e in found if e.kind != LEFTOVERS]
    now, left = time.time(), sum(entry.size for entry in kept)
    for entry in kept:
        old = unused_s is not None and now - entry.used >= unused_s
        if old or (limit is not None and left > limit):
            chosen.append(entry)
            left -= entry.size
    return chosen


def remove(chosen: Sequence[Entry]) -> None:
    """Deletes entries; who needs one again makes it again. Raises OSError where the folder may not be written to."""
    for entry in chosen:
        entry.path.unlink(missing_ok=True)
