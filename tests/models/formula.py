"""A model that is a formula, over pages that hold the tokens themselves: what tests of the scheduler run steps on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.page_groups import MoveKind, PageGroup
from llmopt.runtime.request import NO_BLOCK, Request
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.scheduler import Scheduler, SchedulerConfig, StepPlan

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
    return Request(name, tokens, len(tokens), SamplingParams(temperature=0.0, max_tokens=max_tokens), **fields)


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


def plan_step(scheduler: Scheduler) -> StepPlan:
    """The next plan; where it comes by the short way, that is the one which the general rules give."""
    short = scheduler._next_decodes()
    if short is None:
        return scheduler.plan()
    moves, preemptions, running = list(short.moves), scheduler.counters.num_preemptions, list(scheduler.running)
    scheduler._decodes = []
    general = scheduler.plan()
    assert general.chunks == short.chunks and list(general.moves) == moves
    assert (scheduler.counters.num_preemptions, scheduler.running) == (preemptions, running)
    return general


def step(scheduler: Scheduler, memory: Memory) -> tuple[StepPlan, list[Request]]:
    plan = plan_step(scheduler)
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
