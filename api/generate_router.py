"""Sends `model.generate` to the step program when that gives exactly what transformers would give, and says why not."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from llmopt.compiler.errors import ToolchainError, UnsupportedError
from llmopt.runtime.generation import Job, run_jobs
from llmopt.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llmopt.optimization import OptimizedState

log = logging.getLogger(__name__)

# Settings of a GenerationConfig that greedy search over token ids never looks at, or that the router reads itself.
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
# Settings whose neutral value is not what `False`, 0 and None say. Everything that is in neither list sends the call
# to transformers.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    # These hold the same keys and values as the paged cache; "quantized" does not.
    "cache_implementation": ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid"),
}


class GenerateRouter:
    """`generate` of an optimized transformers model."""

    def __init__(self, model: torch.nn.Module, state: OptimizedState) -> None:
        self._model, self._state = model, state
        self._original: Any = model.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`. Greedy search over token ids runs on the step program."""
        try:
            plan = self._plan(args, dict(kwargs))
            if isinstance(plan, str):
                self._state.report.note(f"generate runs in transformers with the compiled forward: {plan}")
                return self._original(*args, **kwargs)
            engine = self._state.engine()
            engine.program()
        except (UnsupportedError, ToolchainError) as error:
            self._state.report.note(f"generate runs in transformers with the compiled forward: {error}")
            log.warning("generate runs in transformers with the compiled forward: %s", error)
            return self._original(*args, **kwargs)
        return self._run(*plan)

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | str:
        """(input_ids, attention_mask, config), or why the step program would not give the same."""
        if args:
            kwargs.setdefault("inputs", args[0])
            if any(a is not None for a in args[1:]):
                return "positional arguments beyond the input ids"
        model: Any = self._model
        if model.training:
            return "the model is in training mode"
        given = {k: v for k, v in kwargs.items() if v is not None}
        own = given.pop("generation_config", None)
        config, rest = model._prepare_generation_config(own, **given)
        ids = rest.pop("input_ids", None)
        ids = rest.pop("inputs", None) if ids is None else ids
        mask = rest.pop("attention_mask", None)
        if rest:
            return f"argument {sorted(rest)[0]}"
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            return "inputs that are not input_ids[B, S]"
        if config.do_sample:
            return "sampling (the random stream would differ from transformers')"
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            return "beam search or several sequences"
        unusual = _unusual(config)
        if unusual:
            return unusual
        eos = config.eos_token_id
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(token) for token in eos)
        pad = config.pad_token_id
        if mask is None and pad is not None and pad not in eos_ids:
            mask = ids != pad
        prompts = _prompts(ids, mask)
        if isinstance(prompts, str):
            return prompts
        sources = (given.get("max_length"), getattr(own, "max_length", None), model.generation_config.max_length)
        if config.max_new_tokens is not None:
            count = config.max_new_tokens
        elif any(length is not None for length in sources):
            count = config.max_length - ids.shape[1]
        else:
            # transformers' default length counts new tokens, where one that was asked for counts all of them.
            limit = getattr(model.config, "max_position_embeddings", None)
            count = min(config.max_length, limit - ids.shape[1] if limit is not None else config.max_length)
        if count < 1:
            return "the length leaves no room for new tokens"
        if ids.shape[1] + count > self._state.engine().max_model_len:
            return f"{ids.shape[1] + count} tokens are more than max_model_len"
        return prompts, count, eos_ids, pad if pad is not None else next(iter(eos_ids), 0), ids

    def _run(
        self, prompts: list[list[int]], count: int, eos_ids: tuple[int, ...], pad: int, ids: torch.Tensor
    ) -> torch.Tensor:
        params = SamplingParams(temperature=0.0, max_tokens=count, stop_token_ids=eos_ids, ignore_eos=True)
        rows: list[list[int]] = [[] for _ in prompts]
        jobs = [Job(prompt, params) for prompt in prompts]
        with contextlib.closing(run_jobs(self._state.engine().core(), jobs)) as updates:
            for update in updates:
                if update.request.error is not None:
                    raise update.request.error
                if update.is_last:
                    rows[update.index] = update.request.generated
        new = torch.full((len(rows), max(map(len, rows))), pad, dtype=ids.dtype)
        for row, tokens in enumerate(rows):
            new[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
        return torch.cat([ids, new.to(ids.device)], 1)


def _prompts(ids: torch.Tensor, mask: Any) -> list[list[int]] | str:
    """The rows without their padding, or why they cannot be taken apart. Padding elsewhere than on the left would be
    part of what the model sees."""
    if mask is None:
        return ids.tolist()
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return "an attention_mask of another shape than input_ids"
    seen = mask.bool()
    if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        return "padding that is not on the left"
    return [row[keep].tolist() for row, keep in zip(ids, seen, strict=True)]


def _unusual(config: Any) -> str | None:
    """The first setting that may change greedy search's tokens or what `generate` returns."""
    for name, setting in config.to_dict().items():
        neutral = setting is None or setting is False or setting in (0, *_NEUTRAL.get(name, ()))
        if not neutral and name not in _HARMLESS:
            return f"generation setting {name}={setting!r}"
    return None
