"""The signature of a step: what every compiled step program takes besides weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache of one attention layer: pages `[num_blocks, kv_heads, block_size, key_size or value_size]`.

    window: how many of the latest tokens the layer still looks at, 0 for all.
    """

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int = 0

    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer, keys and values together."""
        return self.kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize
