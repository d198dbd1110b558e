"""Memory of the paged KV cache, and who holds which page."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.step import CacheSpec


class KVCache:
    """Pages for all layers: per layer a key and a value tensor `[num_blocks, kv_heads, block_size, head_size]`.

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
        self.tensors: list[torch.Tensor] = []
        for spec in specs:
            for width in (spec.key_size, spec.value_size):
                shape = (num_blocks, spec.kv_heads, block_size, width)
                self.tensors.append(torch.zeros(shape, dtype=spec.dtype, device=device))
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> list[int]:
        """Takes blocks for `num_tokens` tokens; raises InputError when the pool has too few."""
        count = self.blocks_for(num_tokens)
        if count > len(self._free):
            raise InputError(
                f"{num_tokens} tokens need {count} KV cache blocks of {self.block_size}, {len(self._free)} of "
                f"{self.num_blocks} are free; raise kv_cache_memory_bytes or lower max_tokens"
            )
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back."""
        self._free.extend(reversed(blocks))
