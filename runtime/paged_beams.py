"""Beam search on a step program: beams share the pages of what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmopt.runtime.beam_search import Beam, BeamSearch, BeamSearchParams
from llmopt.runtime.step_batch import StepBatch
from llmopt.runtime.step_program import StepProgram


class PagedBeams:
    """The beams of one prompt over a KV cache of their own.

    A beam that goes on from another's tokens takes its pages, and copies the last one when it writes to it.

    Args:
        program: bound to its weights.
        prompt: token ids.
        params: width, length, penalties.
        eos_token_ids: tokens that finish a beam.
        chunk: most tokens of the prompt that one step computes.
    """

    def __init__(
        self,
        program: StepProgram,
        prompt: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Sequence[int] = (),
        chunk: int = 2048,
    ) -> None:
        self._program, self._prompt, self._chunk = program, list(prompt), chunk
        self._search = BeamSearch(params, eos_token_ids)
        size = program.block_size
        whole, own = len(prompt) // size, -(-(len(prompt) + params.max_tokens) // size)
        # Pages beyond the prompt's whole ones may be each beam's own; one more each while the last one is copied.
        self._cache = program.new_cache(whole + params.beam_width * (own - whole + 1))
        self._blocks: list[list[int]] = []
        self._length = 0

    def run(self) -> list[Beam]:
        """Searches to the end: finished beams, best first."""
        search = self._search
        search.advance(self._prefill())
        while not search.done:
            search.advance(self._step(search.parents, search.tokens))
        return search.beams

    def _prefill(self) -> Tensor:
        """Logits `[1, V]` of the prompt's last token."""
        held = self._cache.allocate(len(self._prompt))
        self._blocks = [held]
        for start in range(0, len(self._prompt), self._chunk):
            part = self._prompt[start : start + self._chunk]
            logits = self._program(StepBatch.build([part], [start], [held], self._program.block_size), self._cache)
        self._length = len(self._prompt)
        return logits

    def _step(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits after `tokens[i]`, which continues beam `parents[i]`."""
        pool = self._cache.pool
        blocks = [list(self._blocks[parent]) for parent in parents]
        for held in blocks:
            pool.share(held)
        for held in self._blocks:
            pool.release(held)
        self._blocks = blocks
        page, copies = self._length // self._program.block_size, []
        for held in blocks:
            if page == len(held):
                held += pool.allocate(1)
            elif not pool.is_private(held[page]):
                (fresh,) = pool.allocate(1)
                copies.append((held[page], fresh))
                pool.release([held[page]])
                held[page] = fresh
        self._cache.copy(copies)
        starts = [self._length] * len(tokens)
        batch = StepBatch.build([[token] for token in tokens], starts, blocks, self._program.block_size)
        self._length += 1
        return self._program(batch, self._cache)
