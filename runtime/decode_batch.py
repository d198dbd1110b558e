"""The batch of a decode step, moved on in place: the next token of the same requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.runtime.scheduler import Chunk
from llmopt.runtime.step_batch import StepBatch


class DecodeBatch:
    """A batch of one token for each of some requests, and what it takes to make the next one of it.

    After a step caches are cold, and each call of NumPy or PyTorch costs microseconds. A batch whose requests go on by
    one token differs from the one before in a few numbers, which are written to its memory one by one; that the tensors
    are the same ones spares the program the work of taking them in.

    Args:
        chunks: of length 1.
        batch: built from them, over memory of its own.
        block_size: tokens in a page.
    """

    def __init__(self, chunks: Sequence[Chunk], batch: StepBatch, block_size: int) -> None:
        self.batch = batch
        self._requests = [chunk.request for chunk in chunks]
        self._size = block_size
        self._ids, self._positions, self._lengths = (
            tensor.numpy().data for tensor in (batch.input_ids, batch.positions, batch.seq_lens)
        )
        slots, tables = [batch.slot_mapping], [batch.block_tables]
        if batch.window_slot_mapping is not None and batch.window_block_tables is not None:
            slots.append(batch.window_slot_mapping)
            tables.append(batch.window_block_tables)
        self._slots = [tensor.numpy().data for tensor in slots]
        self._tables = [tensor.numpy() for tensor in tables]
        self._columns = tables[0].shape[1]

    def advance(self, chunks: Sequence[Chunk], tables: Sequence[np.ndarray]) -> StepBatch | None:
        """The batch of chunks that are those before, one token further; None if they are not, and it is spoilt then.

        Pages that requests got since are listed in `tables` as well, which have a row for each seat.
        """
        requests, positions, size = self._requests, self._positions, self._size
        if len(chunks) != len(requests):
            return None
        ids, lengths, every = self._ids, self._lengths, self._slots
        for row, (request, start, length, _) in enumerate(chunks):
            if request is not requests[row] or start != positions[row] + 1 or length != 1:
                return None
            page, offset = divmod(start, size)
            for group, table in enumerate(request.tables):
                blocks = table.blocks
                if table.num_listed != len(blocks):
                    # Anything but a new last page is a copy: the request has written to a page of others.
                    if offset or len(blocks) != page + 1 or table.num_listed != page or page >= self._columns:
                        return None
                    tables[group][request.seat, page] = self._tables[group][row, page] = blocks[page]
                    table.num_listed = page + 1
                every[group][row] = every[group][row] + 1 if offset else blocks[page] * size
            ids[row] = request.tokens[start]
            positions[row] = start
            lengths[row] = start + 1
        return self.batch
