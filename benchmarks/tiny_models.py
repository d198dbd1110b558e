"""Tiny random models of every type that transformers maps to a causal language model, and of a few other classes.

One rule shrinks the default configuration of any type: sizes by the name of the field, layers to a few that have every
kind of the original, special tokens to the first ids. What the rule gets wrong for a type is corrected by data,
`CORRECTIONS`; there is no code per type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Encoders, encoder-decoders and others: class -> the type of its configuration, and what its forward gets.
OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "BertForMaskedLM": ("bert", ("input_ids", "attention_mask")),
    "RobertaForMaskedLM": ("roberta", ("input_ids", "attention_mask")),
    "ModernBertForMaskedLM": ("modernbert", ("input_ids", "attention_mask")),
    "T5ForConditionalGeneration": ("t5", ("input_ids", "attention_mask", "decoder_input_ids")),
    "WhisperForConditionalGeneration": ("whisper", ("input_features", "decoder_input_ids")),
    "ViTForImageClassification": ("vit", ("pixel_values",)),
    "CLIPModel": ("clip", ("input_ids", "attention_mask", "pixel_values")),
}
VOCABULARY = 256
FIRST_TOKEN = 16  # ids below are special to some model
_SPREAD = 1.3  # standard deviation of a linear layer's outputs for unit inputs
_MIN_LAYERS = 2
_MAX_LAYERS = 6

# Field -> its tiny value, wherever it occurs with an integer value.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim_model"), 64),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 64),
    **dict.fromkeys(
        ("lru_width", "embedding_dim", "out_hidden_size", "vision_output_dim", "attention_hidden_size"), 64
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "linear_num_heads", "index_n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_size", "dim_head", "d_kv", "d_head"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "index_head_dim", "swa_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 24),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "n_inner"), 112),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "d_ff", "dff", "feed_forward_size", "intermediate_size_mlp"), 112),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 48),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "n_words", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 256),
    **dict.fromkeys(("max_target_positions", "model_max_length"), 256),
    **dict.fromkeys(("original_max_position_embeddings", "index_topk", "attention_chunk_size"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("local_attention",), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "adapter_rank"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim", "laurel_rank"), 16),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    **dict.fromkeys(("patch_size",), 8),
}
# Where keys and values come from one latent, there are as many of their heads as of queries, and a head is rope's part.
_LATENT_SIZES: dict[str, int] = {"num_key_value_heads": 4, "head_dim": 8}
# The number of layers, by the names it goes by. A per-layer list is one as long as the first of these says.
_LAYERS: tuple[str, ...] = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "depth"),
)
# What a configuration says of itself, not settings.
_OMITTED: tuple[str, ...] = ("transformers_version", "architectures", "_name_or_path", "dtype", "model_type")

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR_AND_FULL: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA4_TEXT: dict[str, Any] = {"per_layer_config": {"1": {"head_dim": 32}}}
_GEMMA4_ASSISTANT: dict[str, Any] = {
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    **_GEMMA4_TEXT,
}
_GEMMA3N_TEXT: dict[str, Any] = {
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [112] * 4},
    **{"layer_types": _SLIDING_AND_FULL * 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
}
_QWEN4: dict[str, Any] = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "hc_lowrank": 16, "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
}
_ZAMBA: dict[str, Any] = {
    **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
    **{"attention_head_dim": 32, "num_key_value_heads": 4},
}
_DENSE_THEN_EXPERTS: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_MUSICGEN: dict[str, Any] = {"decoder": {"num_codebooks": 1}}

# Type -> settings that differ from what the rule makes; nested for sub-configurations, None is a value. `_default`
# are arguments of the default configuration, where that cannot be made without.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "WhisperForConditionalGeneration": {"max_source_positions": 30, "num_mel_bins": 16},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        **{
            "encoder_hash_byte_group_vocab": 512,
            "patch_size": 4,
            "global_config": {"hidden_size": 128, "head_dim": 32},
        },
        **{"encoder_config": {"hidden_size_global": 128}, "decoder_config": {"hidden_size_global": 128}},
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": _DENSE_THEN_EXPERTS,
    "deepseek_v4": {"compress_rates": {"heavily_compressed_attention": 8}},
    "dory": {
        **{"layer_types": _SLIDING_AND_FULL * 2, "num_hidden_layers": 4},
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    },
    "dots1": {**_DENSE_THEN_EXPERTS, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"head_dim": 24},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 24},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "gemma3n": {"text_config": _GEMMA3N_TEXT},
    "gemma3n_text": _GEMMA3N_TEXT,
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "gemma4_assistant": {
        "_default": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text_config": _GEMMA4_ASSISTANT,
    },
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified": {"text_config": _GEMMA4_TEXT},
    "gemma4_unified_assistant": {"text_config": {**_GEMMA4_TEXT, "num_kv_shared_layers": 2}},
    "gemma4_unified_text": _GEMMA4_TEXT,
    "granitemoehybrid": _LINEAR_AND_FULL,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"], "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "ministral": {"head_dim": 16},
    "musicgen": _MUSICGEN,
    "musicgen_melody": _MUSICGEN,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **{"attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
        **{"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4, "hash_seed": 1},
    },
    "roc_bert": {"shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3], "num_query_groups": 4},
    "zaya": {
        **{"num_experts_per_tok": 1, "router_hidden_size": 32, "sliding_window": 8},
        "layer_types": ["hybrid", "hybrid_sliding"],
    },
}

# Type -> the sub-configuration that its class of causal model takes.
PARTS: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def _is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_index", "_index", "token_ids")) or name in ("eos_token", "mask_index")


def _kept_layers(settings: Mapping[str, Any], count: int) -> list[int]:
    """Indices of a few layers among which every value of every per-layer list occurs."""
    lists = [v for v in settings.values() if isinstance(v, list) and len(v) == count]
    kept: list[int] = []
    seen: set[str] = set()
    for index in range(count):
        kinds = {f"{number}:{values[index]}" for number, values in enumerate(lists) if _few(values)}
        if not kinds <= seen and len(kept) < _MAX_LAYERS:
            seen |= kinds
            kept.append(index)
    for index in range(count):
        if len(kept) < _MIN_LAYERS and index not in kept:
            kept.append(index)
    return sorted(kept)


def _few(values: list[Any]) -> bool:
    return len({str(v) for v in values}) <= _MAX_LAYERS


def shrink(settings: Mapping[str, Any], causal: bool = True) -> dict[str, Any]:
    """The generic rule: the same settings with tiny sizes, recursively; what can be a decoder is one if `causal`."""
    small: dict[str, Any] = {}
    count = next((settings[n] for n in _LAYERS if isinstance(settings.get(n), int)), 0)
    kept = _kept_layers(settings, count)
    sizes = {**_SIZES, **_LATENT_SIZES} if "kv_lora_rank" in settings else _SIZES
    token = 3
    for name, value in settings.items():
        if name in _OMITTED:
            continue
        if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value) and "label" not in name:
            by_layer = {int(key): item for key, item in value.items()}
            small[name] = {str(new): shrink(by_layer[old], causal) for new, old in enumerate(kept) if old in by_layer}
        elif isinstance(value, Mapping):
            small[name] = shrink(value, causal) if name not in ("id2label", "label2id") else dict(value)
            if name.endswith("config") and "model_type" in value:
                small[name]["model_type"] = value["model_type"]
        elif isinstance(value, bool) or value is None:
            small[name] = True if name == "is_decoder" and causal else value
        elif _is_token(name):
            fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}.get(name)
            small[name] = token if fixed is None else fixed
            token += fixed is None
        elif name in _LAYERS and isinstance(value, int):
            small[name] = len(kept)
        elif name in sizes and isinstance(value, int):
            small[name] = sizes[name]
        elif isinstance(value, list) and count > 2 and len(value) == count:
            small[name] = [value[i] for i in kept]
        else:
            small[name] = value
    return small


def _merge(settings: dict[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changed.items():
        old = settings.get(name)
        settings[name] = _merge(dict(old), value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return settings


def class_of(name: str) -> str:
    """The name of the class that is built for a type of `TYPES` or a name of `OTHERS`."""
    return name if name in OTHERS else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


def config_of(name: str) -> PreTrainedConfig:
    """The tiny configuration that the class of a type, or of a name of `OTHERS`, takes."""
    changed = dict(CORRECTIONS.get(name, {}))
    model_type = OTHERS[name][0] if name in OTHERS else name
    default = AutoConfig.for_model(model_type, **changed.pop("_default", {}))
    config = type(default)(**_merge(shrink(default.to_dict(), name not in OTHERS), changed))
    return getattr(config, PARTS[name]) if name in PARTS else config


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Seeded weights on which the logits depend: none is neutral.

    Matrices keep the spread of their inputs, constant vectors (norms, biases) get noise of their size, and parameters
    with an initialisation of their own (decays, time steps) keep it.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    drawn = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)} | transposed
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        constant = bool((parameter == parameter.flatten()[0]).all()) if parameter.numel() else True
        finite = bool(parameter.isfinite().all())
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise(parameter))
        elif constant and finite:
            level = abs(float(parameter.flatten()[0])) if parameter.numel() else 1.0
            parameter.add_(0.2 * (level or 1.0) * noise(parameter))
        elif id(parameter) in drawn or "expert" in name or not finite:
            inputs = parameter.shape[0] if id(parameter) in transposed else math.prod(parameter.shape[1:])
            inputs = parameter.shape[-1] if parameter.ndim == 3 and "expert" in name else inputs
            parameter.copy_(noise(parameter) * (_SPREAD / max(inputs, 1) ** 0.5))
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("bias") and buffer.is_floating_point() and not buffer.any():
            buffer.add_(0.1 * noise(buffer))


def build(name: str) -> PreTrainedModel:
    """A fresh tiny model in eval mode and float32; two calls give equal weights."""
    torch.manual_seed(0)
    config = config_of(name)
    if name in PARTS or name in OTHERS:
        kind = getattr(transformers, class_of(name))
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    return model.eval()


def inputs(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """What the model's forward needs, as keyword arguments; all are `[batch, ...]`.

    Token ids are int64 `[batch, length]` without special ones (a decoder's own have two thirds of the length). The
    mask of an encoder hides three more tokens at the end in each row than in the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config

    def ids(count: int) -> Tensor:
        return torch.randint(FIRST_TOKEN, VOCABULARY, (batch, count), generator=generator)

    def mask() -> Tensor:
        seen = length - 3 * torch.arange(batch).unsqueeze(1)
        return (torch.arange(length) < seen).to(torch.int64)

    def pixels() -> Tensor:
        image = getattr(config, "vision_config", config)
        return torch.randn(batch, image.num_channels, image.image_size, image.image_size, generator=generator)

    def spectrum() -> Tensor:
        return torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids(length),
        "attention_mask": mask,
        "decoder_input_ids": lambda: ids(2 * length // 3),
        "pixel_values": pixels,
        "input_features": spectrum,
    }
    names = OTHERS.get(type(model).__name__, ("", ("input_ids",)))[1]
    return {name: makers[name]() for name in names}
