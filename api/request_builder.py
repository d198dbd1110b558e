"""From what a caller gives - texts, token ids, conversations - to jobs for the engine, checked before any work."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llmopt.compiler.errors import InputError
from llmopt.runtime.chat_template import ChatTemplate
from llmopt.runtime.generation import Job
from llmopt.runtime.sampling import ConstraintCompiler, Constraints, SamplingParams
from llmopt.runtime.text import TextCodec
from llmopt.served_model import ServedModel

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class RequestBuilder:
    """Makes jobs for one model. Threads may share it.

    Args:
        model: whose tokenizer and vocabulary are used.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model, self._codec = model, model.codec
        self._lock = threading.Lock()
        self._constraints: ConstraintCompiler | None = None

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        """Texts, where given, and token ids, of one prompt or several. Raises InputError for what is neither."""
        if isinstance(prompts, str):
            prompts = [prompts]
        elif isinstance(prompts, Mapping) or not hasattr(prompts, "__len__"):
            raise InputError(f"prompts are texts or lists of token ids, got {prompts!r:.80}")
        elif len(prompts) > 0 and isinstance(prompts[0], int):
            prompts = [cast(Sequence[int], prompts)]
        texts: list[str | None] = []
        ids: list[list[int]] = []
        for prompt in prompts:
            texts.append(prompt if isinstance(prompt, str) else None)
            ids.append(self._text(prompt) if isinstance(prompt, str) else _token_ids(prompt))
        return texts, ids

    def render(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[list[int]]:
        """Token ids of one conversation or several, by the tokenizer's template or another; see `LLM.chat`."""
        if self._codec is None:
            raise InputError("chat needs a tokenizer; pass one with the model")
        own = getattr(self._model.tokenizer, "chat_template", None)
        source = chat_template or (own if isinstance(own, str) else None)
        if source is None:
            raise InputError("this tokenizer has no chat template; pass chat_template")
        template = ChatTemplate(source, getattr(self._model.tokenizer, "special_tokens_map", {}))
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        rendered = [template.render(cast(Sequence[Message], one), **variables) for one in many]
        # The template writes the special tokens itself.
        return [self._text(text, False) for text in rendered]

    def jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
    ) -> list[Job]:
        """One job for each prompt, its parameters checked and compiled; arguments and errors as `LLM.generate`.

        Whether the engine could serve them is for `SequenceGroup` to check.
        """
        texts, ids = self.encode(prompts)
        given: Any = self._model.default_sampling_params() if sampling_params is None else sampling_params
        many: list[SamplingParams] = list(given) if isinstance(given, list | tuple) else [given] * len(ids)
        for each in many:
            if not isinstance(each, SamplingParams):
                raise InputError(f"sampling parameters are SamplingParams, got {each!r:.80}")
        if len(many) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(many)} sampling parameters")
        if priority is not None and len(priority) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(priority)} priorities")
        if any(p.stop for p in many) and self._codec is None:
            raise InputError("stop strings need a tokenizer; use stop_token_ids, or pass a tokenizer with the model")
        compiled = {id(each): self._compile(each) for each in many}
        ranks = priority or [0] * len(ids)
        return [
            Job(
                prompt,
                each,
                text,
                self._codec,
                compiled[id(each)],
                request_id=request_id,
                priority=rank,
                cache_salt=cache_salt,
            )
            for text, prompt, each, rank in zip(texts, ids, many, ranks, strict=True)
        ]

    def _compile(self, params: SamplingParams) -> Constraints:
        with self._lock:
            if self._constraints is None:
                self._constraints = ConstraintCompiler(self._model.vocab_size, self._model.eos_token_ids, self._codec)
            return self._constraints.compile(params)

    def _text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        codec: TextCodec | None = self._codec
        if codec is None:
            raise InputError("a text prompt needs a tokenizer; pass one with the model, or pass token ids")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is no text: half of a surrogate pair at {error.start}") from None
        return codec.encode(text, add_special_tokens)


def _token_ids(prompt: Any) -> list[int]:
    """As plain ints where they are numbers of a tensor or array; the engine checks what they are."""
    if isinstance(prompt, Mapping | bytes) or not hasattr(prompt, "__iter__"):
        raise InputError(f"a prompt is a text or a list of token ids, got {prompt!r:.80}")
    return [token.item() if hasattr(token, "item") else token for token in prompt]
