"""What a decode step costs besides the compiled step: planning, building the batch, entering the program, sampling.

usage: python benchmarks/engine_overhead.py [--batch 8] [--steps 400] [--context 300] [--layers 16] [--vocab 32000]
           [--overlap-width 768] [--out benchmarks/results/engine_overhead.json]

The model is a Llama of so many layers and next to no width: the number of caches and weights is that of a real one, and
the compiled step is short; with 2.9 of 3.0 ms (two threads, AVX2) it is still most of it, and watched by itself.
Medians over the steps, in microseconds: "native" is the time inside the compiled step, "overhead" all the rest of
`EngineCore.step`; "take tokens, next batch" (`DecodeRun.commit`) and "enter program" are parts of it, "plan" and "build
batch" those of the few steps that need them. That is greedy, which the limit is about; for temperature 0.8 with top_p
0.95 the choice of the tokens is printed alone, as "sample". The parts are measured in steps of their own, because
watching them takes some microseconds as well. With `--out` the machine must be idle when it begins.

With `--overlap-width` a wider model, of 8 layers, then decodes with and without `async_scheduling` in turn, while the
caller spends 0 or 0.5 ms on each step's results: medians of milliseconds from step to step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import conditions
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt import SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.engine_core import EngineCore

LIMIT_US = 150.0
DRAWING = {"temperature": 0.8, "top_p": 0.95}


def build_engine(batch: int, layers: int, vocabulary: int, max_tokens: int, width: int = 64) -> ModelEngine:
    """An engine over a Llama, by default a narrow one."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=max_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    # As wide apart as a trained model's logits are: of flat ones top_p would leave nearly the whole vocabulary.
    model.lm_head.weight.data.mul_(3.0 / (0.02 * width**0.5))
    return ModelEngine(model, Options.make({"max_num_seqs": batch}), Report())


class Stopwatch:
    """Adds up the time spent in some methods, by name, and starts anew at each `lap`."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)
        self._watched: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times every call of `owner.method`."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._now[name] += time.perf_counter() - start

        self._watched.append((owner, method, inner))
        setattr(owner, method, timed)

    def stop(self) -> None:
        """Leaves everything as it was."""
        for owner, method, inner in reversed(self._watched):
            setattr(owner, method, inner)

    def lap(self, total: float) -> None:
        """Ends a step that took `total` seconds."""
        self._now["step"] = total
        self._now["overhead"] = total - self._now["native"]
        if "program" in self._now:
            self._now["enter program"] = self._now.pop("program") - self._now["native"]
        for name, seconds in self._now.items():
            self.laps[name].append(seconds * 1e6)
        self._now.clear()


def measure(core: EngineCore, options: argparse.Namespace, parts: bool, **sampling: Any) -> dict[str, float]:
    """Median microseconds of a decode step and of what is outside of its native call, or of its parts.

    Greedy, or with other parameters of `SamplingParams`.
    """
    watch = Stopwatch()
    for plan in core.program.executable.native_plans:
        watch.watch(plan, "_entry", "native")
    if parts:
        watch.watch(core, "program", "program")
        watch.watch(DecodeRun, "commit", "take tokens, next batch")
        watch.watch(core.scheduler, "plan", "plan")
        watch.watch(core._builder, "build", "build batch")
        watch.watch(core, "_choose", "sample")
    params = SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=options.steps + 40)
    for row in range(options.batch):
        core.add_request([row + 1] * (options.context + 3 * row), params)
    while any(request.num_generated < 8 for request in core.scheduler.requests.values()):
        core.step()
    watch._now.clear()
    for _ in range(options.steps):
        start = time.perf_counter()
        core.step()
        watch.lap(time.perf_counter() - start)
    watch.stop()
    core.fail_all(RuntimeError("measured"))
    return {name: statistics.median(laps) for name, laps in watch.laps.items()}


def measure_overlap(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds from step to step, by what the caller spends on each, with and without overlap."""
    rounds, steps = 6, 40
    limit = options.context + 3 * options.batch + rounds * steps * 4 + 64
    engine = build_engine(options.batch, 8, options.vocab, limit, options.overlap_width)
    found: dict[str, dict[str, float]] = {}
    for busy in (0.0, 0.5e-3):
        cores, laps = {}, defaultdict[bool, list[float]](list)
        for overlap in (False, True):
            setting = Options.make({"max_num_seqs": options.batch, "async_scheduling": overlap})
            core = cores[overlap] = EngineCore(engine.program(), engine.info, setting, limit)
            for row in range(options.batch):
                prompt = [row + 1] * (options.context + 3 * row)
                core.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=limit - len(prompt)))
            while any(request.num_generated < 8 for request in core.scheduler.requests.values()):
                core.step()
        for _ in range(rounds):
            for overlap, core in cores.items():
                for number in range(steps + 2):
                    start = time.perf_counter()
                    core.step()
                    _spend(busy)
                    if number >= 2:  # a step of the other's round may still be settled in the first
                        laps[overlap].append((time.perf_counter() - start) * 1e3)
        found[f"caller spends {busy * 1e3:g} ms"] = {
            "async_scheduling" if overlap else "without": statistics.median(own) for overlap, own in laps.items()
        }
    return found


def _spend(seconds: float) -> None:
    """Keeps Python busy."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--overlap-width", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if options.out and load > 1:
        parser.error(f"others use this machine (load average {load:.2f}): no figures to keep; leave out --out")
    limit = options.context + 3 * options.batch + options.steps + 64
    core = build_engine(options.batch, options.layers, options.vocab, limit).core()
    medians = {**measure(core, options, True), **measure(core, options, False)}
    for name, microseconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:24} {microseconds:8.1f} us")
    print(f"the overhead is to stay below {LIMIT_US:.0f} us at batch 8")
    drawn = measure(core, options, True, **DRAWING, seed=0)["sample"]
    print(f"sample with {', '.join(f'{name} {value}' for name, value in DRAWING.items())}: {drawn:.1f} us")
    overlap = measure_overlap(options) if options.overlap_width else {}
    for name, row in overlap.items():
        print(f"{name}: " + ", ".join(f"{label} {ms:.3f} ms" for label, ms in row.items()))
    if options.out:
        setting = conditions(
            load_average=load,  # before this began
            **{
                name: getattr(options, name)
                for name in ("batch", "steps", "context", "layers", "vocab", "overlap_width")
            },
        )
        text = json.dumps(
            {"conditions": setting, "median_us": {**medians, "sample by drawing": drawn}, "overlap_ms": overlap},
            indent=1,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
