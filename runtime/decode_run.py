"""Requests that decode on together: one pass over them takes the tokens of a step and makes the batch of the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.runtime.request import Request, Status
from llmopt.runtime.scheduler import Chunk, Scheduler
from llmopt.runtime.step_batch import StepBatch

_RUNNING = Status.RUNNING


class DecodeRun:
    """The running requests, all of which decode, and the batch of a token of each.

    After a step caches are cold, and what happens between two of them takes as long as the memory that it touches.
    While nobody comes or leaves, a plan differs from the one before by a token of each request, and its batch by a few
    numbers: these are written to the batch's memory while the tokens are taken, and nothing else is made. That the
    batch is the same object spares the program the work of taking it in.

    Args:
        scheduler: has planned that all of its running requests compute one token.
        batch: of that plan, over memory of its own.
        seats: for each group of pages the block tables of all seats, which are kept up to date.
    """

    __slots__ = (
        "_columns",
        "_is_ready",
        "_positions",
        "_scheduler",
        "_seats",
        "_size",
        "_slots",
        "_tables",
        "_work",
        "batch",
        "is_plain",
        "requests",
    )

    def __init__(self, scheduler: Scheduler, batch: StepBatch, seats: Sequence[np.ndarray]) -> None:
        self.batch, self.requests = batch, scheduler.decoding
        # Whether tokens are the largest logits; their states need not accept them.
        self.is_plain = all(request.sampling_state.is_plain for request in self.requests)
        self._scheduler, self._seats, self._size = scheduler, seats, scheduler.pages.block_size
        ids, self._positions, lengths = (
            tensor.numpy().data for tensor in (batch.input_ids, batch.positions, batch.seq_lens)
        )
        slots, tables = [batch.slot_mapping], [batch.block_tables]
        if batch.window_slot_mapping is not None and batch.window_block_tables is not None:
            slots.append(batch.window_slot_mapping)
            tables.append(batch.window_block_tables)
        self._slots = [tensor.numpy().data for tensor in slots]
        self._tables = [tensor.numpy() for tensor in tables]
        self._columns = tables[0].shape[1]
        # What `commit` works with, side by side.
        self._work = scheduler.advance, self._size, ids, self._positions, lengths, self._slots
        self._is_ready = True

    @property
    def goes_on(self) -> bool:
        """Whether the batch is that of the next step: all requests still run, nobody else does, and all have pages."""
        return self._is_ready and self._scheduler.decodes_on(self.requests)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What the batch computes."""
        return tuple(Chunk(request, self._positions[row], 1, True) for row, request in enumerate(self.requests))

    def commit(self, tokens: Sequence[int]) -> list[Request]:
        """Takes and publishes the token that a step chose for each request, and readies the next batch.

        Gives the requests that were still running.
        """
        advance, size, ids, positions, lengths, every = self._work
        changed = []
        # An interrupt leaves each request at one of the two steps, but the batch between them.
        is_ready, self._is_ready = True, False
        for row, (request, token) in enumerate(zip(self.requests, tokens, strict=True)):
            if request.status is not _RUNNING:  # ended by the stop check of another, which is the caller's code
                continue
            start = positions[row] + 1
            advance(request, start, token)
            request.publish()
            changed.append(request)
            ids[row] = token
            positions[row] = start
            lengths[row] = start + 1
            if start % size:
                for slots in every:
                    slots[row] += 1
            elif not self._turn_page(row, request, start):
                is_ready = False
        self._is_ready = is_ready
        return changed

    def _turn_page(self, row: int, request: Request, start: int) -> bool:
        """Begins a new page of a request; False where it got none, or more has changed than a new last page."""
        if request.status is not _RUNNING or not self._scheduler.extend(request, start + 1):
            return False
        page = start // self._size
        for group, table in enumerate(request.tables):
            if len(table.blocks) != page + 1 or table.num_listed != page or page >= self._columns:
                return False
            block = table.blocks[page]
            self._seats[group][request.seat, page] = self._tables[group][row, page] = block
            table.num_listed = page + 1
            self._slots[group][row] = block * self._size
        return True

    def prepare(self) -> None:
        """Takes the pages that the next step needs whichever tokens this one chooses; for while it runs."""
        if not self.goes_on:
            return
        for row, request in enumerate(self.requests):
            after = self._positions[row] + 1
            if after % self._size == 0 and after + 1 < request.limit:
                self._scheduler.extend(request, after + 1)
