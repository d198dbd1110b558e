"""The signature of a step: what every compiled step program takes besides weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.compiler.kv_formats import row_bytes

# Inputs of a step over T tokens of B requests, of which the logits of R rows are wanted:
# input_ids[T], positions[T], slot_mapping[T], cu_seqlens_q[B + 1], seq_lens[B], block_tables[B, N], logits_indices[R].
# A step over embeddings has them where others have token ids: input_ids[T, H], of the model's dtype.
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
    """The KV cache of one attention layer: for keys and for values pages `[num_blocks, kv_heads, block_size, row]`.

    dtype: of the keys and values that the model computes.
    window: how many of the latest tokens the layer still looks at, 0 for all.
    kv_dtype: how they are stored: "auto" as they are, else one of the formats of `kv_formats`.
    """

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int = 0
    kv_dtype: str = "auto"

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
