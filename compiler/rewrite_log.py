"""Writes down which rewrites a pipeline made, so that bisection can name the one that is to blame."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from llmopt.compiler.graph import graph_text


@dataclass(frozen=True)
class Rewrite:
    """The last rewrite that fuel allowed: the `number`th of pass `name`, and the lines of the graph that it changed."""

    name: str
    number: int
    diff: str


class RewriteLog:
    """Counts rewrites by pass, and takes the last one that fuel allows down in full.

    Args:
        graph: what the passes rewrite.
        path: the file that `write` appends one line of JSON to: `{"rewrites": [[pass, count], ...], "last": ...}`.
    """

    def __init__(self, graph: fx.Graph, path: str) -> None:
        self._graph, self._path = graph, Path(path)
        self._counts: list[tuple[str, int]] = []
        self._before: str | None = None
        self._last: Rewrite | None = None

    def begin(self, name: str) -> None:
        """A pass begins, and so the one before has ended."""
        self._end()
        self._counts.append((name, 0))

    def note(self, last: bool) -> None:
        """The current pass is about to make a rewrite; `last` if it uses up the fuel."""
        name, count = self._counts[-1]
        self._counts[-1] = (name, count + 1)
        if last:
            self._before = graph_text(self._graph, renumber=False)

    def _end(self) -> None:
        """What differs now is the last rewrite of the pass that has ended."""
        if self._before is None:
            return
        after = graph_text(self._graph, renumber=False)
        lines = difflib.unified_diff(self._before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=2)
        self._last = Rewrite(*self._counts[-1], "\n".join(lines))
        self._before = None

    def write(self) -> None:
        """Appends the line, after the last pass."""
        self._end()
        made = [[name, count] for name, count in self._counts if count]
        line = json.dumps({"rewrites": made, "last": vars(self._last) if self._last else None})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
