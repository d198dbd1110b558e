"""What batch invariance costs: decode steps of a batch, and a prompt, with and without `batch_invariant`.

usage: python benchmarks/batch_invariance_cpu.py [--batch 8] [--steps 4] [--context 32] [--prompt 256] [--rounds 9]
           [--layers 8] [--hidden 2048] [--dtype bfloat16] [--threads 2]
           [--out benchmarks/results/batch_invariance_cpu.json]

Random weights in the shape of Llama-3.2-1B, with a vocabulary of 32000.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from engine_rounds import Rounds, build_model, engine_contestant
from harness import conditions, print_table, run_rounds, save
from probe import Probe

from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("batch", 8), ("steps", 4), ("context", 32), ("prompt", 256), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("layers", 8), ("hidden", 2048), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.layers, options.hidden, getattr(torch, options.dtype))
    rounds = Rounds(options.batch, options.steps, options.context, options.prompt, options.rounds)
    contestants = []
    for name, invariant in (("free", False), ("batch_invariant", True)):
        limits = Options.make(
            {
                "max_num_seqs": options.batch,
                "enable_prefix_caching": False,
                "kv_cache_memory_bytes": 1 << 27,
                "threads": options.threads,
                "fallback": "error",
                "batch_invariant": invariant,
            }
        )
        contestants.append(engine_contestant(name, ModelEngine(model, limits, Report()), limits, rounds))
    names = ("batch", "steps", "context", "prompt", "layers", "hidden", "dtype", "threads")
    setting = conditions(**{name: getattr(options, name) for name in names})
    result = run_rounds(contestants, options.rounds, setting, Probe(options.threads, megabytes=256))
    print_table(result, ("decode", "prefill"), f"Batch invariance, batch {options.batch}", ["free"])
    if options.out:
        save(result, options.out)


if __name__ == "__main__":
    main()
