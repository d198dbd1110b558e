"""Turns a plan into the tensors of a step, with little work for each: block tables are kept and only added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from llmopt.runtime.decode_run import DecodeRun
from llmopt.runtime.request import NO_BLOCK
from llmopt.runtime.scheduler import Chunk, Scheduler
from llmopt.runtime.step_program import StepBatch

_SPARE = 16  # columns


class BatchBuilder:
    """Builds step batches for requests that each have a seat, a row of the block tables.

    Args:
        max_num_seqs: number of seats.
        num_groups: groups of layers that hold pages apart, 1 or 2; the second is that of the `window_` inputs.
        block_size: tokens in a page.
        witness_stride: rows whose logits are computed besides each chunk's last, so many tokens apart; 0 for none.
            A row that came out finite vouches for all keys and values that it attends to.
        adapters: whether the program takes adapters.
    """

    def __init__(
        self,
        max_num_seqs: int,
        block_size: int,
        num_groups: int = 1,
        witness_stride: int = 0,
        *,
        adapters: bool = False,
    ) -> None:
        self.block_size, self.witness_stride, self.adapters = block_size, witness_stride, adapters
        self._tables = [np.zeros((max_num_seqs, 16), np.int32) for _ in range(num_groups)]
        # Of a step in which each request computes one token; the tensors of batches share this memory.
        self._rows, self._bounds = np.arange(max_num_seqs), np.arange(max_num_seqs + 1, dtype=np.int32)

    def rows(self, chunk: Chunk) -> Sequence[int]:
        """Which tokens of a chunk have their logits computed: every `witness_stride`-th, counted from the last.

        And those whose logits say how likely the next token of the prompt is, where the request asks for that.
        """
        stride = self.witness_stride or chunk.length
        rows = range((chunk.length - 1) % stride, chunk.length, stride)
        if chunk.request.wants_prompt_rows:
            return sorted({*rows, *self.prompt_rows(chunk)})
        return rows

    @staticmethod
    def prompt_rows(chunk: Chunk) -> range:
        """The tokens of a chunk that stand before a token of the prompt whose log probability is not known yet."""
        request = chunk.request
        known, end = len(request.prompt_logprobs), min(chunk.length, request.num_prompt - 1 - chunk.start)
        return range(max(0, known - chunk.start), end)

    def build(self, chunks: Sequence[Chunk]) -> StepBatch:
        """The batch of some chunks, of different requests."""
        num = len(chunks)
        pages = _columns(self._list_pages(chunks))
        seats = np.fromiter([chunk.request.seat for chunk in chunks], np.int64, num)
        starts = np.fromiter([chunk.start for chunk in chunks], np.int64, num)
        counts = [chunk.length for chunk in chunks]
        total = sum(counts)
        if total == num:
            bounds = self._bounds[: num + 1]
            ids = np.fromiter([chunk.request.tokens[chunk.start] for chunk in chunks], np.int64, num)
            positions, owners, wanted = starts, self._rows[:num], self._rows[:num]
        else:
            bounds = np.zeros(num + 1, np.int32)
            bounds[1:] = ends = np.cumsum(counts)
            tokens: list[int] = []
            rows: list[int] = []
            for request, start, count, _ in chunks:
                tokens += request.tokens[start : start + count]
            for chunk, end in zip(chunks, ends.tolist(), strict=True):
                rows += [end - chunk.length + row for row in self.rows(chunk)]
            ids, wanted = np.array(tokens, np.int64), np.array(rows, np.int64)
            owners = np.repeat(np.arange(num), counts)
            positions = np.arange(total) + np.repeat(starts - ends + counts, counts)
        page, offset = positions // self.block_size, positions % self.block_size
        places: list[np.ndarray] = []
        for every in self._tables:
            tables = every[seats, :pages]
            places += (tables[owners, page].astype(np.int64) * self.block_size + offset, tables)
        lengths = (starts + counts).astype(np.int32)
        arrays = (ids, positions, places[0], bounds, lengths, places[1], wanted, *places[2:])
        batch = StepBatch(*map(torch.from_numpy, arrays))
        if not self.adapters:
            return batch
        each = np.fromiter([chunk.request.adapter_slot for chunk in chunks], np.int32, num)
        return replace(batch, adapter_index=torch.from_numpy(each[owners]))

    def decode_run(self, scheduler: Scheduler, batch: StepBatch) -> DecodeRun:
        """What goes on from a plan that leaves `scheduler.decoding`, given its batch; until other batches are built."""
        return DecodeRun(scheduler, batch, self._tables)

    def _list_pages(self, chunks: Sequence[Chunk]) -> int:
        """Brings the block tables up to date; how many columns of them are in use."""
        pages = 0
        for chunk in chunks:
            request = chunk.request
            for group, table in enumerate(request.tables):
                held, listed = len(table.blocks), table.num_listed
                pages = max(pages, held)
                if held > listed:
                    row = self._widened(group, held)[request.seat]
                    if held == listed + 1:
                        row[listed] = max(table.blocks[listed], 0)
                    else:
                        # Pages behind the window are never read: any number that is a page will do.
                        row[listed:held] = [0 if block == NO_BLOCK else block for block in table.blocks[listed:]]
                    table.num_listed = held
        return pages

    def _widened(self, group: int, pages: int) -> np.ndarray:
        """The block tables of a group, with columns for at least so many pages."""
        tables = self._tables[group]
        if pages > tables.shape[1]:
            wider = np.zeros((len(tables), max(_columns(pages), 2 * tables.shape[1])), np.int32)
            wider[:, : tables.shape[1]] = tables
            self._tables[group] = tables = wider
        return tables


def _columns(pages: int) -> int:
    """Columns of the block tables of a batch that needs so many: some more, for pages that are still to come.

    Never more than the next power of two, the width that captured decode steps have in any case (`cuda_graphs.py`).
    """
    return 1 << (pages - 1).bit_length() if pages <= _SPARE else -(-pages // _SPARE) * _SPARE
