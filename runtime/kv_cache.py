"""Memory of the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt.compiler.step import CacheSpec, group_windows
from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.page_groups import Move, MoveKind, PageGroup


def make_tensors(
    specs: Sequence[CacheSpec], num_blocks: Sequence[int], block_size: int, device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """Per layer a key and a value tensor `[num_blocks, kv_heads, block_size, row]`, `row` as `CacheSpec` has it.

    `num_blocks` is of each group. Not initialised: nothing is read that was not written, and the memory of pages that
    were never used is never touched, so that a large pool costs no more than what was in use at once.
    """
    return [
        torch.empty((num_blocks[spec.group], spec.kv_heads, block_size, width), dtype=spec.storage_dtype, device=device)
        for spec in specs
        for width in spec.row_sizes
    ]


class KVCache:
    """Pages for all layers, and the pools that say who holds which.

    A block is one page in every layer of a group at once, so requests hold lists of block numbers, one for each group.

    Args:
        specs: what each layer stores.
        num_blocks: pages of each group, or of every group.
        block_size: tokens in a page.
        device: where the pages are.
        host_blocks: pages of each group in the swap space, which is memory of the host; none of them by default.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        num_blocks: int | Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
        host_blocks: Sequence[int] | None = None,
    ) -> None:
        windows = group_windows(specs)
        sizes = [num_blocks] * len(windows) if isinstance(num_blocks, int) else list(num_blocks)
        self.block_size = block_size
        self.tensors = make_tensors(specs, sizes, block_size, device)
        self.host = make_tensors(specs, host_blocks, block_size) if host_blocks else []
        self._members = [[i for i in range(len(self.tensors)) if specs[i // 2].group == g] for g in range(len(windows))]
        spaces = [BlockPool(count, block_size) if count else None for count in host_blocks or [0] * len(windows)]
        self.groups = [
            PageGroup(BlockPool(size, block_size), window, space)
            for size, window, space in zip(sizes, windows, spaces, strict=True)
        ]

    @property
    def pool(self) -> BlockPool:
        """The pages of the first group; who gives the same blocks to all groups needs no other."""
        return self.groups[0].pool

    @property
    def num_blocks(self) -> int:
        """All pages."""
        return sum(group.pool.num_blocks for group in self.groups)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return sum(group.pool.num_available for group in self.groups)

    def allocate(self, num_tokens: int) -> list[int]:
        """Takes blocks for `num_tokens` tokens, the same in all groups; raises InputError when there are too few."""
        return self.pool.allocate(self.pool.blocks_for(num_tokens))

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back."""
        self.pool.release(blocks)

    def copy(self, pairs: Sequence[tuple[int, int]], group: int | None = None) -> None:
        """Copies blocks, (from, to), in every layer of a group, or of all: one may read what the one before wrote."""
        for index in range(len(self.tensors)) if group is None else self._members[group]:
            tensor = self.tensors[index]
            for source, target in pairs:
                tensor[target] = tensor[source]

    def perform(self, move: Move) -> None:
        """Copies pages within the cache, or between it and the swap space; doing the same move twice does no harm."""
        if move.kind is MoveKind.COPY:
            self.copy(list(zip(move.sources, move.targets, strict=True)), move.group)
            return
        sources, targets = (torch.tensor(numbers, dtype=torch.int64) for numbers in (move.sources, move.targets))
        for index in self._members[move.group]:
            device, host = self.tensors[index], self.host[index]
            if move.kind is MoveKind.SWAP_OUT:
                host.index_copy_(0, targets, device.index_select(0, sources.to(device.device)).to(host.device))
            else:
                device.index_copy_(0, targets.to(device.device), host.index_select(0, sources).to(device.device))
