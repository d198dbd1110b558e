"""A Llama of any size with random weights, and what rounds measure of an engine over it: decoding, and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from harness import Contestant
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt import SamplingParams
from llmopt.compiler.options import Options
from llmopt.engine import ModelEngine
from llmopt.runtime.adapters import Adapter
from llmopt.runtime.engine_core import EngineCore


@dataclass(frozen=True)
class Rounds:
    """batch: requests that decode together; steps: of each round; context: their prompts; prompt: the one that is
    timed; rounds: how many there are after the warm-up."""

    batch: int
    steps: int
    context: int
    prompt: int
    rounds: int


def build_model(layers: int, hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama in the proportions of Llama-3.2-1B, with a vocabulary of 32000."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    # Drawing every weight by itself would take minutes.
    some = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for parameter in model.parameters():
        count = parameter.numel()
        parameter.data.view(-1).copy_(some.repeat(-(-count // len(some)))[:count])
    return model.eval()


def engine_contestant(
    name: str, engine: ModelEngine, limits: Options, rounds: Rounds, adapters: Sequence[Adapter] = ()
) -> Contestant:
    """Phase "decode": some steps of a batch that goes on decoding, with `adapters` in turn; "prefill": one prompt, with
    the first of them."""

    def core() -> EngineCore:
        return EngineCore(engine.program(), engine.info, limits, engine.max_model_len)

    def used(number: int) -> Adapter | None:
        return adapters[number % len(adapters)] if adapters else None

    decoding, filling = core(), core()
    params = SamplingParams(temperature=0.0, max_tokens=(rounds.rounds + 1) * rounds.steps + 2)
    for number in range(rounds.batch):
        decoding.add_request([number + 1] * rounds.context, params, adapter=used(number))
    decoding.step()

    def decode() -> int:
        for _ in range(rounds.steps):
            decoding.step()
        return rounds.batch * rounds.steps

    def prefill() -> int:
        filling.add_request([1] * rounds.prompt, SamplingParams(temperature=0.0, max_tokens=1), adapter=used(0))
        while filling.has_unfinished:
            filling.step()
        return rounds.prompt

    return Contestant(name, {"decode": decode, "prefill": prefill})
