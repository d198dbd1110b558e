"""Memory of the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.compiler.step import CacheSpec
from llmopt.runtime.block_pool import BlockPool


def make_tensors(
    specs: Sequence[CacheSpec], num_blocks: int, block_size: int, device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """Per layer a key and a value tensor `[num_blocks, kv_heads, block_size, row]`, `row` as `CacheSpec` has it.

    Not initialised: nothing is read that was not written, and the memory of pages that were never used is never
    touched, so that a large pool costs no more than what was in use at once.
    """
    return [
        torch.empty((num_blocks, spec.kv_heads, block_size, width), dtype=spec.storage_dtype, device=device)
        for spec in specs
        for width in spec.row_sizes
    ]


class KVCache:
    """Pages for all layers, and the pool that says who holds which.

    A block is one page in every layer at once, so requests hold lists of block numbers.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.tensors = make_tensors(specs, num_blocks, block_size, device)
        self.pool = BlockPool(num_blocks, block_size)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.pool.num_available

    def allocate(self, num_tokens: int) -> list[int]:
        """Takes blocks for `num_tokens` tokens; raises InputError when the pool has too few."""
        return self.pool.allocate(self.pool.blocks_for(num_tokens))

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back."""
        self.pool.release(blocks)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, (from, to), in every layer, one after the other: one may read what the one before wrote."""
        for tensor in self.tensors:
            for source, target in pairs:
                tensor[target] = tensor[source]
