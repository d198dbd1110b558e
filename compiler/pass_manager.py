"""Runs passes over a graph: order, switches, verification and the record that `explain` shows.

A pass takes a valid graph and leaves a valid one. It never looks at module names or model types and never touches
weights. It reports what it matched, and for what it almost matched, why not.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from llmopt.compiler.errors import OptionError, UnsupportedError, VerificationError
from llmopt.compiler.graph import graph_text, location
from llmopt.compiler.options import Options
from llmopt.compiler.rewrite_log import RewriteLog
from llmopt.compiler.verify import Level, check_graph, compare_graphs, find_violation, sample_inputs

log = logging.getLogger(__name__)


@dataclass
class PassReport:
    """What one pass did: rewrites, near misses by reason, and seconds.

    max_error: the largest error that verify mode measured, in multiples of the dtype's tolerance; `budget` limits it.
    reverted: why revert mode undid rewrites of this pass, or why it stopped at an invalid one; None if it did neither.
        `matched` counts those that stayed.
    graph: the printed graph behind the pass, where `Options.record_graphs` asks for it.
    """

    name: str
    matched: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    max_error: float | None = None
    budget: float | None = None
    disabled: bool = False
    reverted: str | None = None
    graph: str | None = None


class PassContext:
    """What a pass may use besides the graph: the options, and the fuel that is left.

    fuel: how many rewrites are allowed, -1 for any number; None takes it from the options.
    used: how many were made.
    """

    def __init__(self, options: Options, fuel: int | None = None, rewrites: RewriteLog | None = None) -> None:
        self.options = options
        self.fuel = options.fuel if fuel is None else fuel
        self.used = 0
        self._rewrites = rewrites

    def burn(self) -> bool:
        """Takes one unit of fuel; False when none is left and the match must stay as it is."""
        if 0 <= self.fuel <= self.used:
            return False
        self.used += 1
        if self._rewrites is not None:
            self._rewrites.note(last=self.used == self.fuel)
        return True

    @property
    def left(self) -> int:
        """Rewrites that are still allowed, -1 for any number."""
        return self.fuel if self.fuel < 0 else self.fuel - self.used


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose docstring shows the graph before and after.

    name: verb and object, as in `LLMOPT_DISABLE` and `explain`.
    budget: largest error, relative to the dtype's tolerance, that verify mode accepts.
    preserves_signature: whether inputs and outputs stay as they are, so that verify mode can compare the results.
    required: cannot be switched off, because later stages rely on its result.
    produces: the level of the graph that it leaves; None if it leaves the level as it was. All take any level.
    """

    name: ClassVar[str]
    budget: ClassVar[float] = 1.0
    preserves_signature: ClassVar[bool] = True
    required: ClassVar[bool] = False
    produces: ClassVar[Level | None] = Level.RAISED

    @abstractmethod
    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        """Rewrites `graph` in place."""


def run_pipeline(graph: fx.Graph, passes: Sequence[Pass], options: Options) -> list[PassReport]:
    """Runs `passes` in order over `graph`, in place, and reports each.

    An unknown name in `options.disabled_passes` raises OptionError, a graph that is not functional UnsupportedError.
    After each pass the graph's level is checked. With `options.verify`, a pass that changes results by more than its
    budget raises VerificationError with its name; with "revert" its rewrites are undone from the first harmful one on.
    """
    known = {p.name for p in passes}
    for name in options.disabled_passes:
        if name not in ALL_PASS_NAMES | known:
            raise OptionError("disabled_passes", name, sorted(ALL_PASS_NAMES | known))
    foreign = find_violation(graph, Level.CAPTURED)
    if foreign is not None:
        raise UnsupportedError(foreign.reason, operation=str(foreign.node.target), location=location(foreign.node))
    rewrites = RewriteLog(graph, options.rewrite_log) if options.rewrite_log else None
    context, level = PassContext(options, rewrites=rewrites), Level.CAPTURED
    reports = []
    try:
        for item in passes:
            if item.name in options.disabled_passes and not item.required:
                reports.append(PassReport(item.name, disabled=True))
                continue
            level = item.produces if item.produces is not None else level
            if rewrites is not None:
                rewrites.begin(item.name)
            report = _run_pass(item, graph, context, level)
            if options.record_graphs:
                report.graph = graph_text(graph, renumber=False)
            log.debug("%s: %d matched, skipped %s", item.name, report.matched, dict(report.skipped))
            reports.append(report)
    finally:
        if rewrites is not None:  # also of passes that did not end well
            rewrites.write()
    return reports


def _run_pass(item: Pass, graph: fx.Graph, context: PassContext, level: Level) -> PassReport:
    """One pass, checked as far as the options ask."""
    checked = bool(context.options.verify) and item.preserves_signature
    inputs = sample_inputs(graph) if checked else []
    start = time.perf_counter()
    if checked and context.options.verify == "revert" and not item.required:
        report = _run_revertible(item, graph, context, level, inputs)
    else:
        before = copy_graph(graph) if checked else None
        report = _run_or_stop(item, graph, context)
        report.seconds = time.perf_counter() - start
        graph.lint()
        check_graph(graph, level, item.name)
        if before is not None:
            report.max_error = compare_graphs(before, graph, inputs, item.name, item.budget)
    report.seconds = report.seconds or time.perf_counter() - start
    report.budget = item.budget if checked else None
    return report


def _run_or_stop(item: Pass, graph: fx.Graph, context: PassContext) -> PassReport:
    """Runs a pass, which stops at a rewrite that would change a value's type or give an op operands that do not fit.

    What it rewrote before stays, since every rewrite leaves a valid graph. A required pass must do all of its work, so
    the graph is refused then; verify mode is there to find such passes, and raises.
    """
    used = context.used
    try:
        return item.run(graph, context)
    except VerificationError as error:
        if context.options.verify:
            raise VerificationError(f"{item.name}: {error}") from error
        if item.required:
            raise UnsupportedError(f"{item.name}: {error}") from error
        log.warning("%s stops: %s", item.name, error)
        graph.eliminate_dead_code()
        made = max(0, context.used - used - 1)
        return PassReport(item.name, matched=made, reverted=f"stopped at rewrite {made + 1}: {error}")


def _run_revertible(
    item: Pass, graph: fx.Graph, context: PassContext, level: Level, inputs: Sequence[Any]
) -> PassReport:
    """Finds on copies how many rewrites of the pass are harmless, then makes those.

    A rewrite burns a unit of fuel, so the first harmful one is found by halving the fuel that the pass may use. A pass
    that rewrites without burning is undone as a whole.
    """

    def attempt(fuel: int) -> tuple[VerificationError | None, float, int]:
        trial, limited = copy_graph(graph), PassContext(context.options, fuel)
        try:
            item.run(trial, limited)
            _lint(trial, item)
            check_graph(trial, level, item.name)
            return None, compare_graphs(graph, trial, inputs, item.name, item.budget), limited.used
        except VerificationError as error:
            return error, 0.0, limited.used

    reason, error, used = attempt(context.left)
    if reason is None:
        limit = context.left
    elif attempt(0)[0] is not None:
        # Even without rewrites that burn fuel the result is wrong: nothing of it may stay.
        return PassReport(item.name, reverted=str(reason), max_error=0.0)
    else:
        good, bad = 0, used
        while bad - good > 1:
            middle = (good + bad) // 2
            found = attempt(middle)[0]
            good, bad, reason = (middle, bad, reason) if found is None else (good, middle, found)
        limit, error = good, attempt(good)[1]
    limited = PassContext(context.options, limit)
    report = item.run(graph, limited)
    context.used += limited.used
    graph.lint()
    check_graph(graph, level, item.name)
    report.max_error = error
    if reason is not None:
        report.reverted = f"rewrite {limit + 1}: {reason}"
        log.warning("%s is undone from its rewrite %d on: %s", item.name, limit + 1, reason)
    return report


def _lint(graph: fx.Graph, item: Pass) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"after {item.name}: {error}") from error


# Filled by `passes.pipeline`, so that a name which exists but is not part of this pipeline is no error.
ALL_PASS_NAMES: set[str] = set()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same nodes, names and metadata, which a pass may change."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy
