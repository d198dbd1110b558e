"""What this machine can do at best right now: memory reads and float multiply-adds with one and more threads.

usage: python benchmarks/probe.py [--threads 1 2] [--megabytes 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine_limits import Limits


@dataclass(frozen=True)
class Reading:
    """One probe of `threads` threads: gigabytes (1e9) read per second and 1e9 float operations per second."""

    threads: int
    read_gb_s: float
    fma_gflop_s: float


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Probe:
    """Holds its buffer, so that it can be read between timed runs at little cost (some 20 ms for 512 MB)."""

    def __init__(self, threads: int, megabytes: int = 512) -> None:
        self.threads = threads
        self._limits = Limits(megabytes, threads)
        self.read_gb_s()  # touches the pages and compiles

    def read_gb_s(self) -> float:
        """Speed of one pass over the buffer, which is larger than the caches."""
        return self._limits.bytes / _seconds(self._limits.read) / 1e9

    def fma_gflop_s(self) -> float:
        return self._limits.flop / _seconds(self._limits.multiply_add) / 1e9

    def best(self, rounds: int = 5) -> Reading:
        """The best of several readings: another process can only make one slower."""
        return Reading(
            self.threads,
            max(self.read_gb_s() for _ in range(rounds)),
            max(self.fma_gflop_s() for _ in range(rounds)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for threads in options.threads:
        reading = Probe(threads, options.megabytes).best(options.rounds)
        print(f"{threads} thread(s): read {reading.read_gb_s:.1f} GB/s, multiply-add {reading.fma_gflop_s:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
