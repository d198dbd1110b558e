"""Many waiting requests of mixed lengths: llmopt beside transformers' continuous batching and one-at-a-time `generate`.

usage: python benchmarks/serving_cpu.py [--dtype bfloat16] [--layers 16] [--requests 64] [--prompt-len 16:256]
           [--output-len 16:128] [--rounds 3] [--threads 2] [--one-at-a-time 8]
           [--out benchmarks/results/serving_cpu.json]

The shape is Llama-3.2-1B's, the weights are random and shared by all contestants, every request has its own number of
tokens to generate and none ends earlier. All requests wait when the clock starts. One unit of work is an output token.

`generate_batch` is transformers' continuous batching: its manager, fed as `generate_batch` feeds it, because that
function takes one length for all. One-at-a-time `generate` runs every n-th request only (`--one-at-a-time` of them):
its rate does not depend on how many there are.

Beside the rates stands what llmopt itself could reach at best: `ideal` adds up the times that the compiled step alone
takes for the same batches of tokens, without any scheduling, sampling or detokenizing. `outside` is the share of the
wall time that is not inside the compiled step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode_cpu import DTYPES, build_model
from harness import ROOT, Contestant, conditions, plot, print_table, run_rounds, write_json
from probe import Probe
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from llmopt import LLM, SamplingParams
from llmopt.runtime.step_program import StepProgram

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


class StepClock:
    """Adds up the seconds inside the native code of a step program, from the time it is made."""

    def __init__(self, program: StepProgram) -> None:
        self.seconds = 0.0
        for plan in program.executable.native_plans:
            self._watch(plan)

    def _watch(self, plan: Any) -> None:
        run = plan.run

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return run(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        plan.run = timed


class Llmopt:
    """`LLM.generate` over all requests at once."""

    def __init__(self, model: PreTrainedModel, work: Workload, max_num_seqs: int) -> None:
        longest = max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True))
        self.llm = LLM(model, max_num_seqs=max_num_seqs, max_model_len=longest, enable_prefix_caching=False)
        self.outside: list[float] = []
        self._clock: StepClock | None = None

    def __call__(self, work: Workload) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in work.lengths]
        if self._clock is None:
            self._clock = StepClock(self.llm._engine_core().program)
        inside, begin = self._clock.seconds, time.perf_counter()
        outputs = self.llm.generate(work.prompts, params)
        self.outside.append(1 - (self._clock.seconds - inside) / (time.perf_counter() - begin))
        return [list(output.outputs[0].token_ids) for output in outputs]


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
    parser.add_argument("--prompt-len", type=parse_range, default=range(16, 257), metavar="FIRST:LAST")
    parser.add_argument("--output-len", type=parse_range, default=range(16, 129), metavar="FIRST:LAST")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--one-at-a-time", type=int, default=8, help="how many requests `generate` runs")
    parser.add_argument(
        "--peers", nargs="+", choices=("generate_batch", "generate"), default=["generate_batch", "generate"]
    )
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
    print("outside the compiled step:", ", ".join(f"{share:.1%}" for share in llmopt.outside[1:]))
    if options.out:
        out = options.out if options.out.is_absolute() else ROOT / options.out
        write_json({**result.to_json(), "outside_step": llmopt.outside[1:]}, out)
        plot(result, (PHASE,), out.with_suffix(".png"))


if __name__ == "__main__":
    main()
