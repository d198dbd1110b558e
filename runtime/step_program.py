"""A compiled step of a language model: tokens of many requests in, logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmopt.codegen.program import Program
from llmopt.compiler.step import STEP_INPUTS, CacheSpec
from llmopt.runtime.executable import Executable
from llmopt.runtime.kv_cache import KVCache

Tensor = torch.Tensor


@dataclass(frozen=True)
class StepBatch:
    """One ragged batch of T tokens of B requests; see `compiler.step.STEP_INPUTS` for shapes and dtypes."""

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logits_indices: Tensor

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


class StepProgram:
    """A step program bound to its weights.

    Args:
        program: inputs are STEP_INPUTS in order, then the caches, K and V of each layer in turn.
        caches: what each attention layer stores.
        block_size: tokens in one page.
        threads: CPU threads, 0 for PyTorch's number.
    """

    def __init__(self, program: Program, caches: Sequence[CacheSpec], block_size: int, threads: int = 0) -> None:
        self.program, self.caches, self.block_size = program, list(caches), block_size
        self.executable = Executable(program, threads)
        self.rows_computed = 0
        self.num_steps = 0

    def bind(self, weights: Sequence[Tensor]) -> None:
        """Sets the weights, in the program's order."""
        self.executable.bind(weights)

    def new_cache(self, num_blocks: int) -> KVCache:
        """An empty KV cache for this program."""
        return KVCache(self.caches, num_blocks, self.block_size)

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_size * sum(spec.bytes_per_token() for spec in self.caches)

    def __call__(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Logits `[R, V]` of the rows that the batch asks for; keys and values of its tokens are in the cache then."""
        self.rows_computed += batch.input_ids.shape[0]
        self.num_steps += 1
        inputs = [getattr(batch, name) for name in STEP_INPUTS]
        # Weights follow the caches among the program's arguments; they are bound already.
        rest = [None] * (len(self.program.inputs) - len(inputs) - len(cache.tensors))
        logits: Tensor = self.executable([*inputs, *cache.tensors, *rest])[0]
        return logits
