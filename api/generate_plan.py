"""What `model.generate` was asked for, and whether the step program can do exactly that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.huggingface import generation_mode

# Settings of a GenerationConfig that greedy search over token ids never looks at, or that are read here.
_HARMLESS = frozenset(
    {
        *("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("use_cache", "max_cache_len", "cache_config", "disable_compile", "compile_config", "prefill_chunk_size"),
        *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "low_memory"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "assistant_ensemble_weight"),
        *("max_matching_ngram_size", "speculation_type", "continuous_batching_config", "transformers_version"),
        *("output_router_logits", "_from_model_config", "_commit_hash", "_original_object_hash"),
    }
)
# Settings whose neutral value is not what `False`, 0 and None say.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    # These hold the same keys and values as the paged cache; "quantized" does not.
    "cache_implementation": ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid"),
}
# Settings and arguments that transformers' decoding loop honours by itself, given nothing but logits. What is in none
# of these lists sends the call to transformers.
_BY_THE_LOOP = frozenset(
    {
        *("do_sample", "num_beams", "num_return_sequences", "repetition_penalty", "encoder_repetition_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        *("min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
        *("forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits"),
        *("stop_strings", "max_time", "watermarking_config"),
        *("output_scores", "output_logits", "return_dict_in_generate"),
    }
)
_LOOP_ARGUMENTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


@dataclass(frozen=True)
class Plan:
    """A call of `generate` that the step program can serve.

    ids: `[B, S]`, as given; prompts: its rows without padding. Where embeddings were given, of both only the lengths
        mean something, and a loop chooses the tokens.
    embeddings: whether they were.
    new_tokens: most tokens that are generated.
    eos_ids: tokens that end a row; pad: what fills it up then.
    loop: why transformers' own decoding loop must choose the tokens, all rows in step; None for plain greedy search.
    rows_per_prompt: into how many rows that loop expands each prompt.
    """

    ids: torch.Tensor
    prompts: list[list[int]]
    new_tokens: int
    eos_ids: tuple[int, ...]
    pad: int
    loop: str | None
    rows_per_prompt: int
    embeddings: bool = False


def plan_generate(model: Any, kwargs: Mapping[str, Any], max_model_len: int) -> Plan | str:
    """How a call can run on the step program, or why it cannot.

    Args:
        model: a transformers model.
        kwargs: all arguments of `generate`, by name.
        max_model_len: the longest sequence of the step program.
    """
    if model.training:
        return "the model is in training mode"
    given = {k: v for k, v in kwargs.items() if v is not None}
    own = given.pop("generation_config", None)
    config, rest = model._prepare_generation_config(own, **given)
    ids = rest.pop("input_ids", None)
    ids = rest.pop("inputs", None) if ids is None else ids
    mask = rest.pop("attention_mask", None)
    embeddings = rest.pop("inputs_embeds", None)
    arguments = {name: rest.pop(name) for name in _LOOP_ARGUMENTS if name in rest}
    rest.pop("tokenizer", None)
    if rest.get("synced_gpus") is False:
        del rest["synced_gpus"]
    if rest:
        return f"argument {sorted(rest)[0]}"
    if embeddings is not None:
        if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 3 or embeddings.numel() == 0:
            return "inputs_embeds that are not [B, S, H]"
        if ids is not None and ids.numel():
            return "inputs_embeds and input_ids"
        if embeddings.dtype != model.dtype:
            return f"inputs_embeds of {embeddings.dtype} for a model of {model.dtype}"
        if embeddings.shape[2] != model.get_input_embeddings().weight.shape[1]:
            return f"inputs_embeds of size {embeddings.shape[2]}"
        ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64)
        mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        return "inputs that are not input_ids[B, S]"
    reasons = [f"argument {name}" for name, value in arguments.items() if not isinstance(value, list) or value]
    if embeddings is not None:
        reasons.insert(0, "argument inputs_embeds")
    for name, setting in _unusual(config).items():
        if name not in _BY_THE_LOOP:
            return f"generation setting {name}={setting!r:.60}"
        reasons.append(f"{name}={setting!r:.60}")
    mode = generation_mode(config)
    if mode not in _MODES:
        return f"generation mode {mode}"
    eos = config.eos_token_id
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(token) for token in eos)
    pad = config.pad_token_id
    if mask is None and pad is not None and pad not in eos_ids:
        mask = ids != pad
    prompts = _prompts(ids, mask)
    if isinstance(prompts, str):
        return prompts
    if embeddings is None:
        count = _new_tokens(model, config, own, given, ids.shape[1])
    else:
        # How transformers counts the length of a prompt that has no tokens differs by version; these are enough.
        count = int(config.max_new_tokens if config.max_new_tokens is not None else config.max_length)
    for criterion in arguments.get("stopping_criteria", ()):
        # One that the caller made takes the place of the configuration's.
        count = max(count, int(getattr(criterion, "max_length", None) or 0) - ids.shape[1])
    if count < 1:
        return "the length leaves no room for new tokens"
    if ids.shape[1] + count > max_model_len:
        return f"{ids.shape[1] + count} tokens are more than max_model_len"
    fill = pad if pad is not None else next(iter(eos_ids), 0)
    expand = max(config.num_beams or 1, config.num_return_sequences or 1)
    loop = ", ".join(reasons) or None
    return Plan(ids, prompts, count, eos_ids, fill, loop, expand, embeddings is not None)


def _new_tokens(model: Any, config: Any, own: Any, given: Mapping[str, Any], length: int) -> int:
    sources = (given.get("max_length"), getattr(own, "max_length", None), model.generation_config.max_length)
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if any(longest is not None for longest in sources):
        return int(config.max_length) - length
    # transformers' default length counts new tokens, where one that was asked for counts all of them.
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(min(config.max_length, limit - length if limit is not None else config.max_length))


def _prompts(ids: torch.Tensor, mask: Any) -> list[list[int]] | str:
    """The rows without their padding, or why they cannot be taken apart. Padding elsewhere than on the left would be
    part of what the model sees."""
    if mask is None:
        return [[int(token) for token in row] for row in ids.tolist()]
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return "an attention_mask of another shape than input_ids"
    seen = mask.bool()
    if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        return "padding that is not on the left"
    return [row[keep].tolist() for row, keep in zip(ids, seen, strict=True)]


def _unusual(config: Any) -> dict[str, Any]:
    """The settings that may change greedy search's tokens or what `generate` returns."""
    return {
        name: setting
        for name, setting in config.to_dict().items()
        if name not in _HARMLESS
        and not (setting is None or setting is False or setting in (0, *_NEUTRAL.get(name, ())))
    }
