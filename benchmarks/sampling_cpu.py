"""What choosing the next tokens of a batch costs beside transformers' processors on the same logits, in turns.

usage: python benchmarks/sampling_cpu.py [--batch 8] [--vocab 128256] [--rounds 9]

Logits are of standard deviation 3 around zero with a few likely tokens, as language models give them; the sampler's
time includes the sequences' own bookkeeping. Figures are microseconds for one step of the whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmopt.runtime.sampling import Sampler, SamplingParams, SamplingState

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min_p": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "typical_p 0.9": {"typical_p": 0.9},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "top_p 0.9, logprobs 5": {"top_p": 0.9, "logprobs": 5},
}


def processors(kind: dict[str, Any]) -> transformers.LogitsProcessorList:
    """transformers' own processors for these parameters; it has none for presence penalties and log probabilities."""
    made: list[Any] = []
    if "repetition_penalty" in kind:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(kind["repetition_penalty"]))
    if kind.get("temperature", 1.0) not in (0.0, 1.0):
        made.append(transformers.TemperatureLogitsWarper(kind["temperature"]))
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
    }
    made += [warpers[name](kind[name]) for name in warpers if name in kind]
    return transformers.LogitsProcessorList(made)


def peer(kind: dict[str, Any], logits: Tensor, ids: Tensor) -> Callable[[], object]:
    """As `GenerationMixin._sample` chooses."""
    chain = processors(kind)

    def run() -> object:
        scores = chain(ids, logits.clone())
        if kind.get("temperature") == 0.0:
            return scores.argmax(-1).tolist()
        return torch.multinomial(scores.softmax(-1), 1).tolist()

    return run


def own(kind: dict[str, Any], logits: Tensor, ids: Tensor) -> Callable[[], object]:
    sampler = Sampler(logits.shape[1])
    states = [SamplingState(SamplingParams(**kind, seed=1), row, i) for i, row in enumerate(ids.tolist())]
    return lambda: sampler(logits, states)


def microseconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats * 1e6


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logits = torch.randn(options.batch, options.vocab) * 3
    logits[:, :40] += torch.linspace(20, 8, 40)
    ids = torch.randint(0, options.vocab, (options.batch, options.prompt))
    table = Table(title=f"batch {options.batch}, vocabulary {options.vocab}, float32, {options.threads} threads")
    for heading in ("", "llmopt us", "transformers us", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, kind in KINDS.items():
        sides = (own(kind, logits, ids), peer(kind, logits, ids))
        times: tuple[list[float], list[float]] = ([], [])
        for round_number in range(options.rounds + 1):
            for side, samples in zip(sides, times, strict=True):
                each = microseconds(side, 3)
                if round_number:
                    samples.append(each)
        ours, theirs = map(statistics.median, times)
        table.add_row(name, f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
