"""Times every step of compiled programs, beside the machine's limits probed in the same minute."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from llmopt.codegen.cpu.limits import probe
from llmopt.compiler.errors import OptionError
from llmopt.compiler.report import GraphReport, Limits, Timing
from llmopt.compiler.roofline import check_sizes
from llmopt.runtime.compiled import CompiledGraph
from llmopt.runtime.executable import Executable
from llmopt.runtime.step_program import StepBatch, StepProgram

ROUNDS = 7


def machine_limits(threads: int = 0) -> Limits:
    """Probes the machine with `threads` threads, PyTorch's number for 0; takes about a second."""
    count = threads or torch.get_num_threads()
    read, peaks = probe(count)
    return Limits(count, read, peaks)


def _better(one: Limits, other: Limits) -> Limits:
    """The better of two probes, before and after: another process can only make one slower."""
    peaks = {dtype: max(peak, other.gflop_s[dtype]) for dtype, peak in one.gflop_s.items()}
    return Limits(one.threads, max(one.read_gb_s, other.read_gb_s), peaks)


def _medians(executable: Executable, run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each step of the program, over `rounds` runs after one to warm up."""
    run()
    samples: list[list[float]] = []
    try:
        for _ in range(rounds):
            executable.profile(True)
            run()
            samples.append(executable.step_seconds())
    finally:
        executable.profile(False)
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def measure_step(
    graph: GraphReport, program: StepProgram, vocabulary: int, given: Mapping[str, int], rounds: int = ROUNDS
) -> None:
    """Runs a step on random tokens over a cache of random numbers and notes the times in `graph.timing`.

    given: `tokens`, `requests` and `context` of the batch; tokens are spread evenly over the requests. Other sizes
    follow from these. Raises OptionError for others, and for fewer tokens than requests.
    """
    details = graph.details
    if details is None:
        return
    sizes = check_sizes(details, given)
    for name in given:
        if name not in ("tokens", "requests", "context"):
            raise OptionError("sizes", name, ("tokens", "requests", "context"))
    tokens, requests = sizes["tokens"], sizes["requests"]
    if tokens < requests or tokens % requests:
        raise OptionError("tokens", tokens, f"a multiple of requests, which is {requests}")
    count = tokens // requests
    # A query sees what lies before it: the average over `count` neighbours is half their number more than the start.
    start = max(0, sizes.get("context", 1) - (count + 1) // 2)
    pages = -(-(start + count) // program.block_size)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (requests, count), generator=rng).tolist()
    blocks = [list(range(row * pages, (row + 1) * pages)) for row in range(requests)]
    cache = program.new_cache(pages * requests)
    for tensor in cache.tensors:
        if tensor.is_floating_point():
            tensor.normal_(generator=rng)
    batch = StepBatch.build(ids, [start] * requests, blocks, program.block_size)
    before = machine_limits(program.executable.threads)
    seconds = _medians(program.executable, lambda: program(batch, cache), rounds)
    seconds = seconds[: len(program.program.steps)]  # without the search for the largest logits
    limits = _better(before, machine_limits(program.executable.threads))
    now = {"context": start + (count + 1) // 2, "rows": requests, "pages": pages, "cache_pages": pages * requests}
    graph.timing = Timing({**sizes, **{k: v for k, v in now.items() if k in sizes}}, seconds, rounds, limits)


def measure_call(
    graphs: Sequence[tuple[GraphReport, CompiledGraph]], run: Callable[[], object], rounds: int = ROUNDS
) -> None:
    """Calls `run` and notes the times of every given graph that it goes through."""
    if not graphs:
        return
    before = machine_limits(graphs[0][1].executable.threads)
    run()
    samples: dict[int, list[list[float]]] = {}
    executables = [compiled.executable for _, compiled in graphs]
    try:
        for _ in range(rounds):
            for executable in executables:
                executable.profile(True)
            run()
            for number, executable in enumerate(executables):
                samples.setdefault(number, []).append(executable.step_seconds())
    finally:
        for executable in executables:
            executable.profile(False)
    limits = _better(before, machine_limits(before.threads))
    for number, (graph, compiled) in enumerate(graphs):
        seconds = [statistics.median(column) for column in zip(*samples[number], strict=True)]
        if any(seconds):
            names = graph.details.symbols if graph.details is not None else {}
            sizes = dict(zip(names, compiled.executable.last_sizes.values(), strict=True))
            graph.timing = Timing(sizes, seconds, rounds, limits)
