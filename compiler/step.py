"""The signature of a step: what every compiled step program takes besides weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from llmopt.compiler.kv_formats import row_bytes

# Inputs of a step over T tokens of B requests, of which the logits of R rows are wanted:
# input_ids[T], positions[T], slot_mapping[T], cu_seqlens_q[B + 1], seq_lens[B], block_tables[B, N], logits_indices[R].
STEP_INPUTS: dict[str, torch.dtype] = {
    "input_ids": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "cu_seqlens_q": torch.int32,
    "seq_lens": torch.int32,
    "block_tables": torch.int32,
    "logits_indices": torch.int64,
}

# Where some layers have a window and others see everything, the two kinds hold pages apart, so that those of the first
# can go sooner. A step then takes, after the inputs above, the pages of the layers with a window:
# window_slot_mapping[T], window_block_tables[B, N]; the inputs of the same names without `window_` are the others'.
WINDOW_INPUTS: dict[str, torch.dtype] = {
    "window_slot_mapping": torch.int64,
    "window_block_tables": torch.int32,
}
# Further inputs of a step with adapters, behind the caches: adapter_index[T] is the slot of each token's adapter, -1
# for none; then what the slots hold, see `LoraSpec`.
LORA_INPUTS = ("adapter_index", "lora_pool", "lora_ranks", "lora_scales")
# Last, of a step whose tokens may be given as embeddings: prompt_embeds_index[T], int64, is the row of
# prompt_embeds[E, H], of the dtype of the model's embeddings, that stands for a token, -1 for one with an id.
EMBEDS_INPUTS = ("prompt_embeds_index", "prompt_embeds")


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache of one attention layer: for keys and for values pages `[num_blocks, kv_heads, block_size, row]`.

    dtype: of the keys and values that the model computes.
    window: how many of the latest tokens the layer still looks at, 0 for all.
    kv_dtype: how they are stored: "auto" as they are, else one of the formats of `kv_formats`.
    group: which pages it uses: layers of one group share a block table; 0, or 1 for those of WINDOW_INPUTS.
    """

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int = 0
    kv_dtype: str = "auto"
    group: int = 0

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the pages."""
        return self.dtype if self.kv_dtype == "auto" else torch.uint8

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Elements of the pages' last dimension, for keys and for values."""
        if self.kv_dtype == "auto":
            return self.key_size, self.value_size
        return row_bytes(self.kv_dtype, self.key_size), row_bytes(self.kv_dtype, self.value_size)

    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer, keys and values together, scales included."""
        return self.kv_heads * sum(self.row_sizes) * self.storage_dtype.itemsize


def step_inputs(caches: Sequence[CacheSpec]) -> dict[str, torch.dtype]:
    """The inputs of a step program before its caches."""
    return {**STEP_INPUTS, **(WINDOW_INPUTS if any(spec.group for spec in caches) else {})}


def group_windows(caches: Sequence[CacheSpec]) -> list[int]:
    """For each group how many of the latest tokens any of its layers still looks at; 0 if some layer looks at all."""
    windows: list[list[int]] = [[] for _ in range(1 + max((spec.group for spec in caches), default=0))]
    for spec in caches:
        windows[spec.group].append(spec.window)
    return [0 if 0 in own else max(own, default=0) for own in windows]


@dataclass(frozen=True)
class LoraTarget:
    """A product that adapters may change: `[out_features, in_features]`; `name` is that of the module in the model."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraSpec:
    """The adapters of a step program (Hu et al., 2021): `max_loras` slots, each with room for one of any rank up to
    `max_rank`.

    The pool is `[max_loras, slot_elements]` of `dtype`. A slot holds for each target A `[max_rank, in]` and behind it
    B transposed `[max_rank, out]`. `lora_ranks` and `lora_scales` `[targets, max_loras]`, int32 and float32, say how
    many rows of both count (0: the adapter leaves this product alone) and what multiplies their product.
    """

    targets: tuple[LoraTarget, ...]
    max_loras: int
    max_rank: int
    dtype: torch.dtype

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each target begins in a slot, and where the slot ends."""
        ends = [0]
        for target in self.targets:
            ends.append(ends[-1] + self.max_rank * (target.in_features + target.out_features))
        return tuple(ends)

    def places(self, index: int) -> tuple[int, int]:
        """Where A and B of a target begin in a slot."""
        return self.offsets[index], self.offsets[index] + self.max_rank * self.targets[index].in_features

    @property
    def slot_elements(self) -> int:
        """Elements of one slot."""
        return self.offsets[-1]


@dataclass(frozen=True)
class EmbedsSpec:
    """The embeddings that a step program takes: rows of `size` numbers of `dtype`."""

    size: int
    dtype: torch.dtype
