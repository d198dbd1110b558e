"""Beam search on a step program: beams share the pages of what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.runtime.adapters import Adapter
from llmopt.runtime.beam_search import Beam, BeamSearch, BeamSearchParams
from llmopt.runtime.paged_rows import PagedRows, Prompt
from llmopt.runtime.step_program import StepProgram


class PagedBeams:
    """The beams of one prompt over a KV cache of their own.

    Args:
        program: bound to its weights.
        prompt: token ids, or embeddings `[S, H]` where the program takes them.
        params: width, length, penalties.
        eos_token_ids: tokens that finish a beam.
        chunk: most tokens of the prompt that one step computes.
        adapter: of the program's kind; all beams have it.
    """

    def __init__(
        self,
        program: StepProgram,
        prompt: Prompt,
        params: BeamSearchParams,
        eos_token_ids: Sequence[int] = (),
        chunk: int = 2048,
        *,
        adapter: Adapter | None = None,
    ) -> None:
        self._prompt, self._search = prompt, BeamSearch(params, eos_token_ids)
        needed = PagedRows.blocks_needed([len(prompt)], params.beam_width, params.max_tokens, program.block_size)
        self._rows = PagedRows(program, needed, chunk, adapter)

    def advance(self) -> bool:
        """Computes the prompt, or the next token of all beams; whether the search goes on."""
        search, rows = self._search, self._rows
        if rows.has_begun:
            rows.reorder(search.parents)
            search.advance(rows.step(search.tokens))
        else:
            search.advance(rows.prefill([self._prompt]))
        return not search.done

    @property
    def beams(self) -> list[Beam]:
        """Finished beams, best first."""
        return self._search.beams
