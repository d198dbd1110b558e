"""A transformers model whose forward is a step program, for the decoding loops of transformers.

`generate` is a loop around `forward`: it draws, penalizes, searches and stops, and asks the model for nothing but
logits. With another forward that loop is still the same, and so is every setting that it honours.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import RequestError
from llmopt.huggingface import causal_output, dynamic_cache
from llmopt.runtime.paged_rows import PagedRows
from llmopt.runtime.step_program import StepProgram

# What the argument of forward that takes a cache is called, newest first.
_CACHE_NAMES = ("cache", "past_key_values")
# Settings about a cache that is not used.
_OTHER_CACHE = {"use_cache": True, "cache_implementation": None, "prefill_chunk_size": None}
# What the loop may give to forward besides tokens, mask and cache, and what it changes: nothing here.
_IMPLIED = frozenset({"position_ids", "use_cache", "logits_to_keep", "return_dict", "cache_position", "tokenizer"})


def cache_name(model: torch.nn.Module) -> str | None:
    """The argument of the model's forward that takes a cache, None without one."""
    names = inspect.signature(type(model).forward).parameters
    return next((name for name in _CACHE_NAMES if name in names), None)


class PagedCache:
    """What the loop takes for a cache: it asks how long it is and has its rows reordered, no more.

    Args:
        program: bound to its weights.
        rows_per_prompt: into how many rows the loop expands each row of its input.
        new_tokens: most tokens that are generated.
        chunk: most tokens of prompts that one step computes.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)
    is_sliding = (False,)

    def __init__(self, program: StepProgram, rows_per_prompt: int, new_tokens: int, chunk: int) -> None:
        self._program, self._chunk = program, chunk
        self._rows_per_prompt, self._new_tokens = rows_per_prompt, new_tokens
        self._rows: PagedRows | None = None
        self._width = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that are computed."""
        return self._width

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is now."""
        if self._rows is not None:
            self._rows.reorder(beam_idx.tolist())

    def advance(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits `[B, 1, V]` after the columns `ids[B, T]`; `mask[B, S]` is 0 for padding, which is on the left.

        At first they may be embeddings `[B, T, H]`, where the program takes them.
        """
        if self._rows is None:
            rows = list(ids)
            if mask is not None:
                rows = [row[keep] for row, keep in zip(ids, mask[:, : ids.shape[1]].bool(), strict=True)]
            prompts = [row.detach() for row in rows] if ids.ndim == 3 else [row.tolist() for row in rows]
            lengths = [len(prompt) for prompt in prompts[:: self._rows_per_prompt]]
            needed = PagedRows.blocks_needed(lengths, self._rows_per_prompt, self._new_tokens, self._program.block_size)
            self._rows = PagedRows(self._program, needed, self._chunk)
            logits = self._rows.prefill(prompts)
        elif ids.shape[1] == 1:
            logits = self._rows.step(ids[:, 0].tolist())
        else:
            raise RequestError(f"the decoding loop asked for {ids.shape[1]} tokens in one step")
        self._width += ids.shape[1]
        return logits.unsqueeze(1)

    def to_dynamic(self, model: Any) -> Any:
        """The same as a DynamicCache, with which somebody may go on; None where pages hold another format."""
        layers = self._rows.contents(self._width) if self._rows is not None else None
        return dynamic_cache(model, layers) if layers is not None else None


def with_paged_forward(model: Any, forward: Callable[..., Any], name: str) -> Any:
    """A shallow copy of `model`, which shares all modules and weights, with a forward that knows a `PagedCache`.

    A call without one (guidance makes such) goes to `forward`. `name` is what `cache_name` found.
    """

    @functools.wraps(forward)
    def paged(input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
        cache = arguments.pop(name, None)
        if not isinstance(cache, PagedCache):
            return forward(input_ids=input_ids, attention_mask=attention_mask, **{name: cache}, **arguments)
        embeddings = arguments.pop("inputs_embeds", None)
        columns = input_ids if embeddings is None else embeddings
        for argument, value in arguments.items():
            if argument not in _IMPLIED and value is not None and value is not False:
                raise RequestError(f"the step program has no {argument}, which the decoding loop passed")
        logits = cache.advance(columns, attention_mask)
        return causal_output(logits.to(columns.device), {name: cache})

    twin = copy.copy(model)
    vars(twin)["forward"] = paged
    vars(twin).pop("generate", None)
    twin.generation_config = _without_other_cache(model.generation_config)
    return twin


def without_other_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` without those about the cache that a `PagedCache` takes the place of."""
    kept = {key: value for key, value in arguments.items() if key not in _OTHER_CACHE}
    if kept.get("generation_config") is not None:
        kept["generation_config"] = _without_other_cache(kept["generation_config"])
    return kept


def _without_other_cache(config: Any) -> Any:
    config = copy.deepcopy(config)
    for setting, value in _OTHER_CACHE.items():
        setattr(config, setting, value)
    return config
