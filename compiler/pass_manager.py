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
from typing import ClassVar

from torch import fx

from llmopt.compiler.errors import OptionError, UnsupportedError
from llmopt.compiler.graph import location
from llmopt.compiler.options import Options
from llmopt.compiler.verify import Level, check_graph, compare_graphs, find_violation, sample_inputs

log = logging.getLogger(__name__)


@dataclass
class PassReport:
    """What one pass did: rewrites, near misses by reason, seconds, and the largest error that verify mode measured."""

    name: str
    matched: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    max_error: float | None = None
    disabled: bool = False


class PassContext:
    """What a pass may use besides the graph: the options, and the fuel that is left."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._fuel = options.fuel

    def burn(self) -> bool:
        """Takes one unit of fuel; False when none is left and the match must stay as it is."""
        if self._fuel < 0:
            return True
        if self._fuel == 0:
            return False
        self._fuel -= 1
        return True


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
    After each pass the graph's level is checked; with `options.verify`, a pass that changes results by more than its
    budget raises VerificationError with its name.
    """
    known = {p.name for p in passes}
    for name in options.disabled_passes:
        if name not in ALL_PASS_NAMES | known:
            raise OptionError("disabled_passes", name, sorted(ALL_PASS_NAMES | known))
    foreign = find_violation(graph, Level.CAPTURED)
    if foreign is not None:
        raise UnsupportedError(foreign.reason, operation=str(foreign.node.target), location=location(foreign.node))
    context, level = PassContext(options), Level.CAPTURED
    reports = []
    for item in passes:
        if item.name in options.disabled_passes and not item.required:
            reports.append(PassReport(item.name, disabled=True))
            continue
        before = None
        if options.verify and item.preserves_signature:
            inputs = sample_inputs(graph)
            before = (_copy(graph), inputs)
        start = time.perf_counter()
        report = item.run(graph, context)
        report.seconds = time.perf_counter() - start
        graph.lint()
        level = item.produces if item.produces is not None else level
        check_graph(graph, level, item.name)
        if before is not None:
            report.max_error = compare_graphs(before[0], graph, before[1], item.name, item.budget)
        log.debug("%s: %d matched, skipped %s", item.name, report.matched, dict(report.skipped))
        reports.append(report)
    return reports


# Filled by `passes.pipeline`, so that a name which exists but is not part of this pipeline is no error.
ALL_PASS_NAMES: set[str] = set()


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy
