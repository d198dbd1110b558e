"""Many waiting requests of mixed lengths: llmopt beside transformers' continuous batching and one-at-a-time `generate`.

usage: python benchmarks/serving_cpu.py [--dtype bfloat16] [--layers 16] [--requests 64] [--prompt-len 16:128]
           [--output-len 16:128] [--rounds 2] [--threads 2] [--one-at-a-time 4]
           [--out benchmarks/results/serving_cpu.json]

The shape is Llama-3.2-1B's, the weights are random and shared by all contestants, every request has its own number of
tokens to generate and none ends earlier. All requests wait when the clock starts. One unit of work is an output token.

`generate_batch` is transformers' continuous batching: its manager, fed as `generate_batch` feeds it, because that
function takes one length for all. One-at-a-time `generate` runs every n-th request only (`--one-at-a-time` of them):
its rate does not depend on how many there are.

Beside the rates stands the step-time model: how long the compiled step alone takes for so many tokens, measured after
the rounds and added up over the steps that llmopt took, which is the best that any scheduling around it can reach.
"Outside" is the share of the wall time that is not inside the compiled step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_cpu import DTYPES, build_model
from harness import ROOT, Contestant, conditions, plot, print_table, run_rounds, write_json
from probe import Probe
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from llmopt import SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.generation import Job, run_jobs
from llmopt.runtime.step_program import StepBatch, StepProgram

WARM_UP_REQUESTS = 4
PAGE_SIZE = 32
PEERS = ("generate_batch", "generate")
PHASE = "output"


@dataclass(frozen=True)
class Workload:
    """prompts: token ids of each request; lengths: how many tokens each generates."""

    prompts: list[list[int]]
    lengths: list[int]

    @classmethod
    def random(cls, count: int, prompt: range, output: range, vocab_size: int) -> Workload:
        """Lengths evenly spread over the ranges, in random order; tokens at random. The seed is fixed."""
        generator = torch.Generator().manual_seed(0)

        def spread(lengths: range) -> list[int]:
            last = max(count - 1, 1)
            even = [lengths.start + (len(lengths) - 1) * i // last for i in range(count)]
            return [even[i] for i in torch.randperm(count, generator=generator).tolist()]

        prompts = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in spread(prompt)]
        return cls(prompts, spread(output))

    def every(self, count: int) -> Workload:
        """`count` of the requests, evenly chosen."""
        step = max(1, len(self.prompts) // count)
        return Workload(self.prompts[::step][:count], self.lengths[::step][:count])

    @property
    def num_output(self) -> int:
        """Tokens to generate in all."""
        return sum(self.lengths)


class StepLog:
    """What the steps of a program do from the time this is made: seconds inside native code, and tokens of each."""

    def __init__(self, program: StepProgram) -> None:
        self.seconds = 0.0
        self.tokens: list[int] = []
        for plan in program.executable.native_plans:
            self._watch(plan, program)

    def _watch(self, plan: Any, program: StepProgram) -> None:
        entry = plan._entry

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return entry(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin
                # The first symbol is the number of tokens.
                self.tokens.append(next(iter(program.executable.last_sizes.values())))

        plan._entry = timed


class Llmopt:
    """The engine behind `LLM.generate`, given all requests at once."""

    def __init__(self, model: PreTrainedModel, work: Workload, max_num_seqs: int) -> None:
        longest = max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True))
        self._engine = ModelEngine(
            model,
            Options.make({"max_num_seqs": max_num_seqs, "max_model_len": longest, "enable_prefix_caching": False}),
            Report(),
        )
        self.core = self._engine.core()
        self._context = sum(map(len, work.prompts)) // len(work.prompts)
        self._log = StepLog(self.core.program)
        # Of each run: seconds in all, seconds inside the compiled step, tokens of each step.
        self.runs: list[tuple[float, float, list[int]]] = []

    def __call__(self, work: Workload) -> list[list[int]]:
        jobs = [
            Job(prompt, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))
            for prompt, length in zip(work.prompts, work.lengths, strict=True)
        ]
        inside, steps, begin = self._log.seconds, len(self._log.tokens), time.perf_counter()
        requests = {update.index: update.request for update in run_jobs(self.core, jobs)}
        self.runs.append((time.perf_counter() - begin, self._log.seconds - inside, self._log.tokens[steps:]))
        return [requests[index].generated for index in range(len(jobs))]

    def step_times(self, largest: int) -> dict[int, float]:
        """Tokens -> seconds of the compiled step alone: decodes at the workload's prompt length, then prompts."""
        program, most = self.core.program, self.core.scheduler.config.max_num_seqs
        each = -(-(self._context + 1) // program.block_size)  # pages of a request
        cache = program.new_cache(each * max(most, -(-largest // self._context)))
        for tensor in cache.tensors:
            tensor.zero_()
        found: dict[int, float] = {}
        size = 1
        while size < 2 * largest:
            count = min(size, largest)
            if count <= most:
                held = [list(range(i * each, (i + 1) * each)) for i in range(count)]
                batch = StepBatch.build([[i] for i in range(count)], [self._context] * count, held, program.block_size)
            else:
                prompts, held = [], []
                for start in range(0, count, self._context):
                    prompts.append(list(range(min(self._context, count - start))))
                    held.append(list(range(len(held) * each, (len(held) + 1) * each)))
                batch = StepBatch.build(prompts, [0] * len(prompts), held, program.block_size)
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                program(batch, cache)
                seconds.append(time.perf_counter() - begin)
            found[count] = statistics.median(seconds)
            size = size * 2 if size > 16 else size + max(1, size // 2)
        return found


def modelled_seconds(times: dict[int, float], steps: Sequence[int]) -> float:
    """What steps of so many tokens take by the step-time model, straight lines between the sizes measured."""
    return float(np.interp(steps, list(times), list(times.values())).sum())


class ContinuousBatching:
    """transformers' continuous batching. Its manager is started once and kept: starting it is not timed."""

    def __init__(self, model: PreTrainedModel, work: Workload) -> None:
        settings = ContinuousBatchingConfig(
            num_blocks=sum(-(-(len(p) + n) // PAGE_SIZE) for p, n in zip(work.prompts, work.lengths, strict=True)),
            page_size=PAGE_SIZE,
            max_batch_tokens=2048,
            use_async_batching=False,
        )
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=max(work.lengths), eos_token_id=-1),
            continuous_batching_config=settings,
        )
        self._manager.start()

    def __call__(self, work: Workload) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        names = [
            self._manager.add_request(prompt, max_new_tokens=length)
            for prompt, length in zip(work.prompts, work.lengths, strict=True)
        ]
        while len(found) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise RuntimeError("the manager's thread ended")
        return [found[name] for name in names]

    def stop(self) -> None:
        """Ends the manager's thread."""
        self._manager.stop(block=True, timeout=10)


class OneAtATime:
    """`model.generate` for one request after the other."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, work: Workload) -> list[list[int]]:
        outputs = []
        for prompt, length in zip(work.prompts, work.lengths, strict=True):
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            found = self._model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=length, max_new_tokens=length, pad_token_id=0
            )
            outputs.append(found[0, len(prompt) :].tolist())
        return outputs


def contestant(name: str, run: Callable[[Workload], list[list[int]]], work: Workload, **describe: Any) -> Contestant:
    """One phase; its first run, which is not timed, is a few requests only."""
    small = work.every(WARM_UP_REQUESTS)
    runs = iter([small])

    def phase() -> int:
        task = next(runs, work)
        outputs = run(task)
        if [len(tokens) for tokens in outputs] != task.lengths:
            raise RuntimeError("a request ended early")
        return task.num_output

    return Contestant(name, {PHASE: phase}, describe)


def parse_range(text: str) -> range:
    """`16:256` to the lengths 16 to 256."""
    low, _, high = text.partition(":")
    first, last = int(low), int(high or low)
    if not 0 < first <= last:
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST with 0 < FIRST <= LAST, got {text!r}")
    return range(first, last + 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-len", type=parse_range, default=range(16, 129), metavar="FIRST:LAST")
    parser.add_argument("--output-len", type=parse_range, default=range(16, 129), metavar="FIRST:LAST")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--one-at-a-time", type=int, default=4, help="how many requests `generate` runs")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", type=Path, help="JSON file; a plot goes beside it")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = build_model(options.layers, DTYPES[options.dtype])
    work = Workload.random(options.requests, options.prompt_len, options.output_len, model.config.vocab_size)
    llmopt = Llmopt(model, work, options.max_num_seqs)
    contestants = [contestant("llmopt", llmopt, work)]
    batching = ContinuousBatching(model, work) if "generate_batch" in options.peers else None
    if batching is not None:
        contestants.append(contestant("generate_batch", batching, work))
    if "generate" in options.peers:
        contestants.append(contestant("generate", OneAtATime(model), work.every(options.one_at_a_time)))
    setting = conditions(
        dtype=options.dtype,
        layers=options.layers,
        requests=options.requests,
        prompt_tokens=sum(map(len, work.prompts)),
        output_tokens=work.num_output,
        max_num_seqs=options.max_num_seqs,
        one_at_a_time=options.one_at_a_time,
    )
    try:
        result = run_rounds(contestants, options.rounds, setting, Probe(options.threads))
    finally:
        if batching is not None:
            batching.stop()
    print_table(result, (PHASE,), f"Llama-3.2-1B shape, {options.dtype}, {options.requests} requests", options.peers)
    runs = llmopt.runs[1:]
    times = llmopt.step_times(max(max(steps) for _, _, steps in runs))
    outside = [1 - inside / total for total, inside, _ in runs]
    of_ideal = [modelled_seconds(times, steps) / total for total, _, steps in runs]
    print("outside the compiled step:", ", ".join(f"{share:.1%}" for share in outside))
    print("of the step-time model's ideal:", ", ".join(f"{share:.0%}" for share in of_ideal))
    if options.out:
        out = options.out if options.out.is_absolute() else ROOT / options.out
        own = {"outside_step": outside, "of_ideal": of_ideal, "step_seconds": times, "steps": [r[2] for r in runs]}
        write_json({**result.to_json(), **own}, out)
        plot(result, (PHASE,), out.with_suffix(".png"))


if __name__ == "__main__":
    main()
