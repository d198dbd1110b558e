"""A model that is a formula, over pages that hold the tokens themselves: what tests of the scheduler run steps on."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.page_groups import MoveKind, PageGroup
from llmopt.runtime.request import NO_BLOCK, Request
from llmopt.runtime.sampling import SamplingParams, SamplingState
from llmopt.runtime.scheduler import Chunk, Scheduler, SchedulerConfig, StepPlan
from llmopt.runtime.step_batch import StepBatch

SIZE = 4


def make(num_blocks: int = 64, windows: Sequence[int] = (0,), swap_blocks: int = 0, **changes: Any) -> Scheduler:
    """A scheduler over groups of layers with these windows, each with a pool, and a swap space if it has blocks."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "min_swapped_tokens": 1, **changes}
    space = lambda: BlockPool(swap_blocks, SIZE) if swap_blocks else None  # noqa: E731
    groups = [PageGroup(BlockPool(num_blocks, SIZE), window, space()) for window in windows]
    return Scheduler(groups, SchedulerConfig(**limits))


def request(name: str, prompt: Sequence[int] | int, max_tokens: int = 5, **fields: Any) -> Request:
    begin = zlib.crc32(name.encode()) % 100_000  # not hash(), which is another one in each process
    tokens = list(prompt) if not isinstance(prompt, int) else [begin + i for i in range(prompt)]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(name, tokens, len(tokens), params, sampling_state=SamplingState(params, tokens), **fields)


def next_token(tokens: Sequence[int]) -> int:
    """The model: any function of all tokens before."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 7 + 3) % 997


class Memory:
    """Pages that hold the tokens themselves: what a step reads must be the request's own tokens."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        # By (group, whether in the swap space, block), then by offset.
        self.pages: dict[tuple[int, bool, int], dict[int, int]] = {}
        self.moves = dict.fromkeys(MoveKind, 0)

    def run(self, plan: StepPlan) -> list[int | None]:
        while plan.moves:
            kind, group, sources, targets = plan.moves.popleft()
            self.moves[kind] += len(sources)
            for source, target in zip(sources, targets, strict=True):
                held = self.pages.get((group, kind is MoveKind.SWAP_IN, source), {})
                self.pages[group, kind is MoveKind.SWAP_OUT, target] = dict(held)
        groups = list(enumerate(self.scheduler.pages.groups))
        for owner, start, length, _ in plan.chunks:
            for number, group in groups:
                for position in range(start, start + length):
                    block = owner.tables[number].blocks[position // SIZE]
                    assert group.pool.is_private(block), "a step writes to a page that others look at"
                    self.pages.setdefault((number, False, block), {})[position % SIZE] = owner.tokens[position]
        results: list[int | None] = []
        for owner, start, length, samples in plan.chunks:
            for number, group in groups:
                first = max(0, start - group.window + 1) if group.window else 0
                for position in range(first, start + length):
                    block = owner.tables[number].blocks[position // SIZE]
                    assert block != NO_BLOCK, "a page was given back that is still looked at"
                    assert self.pages[number, False, block][position % SIZE] == owner.tokens[position]
            results.append(next_token(owner.tokens) if samples else None)
        return results


def check_batch(batch: StepBatch, chunks: Sequence[Chunk]) -> None:
    """Against the requests' own books, one number at a time."""
    tokens = [(chunk, at) for chunk in chunks for at in range(chunk.start, chunk.start + chunk.length)]
    ends = list(itertools.accumulate(chunk.length for chunk in chunks))
    assert batch.input_ids.tolist() == [chunk.request.tokens[at] for chunk, at in tokens]
    assert batch.positions.tolist() == [at for _, at in tokens]
    assert batch.cu_seqlens_q.tolist() == [0, *ends]
    assert batch.logits_indices.tolist() == [end - 1 for end in ends]
    assert batch.seq_lens.tolist() == [chunk.start + chunk.length for chunk in chunks]
    assert batch.adapter_index is not None
    assert batch.adapter_index.tolist() == [chunk.request.adapter_slot for chunk, _ in tokens]
    groups = [(batch.slot_mapping, batch.block_tables), (batch.window_slot_mapping, batch.window_block_tables)]
    for group, (slots, tables) in enumerate(groups[: len(chunks[0].request.tables)]):
        assert slots is not None and tables is not None and tables.is_contiguous()
        held = [chunk.request.tables[group].blocks for chunk in chunks]
        own = [chunk.request.tables[group].blocks[at // SIZE] * SIZE + at % SIZE for chunk, at in tokens]
        assert slots.tolist() == own
        for row, blocks in zip(tables.tolist(), held, strict=True):
            assert all(listed == block for listed, block in zip(row, blocks) if block != NO_BLOCK)
            assert len(row) >= len(blocks) and min(row) >= 0
    dtypes = {batch.seq_lens.dtype, batch.block_tables.dtype, batch.cu_seqlens_q.dtype, batch.adapter_index.dtype}
    assert dtypes == {torch.int32}


def step(scheduler: Scheduler, memory: Memory) -> tuple[StepPlan, list[Request]]:
    plan = scheduler.plan()
    assert sum(chunk.length for chunk in plan.chunks) <= scheduler.config.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.config.max_num_seqs
    changed = scheduler.commit(plan, memory.run(plan))
    scheduler.check_books()
    return plan, changed


def finish(scheduler: Scheduler, memory: Memory | None = None, limit: int = 5000) -> None:
    memory = memory or Memory(scheduler)
    for _ in range(limit):
        if not scheduler.has_unfinished:
            break
        step(scheduler, memory)
    assert not scheduler.has_unfinished
    for group in scheduler.pages.groups:
        assert group.pool.num_held == 0
        assert group.host is None or group.host.num_held == 0


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def check_outputs(requests: Sequence[Request]) -> None:
    for each in requests:
        count = each.params.max_tokens
        assert each.generated == expected(each.tokens[: each.num_prompt], count), each.request_id
        assert each.finish_reason == "length"
