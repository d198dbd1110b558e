"""What `llmopt bench` measures: requests and tokens per second, or how long single steps and tokens take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.commands.workload import Work
from llmopt.compiler.errors import InputError, OptionError
from llmopt.llm import LLM
from llmopt.output_file import check_output
from llmopt.runtime.sampling import SamplingParams

PERCENTILES = (50, 90, 99)
PLOT_FORMATS = (".png", ".pdf", ".svg")


def work_params(output_len: int) -> SamplingParams:
    """Equal work whatever the model says: greedy, exactly `output_len` tokens."""
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)


@dataclass
class Throughput:
    """One run over many prompts that all wait from the beginning.

    Attributes: `seconds`; `num_requests`, `prompt_tokens`, `output_tokens`; `num_steps`; `max_kv_cache_usage`, the
    largest fraction of the pages that was held at once; `num_preemptions`; `prefix_cache_hits`, prompt tokens that were
    not computed; `timeline`, seconds since the beginning, tokens generated until then, and pages held.
    """

    seconds: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    max_kv_cache_usage: float
    num_preemptions: int
    prefix_cache_hits: int
    timeline: list[tuple[float, int, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Under the names of `vllm bench throughput`, and what it does not have."""
        return {
            "elapsed_time": self.seconds,
            "num_requests": self.num_requests,
            "total_num_tokens": self.prompt_tokens + self.output_tokens,
            "num_prompt_tokens": self.prompt_tokens,
            "num_output_tokens": self.output_tokens,
            "requests_per_second": self.num_requests / self.seconds,
            "tokens_per_second": (self.prompt_tokens + self.output_tokens) / self.seconds,
            "output_tokens_per_second": self.output_tokens / self.seconds,
            "num_steps": self.num_steps,
            "max_kv_cache_usage": self.max_kv_cache_usage,
            "num_preemptions": self.num_preemptions,
            "prefix_cache_hits": self.prefix_cache_hits,
        }


def measure_throughput(llm: LLM, work: Sequence[Work], advance: Callable[[], object]) -> Throughput:
    """Runs all of it once; `advance` is called whenever a prompt is finished."""
    params = [work_params(each.output_len) for each in work]
    before = llm.get_metrics()
    usage, count = 0.0, 0
    timeline: list[tuple[float, int, float]] = []
    steps = before.num_steps
    begin = time.perf_counter()
    with closing(llm.stream([each.prompt for each in work], params)) as chunks:
        for chunk in chunks:
            count += chunk.token_id is not None
            now = llm.get_metrics()
            if now.num_steps != steps:
                steps, usage = now.num_steps, max(usage, now.kv_cache_usage)
                timeline.append((time.perf_counter() - begin, count, now.kv_cache_usage))
            if chunk.finish_reason is not None:
                advance()
                if chunk.finish_reason == "error":
                    raise InputError(f"prompt {chunk.index + 1} failed; `llmopt generate` says why")
    seconds = time.perf_counter() - begin
    after = llm.get_metrics()
    return Throughput(
        seconds,
        len(work),
        after.prompt_tokens - before.prompt_tokens,
        count,
        after.num_steps - before.num_steps,
        usage,
        after.num_preemptions - before.num_preemptions,
        after.prefix_cache_hits - before.prefix_cache_hits,
        timeline,
    )


@dataclass
class Latency:
    """Repeated runs of one batch; all times in seconds.

    Attributes: `runs`, from the first step to the last token of the batch; `ttft`, of each request until its first
    token; `tpot`, of each request for one token after the first, on average; `steps`, of each step that generated
    for all requests what it could, once all had their first token.
    """

    runs: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Mean and percentiles of each, and the samples."""
        found: dict[str, Any] = {}
        for name, samples in vars(self).items():
            found[name] = {"mean": float(np.mean(samples)) if samples else None, **percentiles(samples)}
            found[name]["samples"] = samples
        return found


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """`p50`, `p90` and `p99`; None without samples."""
    return {f"p{p}": float(np.percentile(samples, p)) if samples else None for p in PERCENTILES}


def measure_batch(llm: LLM, work: Sequence[Work], into: Latency) -> None:
    """Runs one batch and adds what it took."""
    core = llm._engine_core(fresh=False)
    requests = [
        core.add_request(llm._requests.encode(each.prompt)[1][0], work_params(each.output_len)) for each in work
    ]
    first: list[float | None] = [None] * len(requests)
    last = [0.0] * len(requests)
    begin = now = time.perf_counter()
    while core.has_unfinished:
        before, started = now, all(seen is not None for seen in first)
        for request in core.step():
            if request.error is not None:
                raise request.error
        now = time.perf_counter()
        if started:
            into.steps.append(now - before)
        for i, request in enumerate(requests):
            if request.num_generated and first[i] is None:
                first[i] = now - begin
            if request.finish_reason is not None and not last[i]:
                last[i] = now - begin
    into.runs.append(now - begin)
    for request, start, end in zip(requests, first, last, strict=True):
        into.ttft.append(start or 0.0)
        if request.num_generated > 1:
            into.tpot.append((end - (start or 0.0)) / (request.num_generated - 1))


def check_plot(path: Path | None) -> None:
    """Raises InputError, before any work, for a plot that could not be written."""
    if path is None:
        return
    check_output(path, "--plot")
    if path.suffix not in PLOT_FORMATS:
        raise OptionError("plot", str(path), f"a name that ends in {', '.join(PLOT_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'llmopt[bench]'") from None


def plot_throughput(found: Throughput, path: Path) -> None:
    """Tokens so far, and the share of the KV cache that was held, over the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    seconds, tokens, usage = zip(*found.timeline, strict=True)
    above.plot(seconds, tokens)
    above.set_ylabel("tokens generated")
    above.set_title(f"{found.output_tokens / found.seconds:.1f} output tokens/s, {found.num_requests} requests")
    below.plot(seconds, [100 * share for share in usage])
    below.set_ylabel("KV cache held, %")
    below.set_xlabel("seconds")
    figure.savefig(path)


def plot_latency(found: Latency, path: Path) -> None:
    """Of first tokens, later tokens and steps: which share took how long at most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    titles = {"ttft": "time to first token", "tpot": "time per output token", "steps": "step"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        samples = sorted(getattr(found, name))
        axes.plot([1e3 * each for each in samples], [100 * (i + 1) / len(samples) for i in range(len(samples))])
        axes.set_title(title)
        axes.set_xlabel("ms")
        axes.set_ylabel("% at most")
    figure.savefig(path)
