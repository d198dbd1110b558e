"""The models of `compile_cpu.py`: real shapes, random weights, and a forward call of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    ViTConfig,
    ViTModel,
)

CACHE_TOKENS = 512


@dataclass(frozen=True)
class Model:
    """make: a configuration's model; inputs: keyword arguments of a forward call at a batch size and a length.

    length: tokens, where nothing else is asked for; 0 for models that take none.
    """

    make: Callable[[dict[str, Any]], PreTrainedModel]
    inputs: Callable[[PreTrainedModel, int, int], dict[str, Any]]
    length: int
    measures: Literal["first call", "throughput"]


def _llama(changes: dict[str, Any]) -> PreTrainedModel:
    shape = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def cache_name(model: PreTrainedModel) -> str:
    """What the forward of a model calls the cache that it takes: newer transformers has another name for it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _llama_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=max(length, CACHE_TOKENS))
    cache.early_initialization(
        batch_size=batch,
        num_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    positions = torch.arange(length)[None]
    return {
        "input_ids": _tokens(model, batch, length),
        "position_ids": positions,
        cache_name(model): cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }


def _vit_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    size = model.config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(model.dtype)}


MODELS: dict[str, Model] = {
    "llama": Model(_llama, _llama_inputs, 32, "first call"),
    "bert": Model(
        lambda changes: BertModel(BertConfig(**changes)),
        lambda model, batch, length: {"input_ids": _tokens(model, batch, length)},
        128,
        "throughput",
    ),
    "vit": Model(lambda changes: ViTModel(ViTConfig(**changes)), _vit_inputs, 0, "throughput"),
}


def build(kind: str, dtype: str, layers: int | None = None, **changes: Any) -> PreTrainedModel:
    """The model in eval mode, made in `dtype` at once; `layers` and `changes` replace the configuration's own."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # never a second copy in float32
    try:
        model = MODELS[kind].make({**changes, **({"num_hidden_layers": layers} if layers else {})})
    finally:
        torch.set_default_dtype(previous)
    model.config.dtype = getattr(torch, dtype)
    return model.eval()


def inputs(model: PreTrainedModel, batch: int, length: int | None = None) -> dict[str, Any]:
    """Arguments of a forward call; `length` tokens instead of the model's own number."""
    found = next(entry for name, entry in MODELS.items() if name in model.config.model_type)
    return found.inputs(model, batch, length or found.length)


def reset(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for another call: a static cache is empty again."""
    for argument in arguments.values():
        if isinstance(argument, StaticCache):
            argument.reset()
    return arguments
