"""Interleaved comparison of several contestants on the same work, with the machine's limits probed in every round.

A shared machine's memory speed can halve within minutes. Contestants therefore take turns, every round begins with a
probe, and what is reported are medians and ratios within this one run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from probe import Probe
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from llmopt.codegen.cpu.toolchain import find_compiler, host_level
from llmopt.compiler.errors import ToolchainError

ROOT = Path(__file__).resolve().parent.parent
PROBE_PASSES = 5  # the best of them: a pass that another process interrupts says nothing of the machine

# A phase's run returns how many tokens (or other units) it processed; its time is taken around the call.
Phase = Callable[[], int]


@dataclass
class Contestant:
    """Something that does the same work as the others.

    Attributes: `name`; `phases`, run in this order in every round (say, prefill, then decode); `describe`, what really
    runs (compile options, bits per weight, attention implementation), for the report.
    """

    name: str
    phases: Mapping[str, Phase]
    describe: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """Samples of one interleaved run.

    Attributes: `rates`: contestant -> phase -> units per second, one a round; `failures`: contestant -> error;
    `read_gb_s`: probed read bandwidth, one a round; `conditions`: what ran where; `warmup_s`: contestant -> seconds of
    its first, untimed round, compilation included.
    """

    rates: dict[str, dict[str, list[float]]]
    failures: dict[str, str]
    read_gb_s: list[float]
    conditions: dict[str, Any]
    warmup_s: dict[str, float]

    def median(self, name: str, phase: str) -> float | None:
        """Median units per second; None for a contestant that failed."""
        samples = self.rates.get(name, {}).get(phase)
        return statistics.median(samples) if samples else None

    def ratio(self, name: str, peers: Sequence[str], phase: str) -> float | None:
        """`name`'s median over that of the best of `peers`; None where one side has no figure."""
        own = self.median(name, phase)
        others = [m for m in (self.median(peer, phase) for peer in peers if peer != name) if m is not None]
        return own / max(others) if own is not None and others else None

    def bandwidth(self) -> float:
        """Median probed read bandwidth in GB/s."""
        return statistics.median(self.read_gb_s)

    def to_json(self) -> dict[str, Any]:
        medians = {n: {p: self.median(n, p) for p in phases} for n, phases in self.rates.items()}
        return {
            "conditions": self.conditions,
            "median": medians,
            "read_gb_s": {"median": self.bandwidth(), "samples": self.read_gb_s},
            "rates": self.rates,
            "warmup_s": self.warmup_s,
            "failures": self.failures,
        }


def run_rounds(contestants: Sequence[Contestant], rounds: int, conditions: dict[str, Any], probe: Probe) -> Result:
    """One untimed round each (compilation, page faults), then `rounds` rounds in turns, each begun by the next one.

    Who runs first in a round, and after whom, would otherwise be the same in all of them.

    A contestant that raises is reported as failed, with its error, and takes no further part: a peer that does not work
    on this machine must not hide the others' figures, and not look fast either.
    """
    rates: dict[str, dict[str, list[float]]] = {c.name: {p: [] for p in c.phases} for c in contestants}
    failures: dict[str, str] = {}
    warmup: dict[str, float] = {}
    bandwidth: list[float] = []
    with tqdm(total=(rounds + 1) * len(contestants), leave=False, unit="run") as bar:
        for index in range(rounds + 1):
            if index:
                bandwidth.append(max(probe.read_gb_s() for _ in range(PROBE_PASSES)))
            first = index % len(contestants)
            for contestant in (*contestants[first:], *contestants[:first]):
                bar.set_description(f"{contestant.name}, {f'round {index}' if index else 'warm-up'}")
                bar.update()
                if contestant.name in failures:
                    continue
                try:
                    begin = time.perf_counter()
                    for phase, run in contestant.phases.items():
                        phase_begin = time.perf_counter()
                        units = run()
                        seconds = time.perf_counter() - phase_begin
                        if index:
                            rates[contestant.name][phase].append(units / seconds)
                    if not index:
                        warmup[contestant.name] = time.perf_counter() - begin
                except Exception as error:
                    failures[contestant.name] = f"{type(error).__name__}: {error}".strip()[:2000]
    return Result(rates, failures, bandwidth, conditions, warmup)


def cpu_model() -> str:
    """The CPU's marketing name, as the kernel reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def revision() -> str:
    """The commit that runs, with "-dirty" where tracked files differ from it. Results of earlier runs do not count."""
    commit = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{commit}-dirty" if changed else commit or "unknown"


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def _compiler() -> str:
    try:
        return find_compiler().version
    except ToolchainError:
        return "none"


def conditions(**more: Any) -> dict[str, Any]:
    """Versions, machine, threads and time; `more` adds the benchmark's own (shapes, dtype, bits per weight).

    Warns of changes that are not committed: nobody could tell later what was measured.
    """
    commit = revision()
    if commit.endswith("-dirty"):
        print(f"warning: measuring uncommitted changes ({commit}); results to keep need a commit", file=sys.stderr)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": commit,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": host_level().name,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "compiler": _compiler(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "llmopt")},
        **more,
    }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_table(
    result: Result,
    phases: Sequence[str],
    title: str,
    ratio_to: Sequence[str],
    bytes_per_unit: Mapping[str, float] | None = None,
    unit: str = "tokens",
) -> None:
    """Prints medians, ratios to the best of `ratio_to`, and the share of the probed bandwidth where bytes are known."""
    table = Table(title=title)
    table.add_column("")
    for phase in phases:
        table.add_column(f"{phase}\n{unit}/s", justify="right")
        table.add_column("ratio to\nbest peer", justify="right")
        if bytes_per_unit and phase in bytes_per_unit:
            table.add_column("of probed\nbandwidth", justify="right")
    table.add_column("first\nround", justify="right")
    for name in result.rates:
        if name in result.failures:
            table.add_row(name, "[red]not run")
            continue
        row = [name]
        for phase in phases:
            rate = result.median(name, phase)
            row += [_cell(rate, ".2f"), _cell(result.ratio(name, ratio_to, phase), ".2f")]
            if bytes_per_unit and phase in bytes_per_unit:
                share = None if rate is None else rate * bytes_per_unit[phase] / 1e9 / result.bandwidth()
                row.append(_cell(share, ".0%"))
        table.add_row(*row, f"{result.warmup_s[name]:.1f} s")
    console = Console()
    console.print(table)
    for name, error in result.failures.items():
        console.print(f"[red]{name} did not run:[/] {escape(error)}")
    console.print(
        f"probed read bandwidth: median {result.bandwidth():.1f} GB/s "
        f"({min(result.read_gb_s):.1f} to {max(result.read_gb_s):.1f}); "
        + ", ".join(f"{key} {value}" for key, value in result.conditions.items() if not isinstance(value, dict))
    )


def save(result: Result, path: Path) -> None:
    """Writes the result as JSON."""
    write_json(result.to_json(), path)


def write_json(value: Any, path: Path) -> None:
    """Writes a file that no reader ever sees half of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def plot(result: Result, phases: Sequence[str], path: Path) -> bool:
    """Bars of the median rates, one panel a phase; False (and no file) where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [name for name in result.rates if name not in result.failures]
    figure = Figure(figsize=(4 * len(phases), 3), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        bars = axes.bar(names, [result.median(name, phase) or 0.0 for name in names])
        axes.bar_label(bars, fmt="%.3g")
        axes.set_title(phase)
        axes.set_ylabel("tokens/s")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
