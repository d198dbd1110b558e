"""Tiny random models of every architecture that the end-to-end tests run, each with a feature that must not get lost.

The weights are not an initialisation: norm weights, biases and routers are far from their neutral values and the logits
are spread out, so that dropping a feature changes tokens. Two layers, the first and the last, are enough where nothing
lies between them; compiling takes its time by the layer. `without` removes a feature from a model (and leaves its
weights): a test of that feature must fail on such a pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 131
_NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes: `config`, `model` (transformers class names), `settings` of the configuration, `note` (what it is here
    for), `removals` (feature name -> changed settings, or a function that edits the model in place) and `attention`
    (transformers' attention implementation, None for its default).
    """

    config: str
    model: str
    settings: Mapping[str, Any]
    note: str
    removals: Mapping[str, Mapping[str, Any] | Callable[[PreTrainedModel], None]] = field(default_factory=dict)
    attention: str | None = None
    seed: int = 0


def _zero_(suffix: str) -> Callable[[PreTrainedModel], None]:
    """Zeroes every parameter whose name ends like this; an edit that finds none is a mistake."""

    def edit(model: PreTrainedModel) -> None:
        found = [p for name, p in model.named_parameters() if name.endswith(suffix)]
        if not found:
            raise LookupError(f"no parameter of {type(model).__name__} ends in {suffix}")
        with torch.no_grad():
            for parameter in found:
                parameter.zero_()

    return edit


def _drop_modules(suffix: str) -> Callable[[PreTrainedModel], None]:
    """Replaces every submodule whose name ends like this by the identity."""

    def edit(model: PreTrainedModel) -> None:
        found = [name for name, _ in model.named_modules() if name.endswith(suffix)]
        if not found:
            raise LookupError(f"no module of {type(model).__name__} ends in {suffix}")
        for name in found:
            model.set_submodule(name, nn.Identity())

    return edit


def _swap_kv_heads(model: PreTrainedModel) -> None:
    """Reverses the key heads only: query heads meet other heads' keys, as with a wrong grouping."""
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.weight"):
                parameter.copy_(parameter.view(heads, size, -1).flip(0).reshape_as(parameter))


def _no_alibi(model: PreTrainedModel) -> None:
    def zero(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "alibi": torch.zeros_like(kwargs["alibi"])}

    for block in model.transformer.h:
        block.register_forward_pre_hook(zero, with_kwargs=True)


def _no_alibi_table(model: PreTrainedModel) -> None:
    model.transformer.build_mpt_alibi_tensor = lambda heads, length, *_, **__: torch.zeros(heads, 1, length)


def _rope(theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _ministral3_rope(beta: float) -> dict[str, Any]:
    lengths = {"factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
    scales = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": beta}
    return _rope(rope_type="yarn", truncate=False, **lengths, **scales)


_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, **_NO_SPECIAL_TOKENS}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": _rope(),
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = _rope(
    500.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_BLOOM: dict[str, Any] = {**_COMMON, "hidden_size": 64, "n_layer": 2, "n_head": 8}

ENTRIES: dict[str, Entry] = {
    "llama": Entry(
        "LlamaConfig",
        "LlamaForCausalLM",
        _LLAMA_LIKE,
        "grouped-query attention (2 query heads per key head), rope, RMSNorm, SwiGLU",
        {"grouped heads": _swap_kv_heads},
    ),
    "llama-tied-rope3": Entry(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            **_LLAMA_LIKE,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
            "num_key_value_heads": 1,
            "mlp_bias": True,
            "attention_bias": True,
        },
        "tied embeddings, llama3 rope scaling, one key head for all, biases everywhere",
        {"rope scaling": {"rope_parameters": _rope(500.0)}, "bias": _zero_("down_proj.bias")},
    ),
    "qwen2": Entry(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"},
        "bias on q, k and v only",
        {"query bias": _zero_("q_proj.bias"), "key bias": _zero_("k_proj.bias"), "value bias": _zero_("v_proj.bias")},
    ),
    "qwen3": Entry(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**_LLAMA_LIKE, "head_dim": 24},
        "RMSNorm of every query and key head before rope; heads * head_dim is not the hidden size",
        {"query norm": _drop_modules("q_norm"), "key norm": _drop_modules("k_norm")},
        seed=5,
    ),
    "mistral": Entry(
        "MistralConfig",
        "MistralForCausalLM",
        {**_LLAMA_LIKE, "sliding_window": 16},
        "sliding window of 16 tokens, shorter than the longer prompts",
        {"window": {"sliding_window": None}},
    ),
    "ministral3": Entry(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {**_LLAMA_LIKE, "sliding_window": None, "rope_parameters": _ministral3_rope(2.0)},
        "queries scaled by a step function of their position, which is one up to position 16",
        {"query scale": {"rope_parameters": _ministral3_rope(0.0)}},
    ),
    "gemma2": Entry(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_LLAMA_LIKE,
            "tie_word_embeddings": True,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.2,
        },
        "every other layer has a window of 12; soft caps of scores and logits, both reached; norms of 1 + weight, "
        "after the sublayers too; scaled embeddings; tanh GELU",
        {
            "window": {"sliding_window": 4096},
            "score cap": {"attn_logit_softcapping": None},
            "logit cap": {"final_logit_softcapping": None},
            "norm after attention": _drop_modules("post_attention_layernorm"),
        },
        attention="eager",  # transformers computes the score cap nowhere else on a CPU
        seed=5,
    ),
    "gemma3": Entry(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": _rope(100.0),
                "full_attention": _rope(10000.0, rope_type="linear", factor=4.0),
            },
        },
        "two layers with a window of 12 to one without, each kind with its own rope; query and key norms",
        {
            "window": {"sliding_window": 4096},
            "rope of full layers": {
                "rope_parameters": {"sliding_attention": _rope(100.0), "full_attention": _rope(10000.0)}
            },
            "query norm": _drop_modules("q_norm"),
        },
        seed=3,
    ),
    "gpt2": Entry(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 256,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            **_NO_SPECIAL_TOKENS,
        },
        "Conv1D projections (weights stored transposed), one of them for q, k and v; learned positions; LayerNorm",
        {"positions": _zero_("wpe.weight"), "projection bias": _zero_("c_attn.bias"), "norm bias": _zero_("ln_1.bias")},
    ),
    "gpt-neox": Entry(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            **_COMMON,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "rope_parameters": _rope(partial_rotary_factor=0.25),
            "use_parallel_residual": True,
        },
        "rope on a quarter of each head; attention and feed-forward on one residual; q, k, v interleaved by head",
        {
            "partial rope": {"rope_parameters": _rope(partial_rotary_factor=1.0)},
            "parallel residual": {"use_parallel_residual": False},
        },
        seed=1,
    ),
    "opt": Entry(
        "OPTConfig",
        "OPTForCausalLM",
        {
            **_COMMON,
            "hidden_size": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "dropout": 0.0,
        },
        "learned positions with an offset of 2, computed from the mask; ReLU; a query scaled before attention",
        {"positions": _zero_("embed_positions.weight"), "activation": {"activation_function": "gelu"}},
        seed=1,
    ),
    "bloom": Entry(
        "BloomConfig",
        "BloomForCausalLM",
        _BLOOM,
        "ALiBi over 8 heads; a LayerNorm on the embeddings; q, k, v interleaved by head; its own GELU",
        {"alibi": _no_alibi, "norm of embeddings": _drop_modules("word_embeddings_layernorm")},
        seed=11,
    ),
    "bloom-6-heads": Entry(
        "BloomConfig",
        "BloomForCausalLM",
        {**_BLOOM, "hidden_size": 48, "n_head": 6},
        "ALiBi's slopes for a number of heads that is no power of two",
        {"alibi": _no_alibi},
        seed=13,
    ),
    "mpt": Entry(
        "MptConfig",
        "MptForCausalLM",
        {
            **_NO_SPECIAL_TOKENS,
            "vocab_size": VOCABULARY,
            "max_seq_len": 256,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
        },
        "ALiBi looked up in a table of the longest sequence; scores under masked_fill; norms without a bias",
        {"alibi": _no_alibi_table},
        seed=17,
    ),
    "phi3": Entry(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **{key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"},
            "original_max_position_embeddings": 256,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
        },
        "q, k, v in one linear and gate, up in another; rope on half of each head",
        {"partial rope": {"rope_parameters": _rope(partial_rotary_factor=1.0)}},
    ),
    "mixtral": Entry(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_LLAMA_LIKE, "intermediate_size": 56, "num_local_experts": 6, "num_experts_per_tok": 2},
        "two of six experts per token, weights from a softmax over the chosen two",
        {"two experts": {"num_experts_per_tok": 1}},
    ),
    "qwen3-moe": Entry(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        "three of eight experts per token, renormalised; one dense layer between; query and key norms",
        {"renormalisation": {"norm_topk_prob": False}, "key norm": _drop_modules("k_norm")},
    ),
}
FEATURES: list[tuple[str, str]] = [(name, feature) for name, entry in ENTRIES.items() for feature in entry.removals]


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draws all weights in float32 from one generator, in the order of their names.

    Matrices pass on the differences of their inputs, not the mean (activations are mostly positive, and a constant
    would choose every token), and are strong beside the embeddings, so that the context matters. Vectors of ones
    (norms) become 1 + noise, of zeros (biases, Gemma's norms) noise. The last norm gets random signs: with tied
    embeddings the head would otherwise answer with the input token.
    """
    generator = torch.Generator().manual_seed(seed)
    conv1d = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    # Gemma multiplies its embeddings by sqrt(hidden size): without this they would drown what the layers add.
    embeddings = {
        id(m.weight): 0.35 / float(getattr(m, "embed_scale", 1.0))
        for m in model.modules()
        if isinstance(m, nn.Embedding)
    }
    norms = {id(m.weight) for m in model.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
    named_norms = [name for name, p in model.named_parameters() if id(p) in norms]
    last_norm = max(named_norms, key=lambda name: (-name.count("."), named_norms.index(name)))
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise * embeddings[id(parameter)])
        elif name == last_norm:
            parameter.copy_(noise.sign() * (0.5 + noise.abs()) - (parameter.mean() < 0.5).float())
        elif parameter.ndim == 1:
            parameter.copy_(parameter.mean().round() + 0.3 * noise)
        else:
            input_dim = 0 if id(parameter) in conv1d else -1
            noise -= noise.mean(input_dim, keepdim=True)
            parameter.copy_(noise * (2.2 / parameter.shape[input_dim] ** 0.5))


def _make(entry: Entry, changed: Mapping[str, Any] | None = None) -> PreTrainedModel:
    config = getattr(hf, entry.config)(**{**entry.settings, **(changed or {})})
    if entry.attention is not None:
        config._attn_implementation = entry.attention
    model: PreTrainedModel = getattr(hf, entry.model)(config)
    _randomise(model, entry.seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0  # named only to keep transformers from warning: nothing is padded
    return model.eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained(dtype=...)` does: parameters only; rope's frequencies stay in float32."""
    model.config.dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model in eval mode; two calls give equal weights."""
    return _cast(_make(ENTRIES[name]), dtype)


def without(name: str, feature: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model with the same weights but one feature of `ENTRIES[name].removals` removed."""
    removal = ENTRIES[name].removals[feature]
    if callable(removal):
        model = _make(ENTRIES[name])
        removal(model)
    else:
        model = _make(ENTRIES[name], removal)
    return _cast(model, dtype)


ZOO: dict[str, Callable[[], PreTrainedModel]] = {name: functools.partial(build, name) for name in ENTRIES}


def cases(names: Iterable[str], *fast: str) -> list[Any]:
    """All names as parameters of a test, of which only `fast` run always: compiling takes the time, for every model."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The tokens that transformers' own greedy `generate` appends to one prompt."""
    ids = torch.tensor([list(prompt)])
    # All ones and explicit: without a mask, generate guesses one from the padding token.
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@functools.cache
def _reference(name: str, prompt_ids: tuple[tuple[int, ...], ...], max_new_tokens: int) -> tuple[tuple[int, ...], ...]:
    model = build(name)
    return tuple(tuple(greedy(model, prompt, max_new_tokens)) for prompt in prompt_ids)


def reference_generate(name: str, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Eager greedy tokens of `build(name)` in float32, each prompt alone; computed once per test process."""
    return [list(row) for row in _reference(name, tuple(tuple(p) for p in prompt_ids), max_new_tokens)]


@torch.no_grad()
def eager_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits [len(tokens), vocabulary] in float32 of one forward pass without a cache: teacher forcing."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


@torch.no_grad()
def decided_rows(model: PreTrainedModel, tokens: Sequence[int], tol: float) -> int:
    """How many first rows have a choice of experts, in every layer, that survives a change of the router's logits.

    Where the last chosen expert leads the next one by less than `tol` (standard deviations of the router's logits),
    rounding may choose another: a jump that no tolerance of the logits covers, and that later rows attend to. All rows
    of a model without experts.
    """
    chosen = getattr(model.config, "num_experts_per_tok", None)
    if chosen is None:
        return len(tokens)
    decided = torch.ones(len(tokens), dtype=torch.bool)
    ids = torch.tensor([list(tokens)])
    for logits in model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits:
        ordered = logits.float().sort(-1, descending=True).values
        decided &= ordered[:, chosen - 1] - ordered[:, chosen] > tol * logits.float().std()
    return int(decided.long().cumprod(0).sum())


def margin_mismatches(eager: Tensor, other: Tensor, tol: float) -> list[int]:
    """Rows where `other` chooses a token that eager puts more than `tol` below its own choice.

    Args: `eager`, `other`: logits [rows, vocabulary] for the same inputs (teacher forcing); `tol` in units of logits.
    A row with a NaN is always a mismatch. A differing token within `tol` of the top implies that eager's own top two
    are at most `tol` apart.
    """
    if eager.shape != other.shape or eager.ndim != 2:
        raise ValueError(f"logits must be two matrices of one shape, got {tuple(eager.shape)} and {tuple(other.shape)}")
    eager, other = eager.float(), other.float()
    chosen = eager.gather(1, other.argmax(1, keepdim=True)).squeeze(1)
    bad = ~(eager.amax(1) - chosen <= tol) | other.isnan().any(1)
    return bad.nonzero().flatten().tolist()
