"""All that llmopt knows about transformers: how to call a model without a cache, and what its configuration says."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmopt.checkpoint import check_weights, read_json
from llmopt.compiler.errors import InputError, UnsupportedError
from llmopt.folder_tokenizer import FolderTokenizer
from llmopt.folder_tokenizer import load_tokenizer as read_tokenizer
from llmopt.runtime.mapped_pages import released_once_copied

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """A causal language model as the engine sees it.

    forward: `input_ids[1, S] -> logits[1, S, V]`, without a cache.
    max_model_len: longest sequence.
    vocab_size: number of token ids that the embedding holds.
    eos_token_ids: tokens that end a text.
    embedding: the module that makes embeddings `[1, S, H]` of token ids.
    sampling_defaults: fields of `SamplingParams` that the model's generation configuration sets.
    """

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    embedding: torch.nn.Module
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)


# Settings of a GenerationConfig that vLLM takes as defaults, and the names of the same in SamplingParams.
_SAMPLING_DEFAULTS = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}

# Rotary factors that change with the length of the sequence: one graph cannot serve requests of different lengths.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

# What configurations call the longest sequence.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
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
    length = next((n for name in _LENGTHS if (n := getattr(text, name, None))), _DEFAULT_LENGTH)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    given = {ours: getattr(generation, theirs, None) for theirs, ours in _SAMPLING_DEFAULTS.items()}
    defaults = {name: value for name, value in given.items() if value is not None}
    size = int(embedding.weight.shape[0])
    return ModelInfo(model, forward, int(length), size, ids, embedding, defaults)


def _describe_plain(model: torch.nn.Module) -> ModelInfo:
    embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if embedding is None:
        raise UnsupportedError("the module holds no torch.nn.Embedding, so its vocabulary is unknown")
    original = type(model).forward
    length = int(getattr(model, "max_model_len", _DEFAULT_LENGTH))
    return ModelInfo(model, lambda ids: original(model, ids), length, embedding.num_embeddings, (), embedding)


def implementations(model: torch.nn.Module) -> list[str]:
    """Which of transformers' implementations the configuration chooses, as `set_attn_implementation` sets it."""
    config = getattr(model, "config", None)
    return [str(getattr(config, name, None)) for name in ("_attn_implementation", "_experts_implementation")]


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer = [p for p in parameters.values() if isinstance(p, dict)]
    return {str(p.get("rope_type", p.get("type", "default"))) for p in per_layer or [parameters]}


def generation_mode(config: Any) -> str:
    """What a GenerationConfig asks for, in transformers' words: "greedy_search", "sample", "beam_search", ..."""
    mode = config.get_generation_mode()
    return str(getattr(mode, "value", mode))


def causal_output(logits: torch.Tensor, cache: Mapping[str, Any]) -> Any:
    """What a forward returns to transformers' decoding loop; `cache` is one entry, under forward's own name for it."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(logits=logits, **cache)


def dynamic_cache(model: Any, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A DynamicCache with these keys and values `[B, heads, S, size]` of the model's layers."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, (keys, values) in enumerate(layers):
        cache.update(keys, values, layer)
    return cache


def with_field(output: Any, name: str, value: Any) -> Any:
    """A copy of one of transformers' output objects with another value of the field `name`."""
    return type(output)(**{**output, name: value})


def load_model(path: str | Path, dtype: torch.dtype | None) -> torch.nn.Module:
    """A causal language model from a local Hugging Face folder. Never reaches for the network, nor runs its code.

    The module is built without memory. Weights are views of the mapped safetensors files; where they have another
    `dtype`, or transformers merges several into one (experts), they are computed one by one.

    Raises InputError for a folder that is missing, damaged or does not hold every weight of the model, and
    UnsupportedError for a type of model that transformers does not know or that is no causal language model.
    """
    folder = _folder(path)
    config = read_json(folder / "config.json")
    check_weights(folder, config.get("transformers_weights"))
    _check_type(folder, config)
    from transformers import AutoModelForCausalLM

    try:
        with _one_by_one(), released_once_copied():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise UnsupportedError(f"{folder} needs a package that is not there: {_first_line(error)}") from error
    except MemoryError:
        raise
    # A folder comes from outside: what its configuration says may make transformers fail in any way.
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, info[kind])):
            # transformers would go on with random values.
            raise InputError(f"{folder}: {len(names)} {kind} of {type(model).__name__}, the first is {names[0]}")
    if names := sorted(map(str, info["unexpected_keys"])):
        log.warning("%s: %d weights that %s does not use: %s", folder, len(names), type(model).__name__, names[0])
    return model.eval()


_LOADING = threading.Lock()


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """transformers would read weights ahead in threads: all that are to be merged would stand in memory beside what is
    made of them."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    with _LOADING:  # the variable is the process's: of two loads at once, the later one would keep it for good
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _check_type(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises for a type of model that transformers would need code of the folder's for, or that it cannot run."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{folder / 'config.json'} has no model_type")
    if kind not in CONFIG_MAPPING:
        code = "; code that comes with a model (auto_map) is never run" if "auto_map" in config else ""
        known = f"transformers {transformers.__version__}"
        raise UnsupportedError(f"{folder}: {known} does not know the model type {kind!r}{code}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(f"{folder}: the model type {kind!r} has no causal language model in transformers")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(path: str | Path) -> FolderTokenizer:
    """The tokenizer of a local Hugging Face folder with its chat template; errors as `folder_tokenizer` says."""
    return read_tokenizer(_folder(path))


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder} does not exist (model names are not looked up)")
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is no Hugging Face model folder: it has no config.json (model names are not looked up)"
        )
    return folder
