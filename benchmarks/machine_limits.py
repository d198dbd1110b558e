"""The machine's limits and interleaved timing, for the benchmarks.

A shared machine's memory speed swings by half within minutes, so a figure in GB/s means little alone. Benchmarks call
the probes between the timed runs and print ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from llmopt.codegen.cpu.limits import Limits, kernel_plan


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, the runs taking turns so that all see the same weather; one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


__all__ = ["Limits", "interleave", "kernel_plan"]
