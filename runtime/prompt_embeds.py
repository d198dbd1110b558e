"""Prompts that are given as embeddings instead of token ids, as vLLM's EmbedsPrompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.step import EmbedsSpec
from llmopt.runtime.scheduler import Chunk
from llmopt.runtime.step_batch import StepBatch

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """The embeddings of a prompt's tokens, `[S, H]`, dense on the CPU; nobody else writes to them."""

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, begin: int, end: int) -> bytes:
        """The rows from `begin` up to `end`, as they lie in memory."""
        return self.rows[begin:end].view(torch.uint8).numpy().tobytes()


def checked_embeds(embeds: object, spec: EmbedsSpec | None) -> PromptEmbeds:
    """A copy of a caller's embeddings `[S, H]`, or `[1, S, H]`, on whatever device.

    Raises InputError for what is no such tensor, for another size or dtype than the model's, for values that are not
    finite, and where the program takes no embeddings (`spec` is None).
    """
    if spec is None:
        raise InputError("prompt_embeds need the option enable_prompt_embeds=True")
    if not isinstance(embeds, torch.Tensor):
        raise InputError(f"prompt_embeds must be a tensor [S, {spec.size}], got {embeds!r:.80}")
    rows = embeds.detach()
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.ndim != 2 or rows.shape[1] != spec.size or rows.layout != torch.strided:
        raise InputError(f"prompt_embeds must be a dense tensor [S, {spec.size}], got {list(embeds.shape)}")
    if rows.dtype != spec.dtype:
        raise InputError(f"prompt_embeds must be {spec.dtype}, as the model's own, got {rows.dtype}")
    if not bool(rows.isfinite().all()):
        raise InputError("prompt_embeds hold values that are not finite")
    return PromptEmbeds(torch.empty(rows.shape, dtype=rows.dtype).copy_(rows))


def with_prompt_embeds(batch: StepBatch, chunks: Sequence[Chunk]) -> StepBatch:
    """The batch of `chunks` with the embeddings of those of their tokens that have no ids."""
    given: list[Tensor] = []
    places: list[range] = []
    first = 0
    for request, start, length, _ in chunks:
        embeds = request.prompt_embeds
        if embeds is not None and start < request.num_prompt:
            given.append(embeds.rows[start : start + length])
            places.append(range(first, first + len(given[-1])))
        first += length
    if not given:
        return batch
    return place_embeds(batch, given, places)


def place_embeds(batch: StepBatch, given: Sequence[Tensor], places: Sequence[range]) -> StepBatch:
    """The batch with the rows `given[i]` `[n, H]` in place of its tokens `places[i]`."""
    index = torch.full(batch.input_ids.shape, -1, dtype=torch.int64)
    row = 0
    for place in places:
        index[place.start : place.stop] = torch.arange(row, row + len(place))
        row += len(place)
    return replace(batch, prompt_embeds_index=index, prompt_embeds=torch.cat(list(given)))
