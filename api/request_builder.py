"""From what a caller gives - texts, token ids, conversations - to jobs for the engine, checked before any work."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.runtime.chat_template import ChatTemplate
from llmopt.runtime.generation import Job
from llmopt.runtime.sampling import ConstraintCompiler, Constraints, SamplingParams
from llmopt.runtime.text import TextCodec
from llmopt.served_model import ServedModel

# A text, token ids, or one of vLLM's dicts: {"prompt": text}, {"prompt_token_ids": ids}, {"prompt_embeds": tensor}.
Prompt = str | Sequence[int] | Mapping[str, Any]
_KINDS = ("prompt", "prompt_token_ids", "prompt_embeds")
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

    @property
    def codec(self) -> TextCodec | None:
        """Makes text of tokens, None without a tokenizer."""
        return self._codec

    @staticmethod
    def each(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
        """One prompt or several as several; raises InputError for what is neither."""
        if isinstance(prompts, str | Mapping):
            return [prompts]
        _check_sequence(prompts, "prompts are texts, lists of token ids or dicts")
        if len(prompts) > 0 and _is_number(prompts[0]):
            return [cast(Sequence[int], prompts)]
        return cast(Sequence[Prompt], prompts)

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | None], list[list[int] | Tensor]]:
        """Texts, where given, and token ids or embeddings, of one prompt or several.

        Raises InputError for what is neither.
        """
        texts: list[str | None] = []
        encoded: list[list[int] | Tensor] = []
        for prompt in self.each(prompts):
            given = _content(prompt) if isinstance(prompt, Mapping) else prompt
            texts.append(given if isinstance(given, str) else None)
            if isinstance(given, Tensor) and isinstance(prompt, Mapping) and "prompt_embeds" in prompt:
                encoded.append(given)
            else:
                encoded.append(self._text(given) if isinstance(given, str) else _token_ids(given))
        return texts, encoded

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
        texts, encoded = self.encode(prompts)
        given: Any = self._model.default_sampling_params() if sampling_params is None else sampling_params
        many: list[SamplingParams] = list(given) if isinstance(given, list | tuple) else [given] * len(encoded)
        for each in many:
            if not isinstance(each, SamplingParams):
                raise InputError(f"sampling parameters are SamplingParams, got {each!r:.80}")
        if len(many) != len(encoded):
            raise InputError(f"{len(encoded)} prompts but {len(many)} sampling parameters")
        if priority is not None:
            _check_sequence(priority, "priority is a list of numbers, one for each prompt")
            if len(priority) != len(encoded):
                raise InputError(f"{len(encoded)} prompts but {len(priority)} priorities")
        if any(p.stop for p in many) and self._codec is None:
            raise InputError("stop strings need a tokenizer; use stop_token_ids, or pass a tokenizer with the model")
        compiled = {id(each): self._compile(each) for each in many}
        ranks = priority or [0] * len(encoded)
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
            for text, prompt, each, rank in zip(texts, encoded, many, ranks, strict=True)
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
    _check_sequence(prompt, "a prompt is a text or a list of token ids")
    if getattr(prompt, "ndim", 1) > 1:
        raise InputError(f"token ids of one prompt are [S], got {list(prompt.shape)}")
    return [token.item() if getattr(token, "ndim", None) == 0 else token for token in prompt]


def _is_number(value: Any) -> bool:
    """Also one of an array or a tensor, which is what these have at a place."""
    return isinstance(value, int) or getattr(value, "ndim", None) == 0


def _check_sequence(given: Any, what: str) -> None:
    """Lists, tuples, arrays and tensors have an order and a length; sets, iterators and numbers do not."""
    no_order = isinstance(given, Mapping | bytes) or not (hasattr(given, "__getitem__") and hasattr(given, "__len__"))
    if no_order or getattr(given, "ndim", 1) == 0:
        raise InputError(f"{what}, got {given!r:.80}")


def _content(prompt: Mapping[str, Any]) -> Any:
    """What a dict has as its prompt: a text, token ids, or the tensor of embeddings."""
    kinds = [name for name in _KINDS if name in prompt]
    if len(kinds) != 1 or len(prompt) != 1:
        raise InputError(f"a prompt's dict has one key of {_KINDS} and no other, got {sorted(map(str, prompt))}")
    content = prompt[kinds[0]]
    wanted = {"prompt": str, "prompt_embeds": Tensor}.get(kinds[0])
    if wanted is not None and not isinstance(content, wanted):
        raise InputError(f"{kinds[0]} must be a {wanted.__name__}, got {content!r:.80}")
    if wanted is None and isinstance(content, str):
        raise InputError(f"{kinds[0]} must be token ids, got {content!r:.80}")
    return content
