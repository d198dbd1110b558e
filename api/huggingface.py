"""All that llmopt knows about transformers: how to call a model without a cache, and what its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.compiler.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class ModelInfo:
    """A causal language model as the engine sees it.

    forward: `input_ids[1, S] -> logits[1, S, V]`, without a cache.
    max_model_len: longest sequence.
    vocab_size: number of token ids that the embedding holds.
    eos_token_ids: tokens that end a text.
    """

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


# Rotary factors that change with the length of the sequence: one graph cannot serve requests of different lengths.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

# For modules that do not say how long a sequence may be.
_DEFAULT_LENGTH = 2048


def is_pretrained(model: object) -> bool:
    """Whether `model` is a transformers model; does not import transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def describe(model: torch.nn.Module) -> ModelInfo:
    """What the engine needs to know about a model.

    Raises UnsupportedError for encoder-decoder models and for rotary embeddings that depend on the length.
    """
    if not is_pretrained(model):
        return _describe_plain(model)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("encoder-decoder models have no step program yet; torch.compile works")
    for kind in _rope_types(config):
        if kind in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedError(f"rope type {kind!r} depends on the length of the sequence")
    original = type(model).forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        # The class's own forward: the instance's may be compiled already.
        result = original(model, input_ids=ids, use_cache=False, return_dict=True)
        return result.logits

    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or _DEFAULT_LENGTH
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    return ModelInfo(model, forward, int(length), int(embedding.weight.shape[0]), ids)


def _describe_plain(model: torch.nn.Module) -> ModelInfo:
    embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if embedding is None:
        raise UnsupportedError("the module holds no torch.nn.Embedding, so its vocabulary is unknown")
    original = type(model).forward
    length = int(getattr(model, "max_model_len", _DEFAULT_LENGTH))
    return ModelInfo(model, lambda ids: original(model, ids), length, embedding.num_embeddings, ())


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer = [p for p in parameters.values() if isinstance(p, dict)]
    return {str(p.get("rope_type", p.get("type", "default"))) for p in per_layer or [parameters]}


def load_model(path: str | Path, dtype: torch.dtype | None) -> torch.nn.Module:
    """A causal language model from a local Hugging Face folder. Never reaches for the network.

    Raises InputError when there is no such folder.
    """
    folder = _folder(path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local Hugging Face folder, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    file = _folder(path) / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file} does not exist; pass token ids, or a tokenizer")
    return Tokenizer.from_file(str(file))


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is no Hugging Face model folder: it has no config.json (model names are not looked up)"
        )
    return folder
