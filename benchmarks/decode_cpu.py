"""Prefill and decode of the Llama-3.2-1B shape: llmopt beside eager PyTorch and Inductor, interleaved.

usage: python benchmarks/decode_cpu.py [--dtype bfloat16] [--layers 16] [--context 512] [--steps 16] [--rounds 5]
           [--threads 2] [--peers eager inductor llmopt] [--out benchmarks/results/decode_cpu.json]

The weights are random (speed does not depend on their values, as long as they are not zero) and shared by all
contestants but `llmopt-huge-pages`, which is llmopt with that option and moves its own copy, and `inductor-freezing`,
which is Inductor with that setting and packs a copy. One unit of work is the same everywhere: one forward pass and the
argmax of the last position, at batch 1.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from backends import BACKENDS
from compile_models import build
from harness import ROOT, Contestant, conditions, plot, print_table, run_rounds, save
from peers import StepDecoder, contestant, eager_decoder, inductor_decoder
from probe import Probe
from transformers import PreTrainedModel

from llmopt.compiler.options import Options

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
PHASES = ("prefill", "decode")


def build_model(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights in the shape of Llama-3.2-1B, with `layers` of its 16 layers."""
    return build("llama", str(dtype).removeprefix("torch."), layers)


def bytes_per_token(model: PreTrainedModel, context: int) -> float:
    """What a decode step must read: every weight once (the tied embedding is the head's) and the cache's content."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return float(weights + cache * model.dtype.itemsize)


def eager(model: PreTrainedModel, prompt: Sequence[int], steps: int) -> Contestant:
    decoder = eager_decoder(model, len(prompt) + steps)
    return contestant("eager", decoder, prompt, steps, attention=model.config._attn_implementation)


def inductor(
    model: PreTrainedModel,
    prompt: Sequence[int],
    steps: int,
    peer: Literal["inductor", "inductor-freezing"] = "inductor",
) -> Contestant:
    decoder = inductor_decoder(model, len(prompt) + steps, peer=peer)
    attention = model.config._attn_implementation
    return contestant(peer, decoder, prompt, steps, attention=attention, dynamic=False, **BACKENDS[peer] or {})


def frozen_inductor(model: PreTrainedModel, prompt: Sequence[int], steps: int) -> Contestant:
    return inductor(model, prompt, steps, peer="inductor-freezing")


def step_program(model: PreTrainedModel, prompt: Sequence[int], steps: int, huge_pages: bool = False) -> Contestant:
    own = copy.deepcopy(model) if huge_pages else model
    decoder = StepDecoder(own, len(prompt) + steps, Options(huge_pages=huge_pages))
    (graph,) = decoder.report.graphs
    fallbacks = sorted({fallback.op for fallback in graph.fallbacks})
    name = "llmopt-huge-pages" if huge_pages else "llmopt"
    return contestant(
        name,
        decoder,
        prompt,
        steps,
        options={"huge_pages": huge_pages},
        native_calls=graph.native_calls,
        aten_fallbacks=fallbacks,
    )


def on_huge_pages(model: PreTrainedModel, prompt: Sequence[int], steps: int) -> Contestant:
    return step_program(model, prompt, steps, huge_pages=True)


PEERS: dict[str, Callable[[PreTrainedModel, Sequence[int], int], Contestant]] = {
    "eager": eager,
    "inductor": inductor,
    "inductor-freezing": frozen_inductor,
    "llmopt": step_program,
    "llmopt-huge-pages": on_huge_pages,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens; decoding starts there")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=["eager", "inductor", "llmopt"])
    parser.add_argument("--out", type=Path, help="JSON file; a plot goes beside it")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    model = build_model(options.layers, dtype)
    prompt = torch.randint(0, model.config.vocab_size, (options.context,)).tolist()
    contestants = [PEERS[name](model, prompt, options.steps) for name in options.peers]
    shape = {key: getattr(model.config, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    setting = conditions(
        dtype=options.dtype,
        bits_per_weight=8 * dtype.itemsize,
        layers=options.layers,
        context=options.context,
        steps=options.steps,
        batch=1,
        shape=shape,
        contestants={c.name: dict(c.describe) for c in contestants},
    )
    result = run_rounds(contestants, options.rounds, setting, Probe(options.threads))
    read = bytes_per_token(model, options.context)
    title = f"Llama-3.2-1B shape, {options.layers} layers, {options.dtype}, context {options.context}, batch 1"
    peers = [name for name in options.peers if not name.startswith("llmopt")]
    print_table(result, PHASES, title, peers, {"decode": read})
    if options.out:
        out = options.out if options.out.is_absolute() else ROOT / options.out
        save(result, out)
        plot(result, PHASES, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
