"""The pages of requests, in every group of layers: given out, shared, given back, and moved to the swap space.

Layers of one group share a block table. Where some layers have a window and others see everything there are two groups,
so that the first give their pages back as soon as the window has passed (Gemma 2, gpt-oss). Pure bookkeeping: what must
happen to the memory is left in `moves`.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmopt.runtime.block_pool import BlockPool
from llmopt.runtime.request import NO_BLOCK, BlockTable, Request


@dataclass(frozen=True)
class PageGroup:
    """Layers whose pages come and go together.

    pool: their pages.
    window: how many of the latest tokens any of these layers still looks at; 0 if some layer looks at all.
    host: their pages in the swap space, None for no swap space.
    """

    pool: BlockPool
    window: int = 0
    host: BlockPool | None = None


class MoveKind(enum.Enum):
    """From where to where pages are copied."""

    COPY = "within the cache"
    SWAP_OUT = "to the swap space"
    SWAP_IN = "from the swap space"


class Move(NamedTuple):
    """Pages `sources` of a group are copied to `targets`, one by one."""

    kind: MoveKind
    group: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class PageGroups:
    """The pages of all groups.

    `has_windows`: whether pages are given back before their request ends.

    `moves` are to be performed from the left, and each removed once it is done, before the next step runs: one may read
    what another wrote. None is ever dropped. One that nobody needs any more does no harm, for whoever has its targets
    by now writes to them later.

    Args:
        groups: at least one, of equal block size.
        chunk: most tokens of a step.
    """

    def __init__(self, groups: Sequence[PageGroup], chunk: int) -> None:
        self.groups = list(groups)
        self.block_size = self.groups[0].pool.block_size
        self.moves: deque[Move] = deque()
        self._chunk = chunk
        self._windowed = [(number, group) for number, group in enumerate(groups) if group.window]
        self.has_windows = bool(self._windowed)

    # ---- how many ---------------------------------------------------------------------------------------------------

    def passed(self, group: PageGroup, position: int) -> int:
        """How many leading pages the query at `position`, and all after it, look past."""
        return max(0, position - group.window + 1) // self.block_size if group.window else 0

    def most(self, group: PageGroup, num_tokens: int) -> int:
        """The most pages of a group that a request of so many tokens holds at once."""
        pages = group.pool.blocks_for(num_tokens)
        if group.window:
            pages = min(pages, group.pool.blocks_for(group.window + self._chunk) + 1)
        return pages

    def too_small(self, num_tokens: int) -> BlockPool | None:
        """A pool that a request of so many tokens would not fit into if it were alone."""
        return next((g.pool for g in self.groups if self.most(g, num_tokens) > g.pool.num_blocks), None)

    def short_of(self, needed: Sequence[int]) -> bool:
        """Whether some group has fewer pages to give than are needed."""
        return any(count > group.pool.num_available for count, group in zip(needed, self.groups, strict=True))

    def needed(self, request: Request, num_tokens: int) -> list[int]:
        """Pages that a running request is still to get in each group to compute its first `num_tokens` tokens."""
        pages, first = self.groups[0].pool.blocks_for(num_tokens), request.num_computed // self.block_size
        return [
            max(0, pages - len(table.blocks)) + self._is_shared(group, table, first)
            for group, table in zip(self.groups, request.tables, strict=True)
        ]

    def needed_to_start(self, request: Request, hit: Sequence[Sequence[int]]) -> list[int]:
        """Pages that are to be available in each group to let a waiting request in, on the filed pages `hit`.

        For what it knows already, or held when it was swapped out.
        """
        counts = []
        for group, table, blocks in zip(self.groups, request.tables, hit, strict=True):
            held = [block for block in blocks if block != NO_BLOCK]
            idle = sum(group.pool.count(block) == 0 for block in held)
            counts.append(max(len(table.host), self.most(group, len(request.tokens)) - len(held)) + idle)
        return counts

    def growth(self, requests: Iterable[Request]) -> list[int]:
        """Pages that running requests may still take in each group: for all they know, and for one more page."""
        counts = [0] * len(self.groups)
        for request in requests:
            for i, group in enumerate(self.groups):
                held = len(request.tables[i].blocks) - request.tables[i].num_passed
                counts[i] += max(1, 1 + self.most(group, len(request.tokens)) - held)
        return counts

    def freed(self, request: Request) -> list[int]:
        """Pages of each group that nobody would hold any more without the request."""
        return [
            sum(group.pool.count(block) == 1 for block in table.held)
            for group, table in zip(self.groups, request.tables, strict=True)
        ]

    # ---- given and taken --------------------------------------------------------------------------------------------

    def _is_shared(self, group: PageGroup, table: BlockTable, index: int) -> bool:
        return index < len(table.blocks) and not group.pool.is_private(table.blocks[index])

    def extend(self, request: Request, counts: Sequence[int]) -> None:
        """Gives a request the pages that it needs (see `needed`), of which there are enough.

        A page that it is to write to and that others look at is copied first.
        """
        first = request.num_computed // self.block_size
        for number, (group, table, count) in enumerate(zip(self.groups, request.tables, counts, strict=True)):
            if not count:
                continue
            blocks = group.pool.allocate(count)
            if self._is_shared(group, table, first):
                source, target = table.blocks[first], blocks.pop()
                table.blocks[first] = target
                table.num_listed = min(table.num_listed, first)
                self.moves.append(Move(MoveKind.COPY, number, (source,), (target,)))
                group.pool.release([source])
            table.blocks += blocks

    def add_page(self, request: Request) -> bool:
        """Gives a request one more page in each group, behind those that it has; False where a group has none left."""
        for group in self.groups:
            if not group.pool.num_available:
                return False
        for group, table in zip(self.groups, request.tables, strict=True):
            table.blocks += group.pool.allocate(1)
        return True

    def give_back_passed(self, request: Request) -> None:
        """Gives back what no layer looks at any more."""
        for number, group in self._windowed:
            table = request.tables[number]
            first, end = table.num_passed, min(self.passed(group, request.num_computed), len(table.blocks))
            if end > first:
                group.pool.release(table.blocks[first:end])
                table.blocks[first:end] = [NO_BLOCK] * (end - first)
                table.num_passed = end

    def can_share(self, parent: Request, count: int) -> bool:
        """Whether the parent still holds all that a query at position `count` looks at."""
        return all(
            self.passed(group, count) >= table.num_passed
            for group, table in zip(self.groups, parent.tables, strict=True)
        )

    def share(self, request: Request, blocks: Sequence[Sequence[int]]) -> None:
        """Lets a request hold pages, in each group, that others hold or that are filed; those passed are NO_BLOCK."""
        request.tables = []
        for group, held in zip(self.groups, blocks, strict=True):
            passed = next((i for i, block in enumerate(held) if block != NO_BLOCK), len(held))
            request.tables.append(BlockTable(list(held), passed))
            group.pool.share(request.tables[-1].held)

    def release(self, request: Request) -> None:
        """Takes all pages from a request, those in the swap space included."""
        for group, table in zip(self.groups, request.tables, strict=True):
            group.pool.release(table.held)
            if group.host is not None:
                group.host.release(table.host)
        request.tables = [BlockTable() for _ in self.groups]

    # ---- swap space -------------------------------------------------------------------------------------------------

    def swap_out(self, request: Request) -> bool:
        """Moves all that a request holds to the swap space, if it has room; whether it had."""
        pairs = list(zip(self.groups, request.tables, strict=True))
        if any(group.host is None or len(t.held) > group.host.num_available for group, t in pairs):
            return False
        for number, (group, table) in enumerate(pairs):
            held = table.held
            if group.host is not None and held:
                table.host = group.host.allocate(len(held))
                self.moves.append(Move(MoveKind.SWAP_OUT, number, tuple(held), tuple(table.host)))
            group.pool.release(held)
            table.blocks, table.num_listed = [], 0
        return True

    def swap_in(self, request: Request) -> None:
        """Brings back what `swap_out` took away, to pages of the request's own, of which there are enough."""
        for number, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            blocks = group.pool.allocate(len(table.host))
            if group.host is not None and blocks:
                self.moves.append(Move(MoveKind.SWAP_IN, number, tuple(table.host), tuple(blocks)))
                group.host.release(table.host)
            table.blocks, table.host = [NO_BLOCK] * table.num_passed + blocks, []

    @property
    def usage(self) -> float:
        """Held pages over all pages, in the group that has fewest left, 0 to 1."""
        return max(group.pool.num_held / group.pool.num_blocks for group in self.groups)

    @property
    def swap_usage(self) -> float:
        """Used pages of the swap space over all its pages, in the group that has fewest left, 0 to 1."""
        spaces = [group.host for group in self.groups if group.host is not None]
        return max((space.num_held / space.num_blocks for space in spaces), default=0.0)

    # ---- books ------------------------------------------------------------------------------------------------------

    def forget_all(self) -> None:
        """Nothing that is filed now is found again."""
        for group in self.groups:
            group.pool.forget_all()

    def check(self, requests: Iterable[Request]) -> None:
        """Raises RuntimeError unless every page is free, cached or held as often as requests list it."""
        every = list(requests)
        for number, group in enumerate(self.groups):
            group.pool.check([request.tables[number].held for request in every])
            if group.host is not None:
                group.host.check([request.tables[number].host for request in every])
