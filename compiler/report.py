"""What a compilation did, as data: the source of `llmopt explain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from llmopt.compiler.opspec import Cost
from llmopt.compiler.pass_manager import PassReport


@dataclass(frozen=True)
class KernelUse:
    """One kernel of a program: what it computes, how often it is called, and its source.

    epilogue: the loop that a template computes on its results, "" for none.
    """

    template: str
    arguments: str
    origin: str
    calls: int
    source: str
    epilogue: str = ""

    @property
    def title(self) -> str:
        """The template and its epilogue."""
        return f"{self.template} + {self.epilogue}" if self.epilogue else self.template

    @property
    def name(self) -> str:
        """The template with its arguments, and its epilogue."""
        name = f"{self.template}<{self.arguments}>" if self.arguments else self.template
        return f"{name} + {self.epilogue}" if self.epilogue else name


@dataclass(frozen=True)
class Fallback:
    """An op that runs on ATen: why, and the line of the user's model."""

    op: str
    reason: str
    location: str | None
    count: int = 1


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph, and the line of the user's model; `full` is all that Dynamo says about it."""

    reason: str
    location: str
    full: str = ""


@dataclass(frozen=True)
class CallReport:
    """One step of a program: the kernel that does it (its place in `GraphReport.kernels`, None on ATen) and its cost.

    Costs are expressions in the symbols of `Details.symbols`.
    """

    kernel: int | None
    origin: str
    location: str | None
    cost: Cost


@dataclass(frozen=True)
class ValueLife:
    """A temporary value in the arena: bytes, byte offset, and the first and last step that touch it."""

    name: str
    size: sympy.Expr
    offset: sympy.Expr
    first: int
    last: int


@dataclass(frozen=True)
class Details:
    """What takes a moment to work out, and therefore is made only when somebody asks.

    symbols: name -> what it stands for; `hints` are the sizes that a graph was captured with.
    arena: bytes of temporary memory.
    """

    symbols: dict[str, str]
    hints: dict[str, int]
    calls: list[CallReport]
    arena: sympy.Expr
    lives: list[ValueLife]

    def sizes(self, given: Mapping[str, int] | None = None) -> dict[str, int]:
        """A value for every symbol: the hints, and what is given in their place."""
        return {**self.hints, **(given or {})}


@dataclass(frozen=True)
class Limits:
    """What the machine can do, as probed: 1e9 bytes read a second, 1e9 operations a second by dtype."""

    threads: int
    read_gb_s: float
    gflop_s: dict[str, float]


@dataclass(frozen=True)
class Timing:
    """Measured seconds of each step of a program (medians of `rounds` runs) at the given sizes."""

    sizes: dict[str, int]
    seconds: list[float]
    rounds: int
    limits: Limits


@dataclass
class GraphReport:
    """One compiled graph.

    kind: "backend" (the caller's own arguments), "step" (a ragged batch over a paged KV cache), or "program" (a file).
    batch_invariant: whether kernels add in an order that the batch has no part in.
    from_cache: whether an earlier process compiled it, so that passes did not run and have the times of that one.
    refused: why the graph is not compiled at all and runs in eager mode, else None.
    rejected: op -> reasons why a template did not take it although something else compiles it.
    frame: the function that Dynamo captured, with its compile id; `ends_at`: the break that ended the graph, if any.
    guards: what must hold for the graph to be used again.
    captured: the printed graph before the passes, where `Options.record_graphs` asks for it.
    program: gives what runs the graph, for measurements, or None when that is gone.
    """

    kind: str
    inputs: list[str] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    kernels: list[KernelUse] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    rejected: list[Fallback] = field(default_factory=list)
    native_calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    batch_invariant: bool = False
    from_cache: bool = False
    frame: str = ""
    ends_at: GraphBreak | None = None
    guards: list[str] = field(default_factory=list)
    captured: str | None = None
    timing: Timing | None = None
    make_details: Callable[[], Details | None] | None = None
    program: Callable[[], Any] | None = None
    _details: Details | None = None

    @property
    def details(self) -> Details | None:
        """Costs, memory plan and symbols; None for a graph that was refused."""
        if self._details is None and self.make_details is not None:
            self._details = self.make_details()
        return self._details


@dataclass
class Report:
    """Everything that was compiled for one model, and how `generate` is served.

    breaks: graph breaks that no graph ends with, because nothing was captured before them.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def all_breaks(self) -> list[GraphBreak]:
        """Every graph break, in the order in which they were met."""
        return [*(g.ends_at for g in self.graphs if g.ends_at is not None), *self.breaks]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; expressions are strings. `docs/explain.md` lists the fields."""
        from llmopt.compiler.report_json import report_json

        return report_json(self)

    def __str__(self) -> str:
        from llmopt.compiler.report_text import report_text

        return report_text(self)
