"""Sequences that take every step together, over a KV cache of their own: beams, and loops that choose the tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from llmopt.runtime.adapters import Adapter, AdapterPool
from llmopt.runtime.prompt_embeds import place_embeds
from llmopt.runtime.step_batch import StepBatch
from llmopt.runtime.step_program import StepProgram

Prompt = Sequence[int] | Tensor


class PagedRows:
    """Rows of tokens whose keys and values lie in pages. Rows share the pages of what they have in common.

    A row that goes on from another's tokens takes its pages, and copies the last one when it writes to it.

    Args:
        program: bound to its weights.
        num_blocks: pages of the cache; see `blocks_needed`.
        chunk: most tokens of prompts that one step computes.
        adapter: that all rows have, of the program's kind. It lies in a pool of their own, so that they neither wait
            for a slot of the engine's nor take one; of a CPU's memory, that takes what the adapter does.
    """

    def __init__(
        self, program: StepProgram, num_blocks: int, chunk: int = 2048, adapter: Adapter | None = None
    ) -> None:
        self._program, self._chunk = program, max(1, chunk)
        self._pool: AdapterPool | None = None
        if adapter is not None and program.adapters is not None:
            self._pool = AdapterPool(program.adapters.spec, program.executable.device)
            self._pool.load(0, adapter)
        self._cache = program.new_cache(num_blocks)
        self._blocks: list[list[int]] = []
        self._lengths: list[int] = []

    @property
    def has_begun(self) -> bool:
        """Whether there are rows."""
        return bool(self._blocks)

    @staticmethod
    def blocks_needed(prompts: Sequence[int], rows: int, new_tokens: int, block_size: int) -> int:
        """Pages for prompts of these lengths, each continued by up to `new_tokens` tokens in `rows` ways."""
        # Pages beyond a prompt's whole ones may be each row's own; one more each while the last one is copied.
        whole = [length // block_size for length in prompts]
        own = [-(-(length + new_tokens) // block_size) for length in prompts]
        return sum(w + rows * (o - w + 1) for w, o in zip(whole, own, strict=True))

    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """Begins a row for each prompt; logits `[rows, V]` after each. Equal prompts are computed once.

        Args:
            prompts: token ids; or embeddings `[S, H]`, where the program takes them.
        """
        if self._blocks:
            raise ValueError("the rows have begun already")
        first: dict[Hashable, int] = {}
        place = [first.setdefault(_identity(prompt), len(first)) for prompt in prompts]
        distinct = [prompts[place.index(row)] for row in range(len(first))]
        self._blocks = [self._cache.allocate(len(prompt)) for prompt in distinct]
        self._lengths = [len(prompt) for prompt in distinct]
        ends: list[Tensor | None] = [None] * len(distinct)
        left = [(row, 0) for row in range(len(distinct))]
        while left:
            left = self._prefill_step(distinct, left, ends)
        self.reorder(place)
        logits = [end for end in ends if end is not None]
        return torch.stack([logits[row] for row in place])

    def _prefill_step(
        self,
        prompts: Sequence[Prompt],
        left: list[tuple[int, int]],
        ends: list[Tensor | None],
    ) -> list[tuple[int, int]]:
        """One step over the next tokens of the prompts `left`, (row, tokens computed); what is left then."""
        room, taken, rest = self._chunk, [], []
        for row, start in left:
            count = min(room, len(prompts[row]) - start)
            room -= count
            if count:
                taken.append((row, start, start + count))
            if start + count < len(prompts[row]):
                rest.append((row, start + count))
        tokens = [prompts[row][start:end] for row, start, end in taken]
        starts = [start for _, start, _ in taken]
        blocks = [self._blocks[row] for row, _, _ in taken]
        logits = self._run(_batch(tokens, starts, blocks, self._program.block_size))
        for (row, _, end), logit in zip(taken, logits, strict=True):
            if end == len(prompts[row]):
                ends[row] = logit
        return rest

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes what row `parents[i]` is now; there may be more or fewer rows than before."""
        blocks = [list(self._blocks[parent]) for parent in parents]
        for held in blocks:
            self._cache.pool.share(held)
        for held in self._blocks:
            self._cache.pool.release(held)
        self._blocks, self._lengths = blocks, [self._lengths[parent] for parent in parents]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to every row; logits `[rows, V]` after them."""
        pool, size, copies = self._cache.pool, self._program.block_size, []
        for held, length in zip(self._blocks, self._lengths, strict=True):
            page = length // size
            if page == len(held):
                held += pool.allocate(1)
            elif not pool.is_private(held[page]):
                (fresh,) = pool.allocate(1)
                copies.append((held[page], fresh))
                pool.release([held[page]])
                held[page] = fresh
        self._cache.copy(copies)
        batch = StepBatch.build([[token] for token in tokens], self._lengths, self._blocks, size)
        self._lengths = [length + 1 for length in self._lengths]
        return self._run(batch)

    def _run(self, batch: StepBatch) -> Tensor:
        if self._program.adapters is not None:
            slot = torch.full(batch.input_ids.shape, -1 if self._pool is None else 0, dtype=torch.int32)
            batch = dataclasses.replace(batch, adapter_index=slot)
        return self._program(batch, self._cache, adapters=self._pool)

    def contents(self, width: int) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of each layer, `[rows, kv_heads, width, size]`: rows end at the right, before them are zeros.

        None where pages hold them in another format than the model computes them in.
        """
        specs, tensors = self._program.caches, self._cache.tensors
        if any(spec.kv_dtype != "auto" for spec in specs):
            return None
        return [
            (self._gather(tensors[2 * i], width), self._gather(tensors[2 * i + 1], width)) for i in range(len(specs))
        ]

    def _gather(self, pages: Tensor, width: int) -> Tensor:
        _, heads, size, row = pages.shape
        result = pages.new_zeros((len(self._blocks), heads, width, row))
        for i, (held, length) in enumerate(zip(self._blocks, self._lengths, strict=True)):
            found = pages[held].transpose(0, 1).reshape(heads, len(held) * size, row)
            result[i, :, width - length :] = found[:, :length]
        return result


def _identity(prompt: Prompt) -> Hashable:
    """The same for equal prompts."""
    if isinstance(prompt, Tensor):
        return prompt.shape, prompt.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(prompt)


def _batch(
    parts: Sequence[Prompt], starts: Sequence[int], blocks: Sequence[Sequence[int]], block_size: int
) -> StepBatch:
    ids = [[0] * len(part) if isinstance(part, Tensor) else part for part in parts]
    batch = StepBatch.build(ids, starts, blocks, block_size)
    given = [(part.cpu(), range(end - len(part), end)) for part, end in _with_ends(parts) if isinstance(part, Tensor)]
    return place_embeds(batch, [rows for rows, _ in given], [place for _, place in given]) if given else batch


def _with_ends(parts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    return list(zip(parts, itertools.accumulate(map(len, parts)), strict=True))
