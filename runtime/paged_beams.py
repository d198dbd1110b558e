"""Beam search on a step program: beams share the pages of what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.runtime.beam_search import Beam, BeamSearch, BeamSearchParams
from llmopt.runtime.paged_rows import PagedRows
from llmopt.runtime.step_program import StepProgram


class PagedBeams:
    """The beams of one prompt over a KV cache of their own.

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
        self._prompt, self._search = list(prompt), BeamSearch(params, eos_token_ids)
        needed = PagedRows.blocks_needed([len(prompt)], params.beam_width, params.max_tokens, program.block_size)
        self._rows = PagedRows(program, needed, chunk)

    def run(self) -> list[Beam]:
        """Searches to the end: finished beams, best first."""
        search, rows = self._search, self._rows
        search.advance(rows.prefill([self._prompt]))
        while not search.done:
            rows.reorder(search.parents)
            search.advance(rows.step(search.tokens))
        return search.beams
