"""What a request's parameters mean for a model: ids within its vocabulary, bad words as tokens, a compiled grammar.

Compiled once, when a request comes in, so that whatever is wrong raises before any work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmopt.compiler.errors import InputError
from llmopt.runtime.sampling.checks import check_ids_below
from llmopt.runtime.sampling.params import SamplingParams, StructuredOutputsParams
from llmopt.runtime.sampling.structured import Grammar, GrammarCompiler

# Compiled grammars that are kept: a service sees the same few schemas again and again.
_MAX_GRAMMARS = 64


class Codec(Protocol):
    """What is needed of a tokenizer; see `llmopt.runtime.text.TextCodec`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def to_json(self) -> str:
        """The tokenizer as JSON text, as `tokenizers.Tokenizer.from_str` reads it."""


@dataclass(frozen=True)
class Constraints:
    """bad_words as token ids, and the compiled grammar of structured_outputs."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


class ConstraintCompiler:
    """Compiles and checks parameters for one model and tokenizer.

    Args:
        vocab_size: number of token ids of the model.
        eos_token_ids: what ends a structured output.
        codec: the tokenizer, needed for bad_words and structured_outputs.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = (), codec: Codec | None = None) -> None:
        self._vocab_size, self._eos, self._codec = vocab_size, tuple(eos_token_ids), codec
        self._compiler: GrammarCompiler | None = None
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, params: SamplingParams) -> Constraints:
        """Raises OptionError for ids beyond the vocabulary and for a grammar that is wrong, too large or too costly,
        and InputError where a tokenizer is needed and missing, or cannot serve."""
        check_ids_below("stop_token_ids", params.stop_token_ids, self._vocab_size)
        check_ids_below("logit_bias", params.logit_bias or (), self._vocab_size)
        check_ids_below("allowed_token_ids", params.allowed_token_ids or (), self._vocab_size)
        grammar = None if params.structured_outputs is None else self._grammar(params.structured_outputs)
        return Constraints(self._bad_words(params.bad_words), grammar)

    def _need_codec(self, option: str) -> Codec:
        if self._codec is None:
            raise InputError(f"{option} needs a tokenizer")
        return self._codec

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """As vLLM: a word at the beginning, and inside a text, where a space before it may be part of its token."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            codec = self._need_codec("bad_words")
            plain, spaced = (tuple(codec.encode(start + word.lstrip(), False)) for start in ("", " "))
            if not plain:
                raise InputError(f"the bad word {word!r} has no tokens")
            check_ids_below("bad_words", plain, self._vocab_size)
            found[plain] = None
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                check_ids_below("bad_words", spaced, self._vocab_size)
                found[spaced] = None
        return tuple(found)

    def _grammar(self, wanted: StructuredOutputsParams) -> Grammar:
        if self._compiler is None:
            tokenizer = self._need_codec("structured_outputs").to_json()
            self._compiler = GrammarCompiler(tokenizer, self._vocab_size, self._eos)
        source = self._compiler.source(wanted)
        grammar = self._grammars.pop(source, None) or self._compiler.compile(wanted.kind, source)
        self._grammars[source] = grammar
        if len(self._grammars) > _MAX_GRAMMARS:
            self._grammars.popitem(last=False)
        return grammar
