"""One ragged batch of tokens, as a step program takes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class StepBatch:
    """One ragged batch of T tokens of B requests; see `compiler.step` for shapes and dtypes.

    Without pages of their own, layers with a window use those of the others.

    adapter_index: for each token the slot of its adapter, int32 `[T]`, -1 for none; None if no token has one.
    prompt_embeds_index, prompt_embeds: for each token the row of `prompt_embeds` that stands for it, int64 `[T]`, -1
        for one with an id; None where all have ids.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logits_indices: Tensor
    window_slot_mapping: Tensor | None = None
    window_block_tables: Tensor | None = None
    adapter_index: Tensor | None = None
    prompt_embeds_index: Tensor | None = None
    prompt_embeds: Tensor | None = None

    def inputs(self, names: Iterable[str]) -> list[Tensor]:
        """The named inputs of a step program."""
        return [self._input(name) for name in names]

    def _input(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        if tensor is None:
            tensor = getattr(self, name.removeprefix("window_"))
        return cast(Tensor, tensor)

    @staticmethod
    def build(
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_size: int,
        all_logits: bool = False,
    ) -> StepBatch:
        """A batch of `tokens[b]`, which stand at positions `starts[b]`, ... of a request that holds `blocks[b]`.

        Logits are asked for the last token of each request, or for every token.
        """
        counts = np.array([len(t) for t in tokens], np.int64)
        ends = np.cumsum(counts)
        starts_array = np.array(starts, np.int64)
        ids = np.fromiter((t for row in tokens for t in row), np.int64, int(ends[-1]))
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        positions = within + np.repeat(starts_array, counts)
        tables = np.zeros((len(tokens), max(map(len, blocks))), np.int32)
        for row, held in enumerate(blocks):
            tables[row, : len(held)] = held
        owner = np.repeat(np.arange(len(tokens)), counts)
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        rows = np.arange(ends[-1]) if all_logits else ends - 1
        arrays = (
            ids,
            positions,
            slots,
            np.concatenate([[0], ends]).astype(np.int32),
            (starts_array + counts).astype(np.int32),
            tables,
            rows,
        )
        return StepBatch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
