"""What LoRA adapters cost: decode steps of a batch, and a prompt, of a Llama with no, one or many adapters in use.

usage: python benchmarks/lora_cpu.py [--batch 8] [--steps 4] [--context 32] [--prompt 256] [--rank 16]
           [--rounds 9] [--layers 8] [--hidden 2048] [--dtype bfloat16] [--threads 2]
           [--out benchmarks/results/lora_cpu.json]

Random weights in the shape of Llama-3.2-1B, with a vocabulary of 32000; adapters of all linear layers but the head.
"off" is a program without the option; the others are one program, whose requests use so many different adapters.
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
from llmopt.compiler.step import LoraSpec
from llmopt.engine import ModelEngine
from llmopt.runtime.adapters import Adapter, AdapterPart


def random_adapter(spec: LoraSpec, rank: int, number: int) -> Adapter:
    """An adapter of all targets but the head."""
    generator = torch.Generator().manual_seed(number)
    parts = {}
    for index, target in enumerate(spec.targets):
        if target.name != "lm_head":
            a = torch.randn(rank, target.in_features, generator=generator) * target.in_features**-0.5
            b = torch.randn(rank, target.out_features, generator=generator) * 0.01
            parts[index] = AdapterPart(a.to(spec.dtype), b.to(spec.dtype), 1.0)
    return Adapter(f"adapter {number}", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.layers, options.hidden, getattr(torch, options.dtype))
    plain = {
        "max_num_seqs": options.batch,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 27,
        "threads": options.threads,
        "fallback": "error",
    }
    off = ModelEngine(model, Options.make(plain), Report())
    on = ModelEngine(
        model,
        Options.make({**plain, "enable_lora": True, "max_loras": options.batch, "max_lora_rank": options.rank}),
        Report(),
    )
    limits = Options.make(plain)
    spec = on.program().adapters.spec  # type: ignore[union-attr]
    adapters = [random_adapter(spec, options.rank, number) for number in range(options.batch)]
    counts = (0, 1, options.batch // 2, options.batch)
    rounds = Rounds(options.batch, options.steps, options.context, options.prompt, options.rounds)
    contestants = [
        engine_contestant("off", off, limits, rounds),
        *(engine_contestant(f"{count} adapters", on, limits, rounds, adapters[:count]) for count in counts),
    ]
    names = ("batch", "steps", "context", "prompt", "rank", "layers", "hidden", "dtype", "threads")
    setting = conditions(**{name: getattr(options, name) for name in names})
    result = run_rounds(contestants, options.rounds, setting, Probe(options.threads, megabytes=256))
    print_table(result, ("decode", "prefill"), f"LoRA of rank {options.rank}, batch {options.batch}", ["off"])
    if options.out:
        save(result, options.out)


if __name__ == "__main__":
    main()
