"""Finds the first rewrite that makes a check fail, by binary search over the number of rewrites that are allowed."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options

logger = logging.getLogger(__name__)

# A model of a hundred layers has some thousand rewrites; beyond this something else is wrong.
MOST_REWRITES = 1 << 20


@dataclass(frozen=True)
class Found:
    """The rewrite to blame.

    fuel: with this many rewrites the check fails, with one less it passes; 0 if it fails without any rewrite.
    name, number: the pass, and which of its rewrites in that graph it is; empty and 0 where no graph made so many.
    diff: the lines of the graph that the rewrite changed.
    runs: how often the check was run.
    """

    fuel: int
    name: str
    number: int
    diff: str
    runs: int

    def __str__(self) -> str:
        if self.fuel == 0:
            return (
                f"the check fails without any rewrite ({self.runs} runs): a kernel, or a pass that cannot be disabled, "
                "is to blame"
            )
        what = f"rewrite {self.number} of {self.name}" if self.name else "a rewrite that the log does not name"
        return f"LLMOPT_FUEL={self.fuel} is the first to fail: {what} ({self.runs} runs)\n{self.diff}"


def bisect(check: Callable[[Options], Any], options: Mapping[str, Any] | Options | None = None) -> Found | None:
    """Finds the first rewrite with which `check` fails, or None if it passes with all of them.

    Args:
        check: compiles and compares under the options that it is given, such as
            `lambda options: same(llmopt.LLM(path, **vars(options)))`. It fails by returning False or by raising; None
            counts as passed. It must compile anew each time.
        options: further options for every run.

    Raises InputError when the same number of rewrites fails now and then.
    """
    settings = Options.make(options)
    with tempfile.TemporaryDirectory(prefix="llmopt-bisect-") as folder:
        log = Path(folder) / "rewrites.jsonl"

        def passes(fuel: int) -> bool:
            torch._dynamo.reset()
            log.unlink(missing_ok=True)
            try:
                return check(Options.make(settings, fuel=fuel, rewrite_log=str(log))) is not False
            except Exception as error:  # one way for a check to fail
                logger.debug("the check raised with fuel %d: %s", fuel, error, exc_info=True)
                return False

        return search(passes, log)


def search(passes: Callable[[int], bool], log: Path) -> Found | None:
    """The search itself. `passes(fuel)` runs the check, in which compilations append to `log`."""
    runs = 0

    def attempt(fuel: int) -> bool:
        nonlocal runs
        runs += 1
        return passes(fuel)

    if attempt(-1):
        return None
    made = max((sum(count for _, count in line["rewrites"]) for line in _lines(log)), default=0)
    if not attempt(0):
        return Found(0, "", 0, "", runs)
    good, bad = 0, made or 1
    while not made and attempt(bad):  # the check died before it wrote its log: look for the end
        good, bad = bad, bad * 2
        if bad > MOST_REWRITES:
            raise InputError(f"the check fails with all rewrites and passes with {good}; it is not repeatable")
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if attempt(middle) else (good, middle)
    if attempt(bad):
        raise InputError(f"the check fails with all rewrites and passes with {bad}; it is not repeatable")
    last = next((line["last"] for line in _lines(log) if line["last"]), None)
    if last is None:
        return Found(bad, "", 0, "", runs)
    return Found(bad, str(last["name"]), int(last["number"]), str(last["diff"]), runs)


def _lines(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]
