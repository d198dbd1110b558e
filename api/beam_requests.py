"""Beam searches for callers: prompts and parameters checked before any work, beams and their text afterwards."""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.compiler.errors import InputError
from llmopt.request_builder import Prompt, RequestBuilder
from llmopt.runtime.adapters import Adapter
from llmopt.runtime.beam_search import BeamSearchParams
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.outputs import BeamSearchOutput, BeamSearchSequence
from llmopt.runtime.paged_beams import PagedBeams
from llmopt.runtime.prompt_embeds import PromptEmbeds
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.text import TextCodec


class BeamRequest:
    """The search over one prompt. It takes steps of its own beside those of the engine, on pages of its own.

    Args:
        core: whose program it runs on.
        prompt: as `EngineCore.prompt` gives it, and the text that it was made of.
        params: width, length, penalties.
        codec: makes text of the tokens; None leaves it empty.
        adapter: one of the engine's.
    """

    def __init__(
        self,
        core: EngineCore,
        prompt: Sequence[int] | PromptEmbeds,
        text: str | None,
        params: BeamSearchParams,
        codec: TextCodec | None,
        adapter: Adapter | None,
    ) -> None:
        given = prompt.rows if isinstance(prompt, PromptEmbeds) else prompt
        self._text, self._ids = text, () if isinstance(prompt, PromptEmbeds) else tuple(prompt)
        self._codec = codec
        self._beams = lambda: PagedBeams(core.program, given, params, core.eos_token_ids, adapter=adapter)
        self._search: PagedBeams | None = None

    def advance(self) -> bool:
        """Takes a step; whether there is another one to take. Its memory is taken with the first."""
        if self._search is None:
            self._search = self._beams()
        return self._search.advance()

    def output(self) -> BeamSearchOutput:
        """The beams, once there is no step to take."""
        beams = self._search.beams if self._search is not None else []
        codec = self._codec
        sequences = (BeamSearchSequence(b.tokens, codec.decode(b.tokens) if codec else "", b.score) for b in beams)
        return BeamSearchOutput(self._text, self._ids, tuple(sequences))


def beam_requests(
    core: EngineCore,
    builder: RequestBuilder,
    prompts: Prompt | Sequence[Prompt],
    params: BeamSearchParams,
    adapters: Sequence[Adapter | None] | None = None,
) -> list[BeamRequest]:
    """A search for each prompt, with an adapter for each, or none.

    Raises InputError as `LLM.generate`, and for what is longer than the longest sequence.
    """
    if not isinstance(params, BeamSearchParams):
        raise InputError(f"beam search takes BeamSearchParams, got {params!r:.80}")
    texts, encoded = builder.encode(prompts)
    checked = [core.prompt(prompt) for prompt in encoded]
    for prompt in checked:
        core.check(prompt, SamplingParams(max_tokens=params.max_tokens))
        if len(prompt) + params.max_tokens > core.max_model_len:
            raise InputError(
                f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} are more than "
                f"max_model_len={core.max_model_len}"
            )
    each = adapters if adapters is not None else [None] * len(checked)
    return [
        BeamRequest(core, prompt, text, params, builder.codec, adapter)
        for text, prompt, adapter in zip(texts, checked, each, strict=True)
    ]
