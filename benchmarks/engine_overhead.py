"""What a decode step costs besides the compiled step: planning, building the batch, entering the program, sampling.

usage: python benchmarks/engine_overhead.py [--batch 8] [--steps 400] [--context 300] [--layers 16] [--vocab 32000]
           [--out benchmarks/results/engine_overhead.json]

The model is a Llama of so many layers and next to no width: the number of caches and weights is that of a real one, the
compiled step itself takes hardly any time. Medians over the steps, in microseconds; "native" is the time inside the
compiled step, "overhead" all the rest of `EngineCore.step`.
"""

from __future__ import annotations

import argparse
import json
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
from llmopt.runtime.engine_core import EngineCore

LIMIT_US = 150.0


def build_core(batch: int, layers: int, vocabulary: int, max_tokens: int) -> EngineCore:
    """An engine over a narrow Llama."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    options = Options.make({"max_num_seqs": batch})
    return ModelEngine(LlamaForCausalLM(config).eval(), options, Report()).core()


class Stopwatch:
    """Adds up the time spent in some methods, by name, and starts anew at each `lap`."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times every call of `owner.method`."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._now[name] += time.perf_counter() - start

        setattr(owner, method, timed)

    def lap(self, total: float) -> None:
        """Ends a step that took `total` seconds."""
        self._now["step"] = total
        self._now["overhead"] = total - self._now["native"]
        self._now["enter program"] = self._now.pop("program") - self._now["native"]
        for name, seconds in self._now.items():
            self.laps[name].append(seconds * 1e6)
        self._now.clear()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median microseconds of each part of a decode step."""
    core = build_core(options.batch, options.layers, options.vocab, options.context + options.steps + 64)
    watch = Stopwatch()
    for plan in core.program.executable.native_plans:
        watch.watch(plan, "run", "native")
    watch.watch(core.program, "executable", "program")
    watch.watch(core.scheduler, "plan", "plan")
    watch.watch(core.scheduler, "commit", "commit")
    watch.watch(core._builder, "build", "build batch")
    watch.watch(core, "_sampler", "sample")
    params = SamplingParams(temperature=0.0, max_tokens=options.steps + 40)
    for row in range(options.batch):
        core.add_request([row + 1] * (options.context + 3 * row), params)
    while any(request.num_generated < 8 for request in core.scheduler.requests.values()):
        core.step()
    watch._now.clear()
    for _ in range(options.steps):
        start = time.perf_counter()
        core.step()
        watch.lap(time.perf_counter() - start)
    return {name: statistics.median(laps) for name, laps in watch.laps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    medians = measure(options)
    for name, microseconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:15} {microseconds:8.1f} us")
    rest = medians["overhead"] - medians["sample"]
    print(f"overhead without sampling {rest:.1f} us; the whole overhead is to stay below {LIMIT_US:.0f} us at batch 8")
    if options.out:
        setting = conditions(
            **{name: getattr(options, name) for name in ("batch", "steps", "context", "layers", "vocab")}
        )
        text = json.dumps({"conditions": setting, "median_us": medians}, indent=1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
