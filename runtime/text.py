"""Between text and token ids, for whatever tokenizer the user has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmopt.compiler.errors import InputError
from llmopt.runtime.stop_texts import StopTexts

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has up to four bytes, and each token at least one of them.
_MOST_TOKENS_OF_A_CHARACTER = 4
# Tokens of the prompt that are decoded along, for tokenizers whose first token loses its leading space.
_PROMPT_CONTEXT = 4


class TextCodec:
    """Encodes and decodes with a `tokenizers.Tokenizer` or a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        # A fast transformers tokenizer wraps a tokenizers.Tokenizer, which is all that is needed here.
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._special: frozenset[int] | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer's template adds to a prompt, or without."""
        encoded = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which `skip_special_tokens` leaves out."""
        if self._special is None:
            known = getattr(self.tokenizer, "all_special_ids", None)
            if known is None:
                added = self.tokenizer.get_added_tokens_decoder()
                known = [token for token, entry in added.items() if entry.special]
            self._special = frozenset(known)
        return self._special

    def to_json(self) -> str:
        """The tokenizer as JSON text, as `tokenizers.Tokenizer.from_str` reads it."""
        if not hasattr(self.tokenizer, "to_str"):
            raise InputError("this tokenizer cannot be saved; use a fast tokenizer")
        return str(self.tokenizer.to_str())


class IncrementalText:
    """Decodes a growing list of ids, and gives text only once no later token can change it.

    Byte-level tokenizers split characters over tokens; an unfinished character decodes to a replacement character and
    is held back. So is the beginning of a stop string, which would be cut off if the rest of it came. What a stop
    string cuts off does not depend on where tokens begin: the one that is complete first in the text ends it.

    Args:
        codec: the tokenizer.
        skip_special_tokens: leave them out of the text.
        stop: texts that end it, or their automaton where several sequences share it.
        include_stop: keep the stop text at the end.
        spaces_between_special_tokens: off, special tokens that are not left out stand side by side even where the
            tokenizer would put a space between them.
        prompt: token ids that come before, whose text is not given.

    Attributes: `ids`, `text` (with what may still be held back) and `stopped_by`, the stop text that ended it or None.
    """

    def __init__(
        self,
        codec: TextCodec,
        skip_special_tokens: bool = True,
        stop: Sequence[str] | StopTexts = (),
        *,
        include_stop: bool = False,
        spaces_between_special_tokens: bool = True,
        prompt: Sequence[int] = (),
    ) -> None:
        self._codec, self._skip, self._include_stop = codec, skip_special_tokens, include_stop
        self._stops = stop if isinstance(stop, StopTexts) else StopTexts(stop)
        self._stop_state = 0
        self._joined = frozenset() if spaces_between_special_tokens or skip_special_tokens else codec.special_ids
        self.ids: list[int] = []
        self.text = ""
        self.stopped_by: str | None = None
        # Decoding starts at `_context`, because a token's text may depend on the one before it (a leading space);
        # tokens up to `_settled` are in `text`. Both count from the beginning of `_tokens`.
        self._tokens = list(prompt[-_PROMPT_CONTEXT:])
        self._context, self._settled = 0, len(self._tokens)
        self._given = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped_by is not None

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Adds a token; whether a stop string is complete now. The text ends before it then, or with it.

        With `may_stop` off, a stop string that this token completes is text like any other.
        """
        if self.stopped:
            return True
        self.ids.append(token)
        self._tokens.append(token)
        new = self._new_text()
        if new and not new.endswith(REPLACEMENT):
            self._settle(new, len(self._tokens), may_stop)
        elif len(self._tokens) - self._settled >= 2 * _MOST_TOKENS_OF_A_CHARACTER:
            self._settle_front(new, may_stop)
        return self.stopped

    def take(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) if self.stopped else len(self.text) - self._possible_stop()
        given, self._given = self._given, max(self._given, end)
        return self.text[given : self._given]

    def finish(self) -> str:
        """As `take`, with the text that was held back; an unfinished character becomes a replacement character."""
        if not self.stopped:
            self._settle(self._new_text(), len(self._tokens), True)
        given, self._given = self._given, len(self.text)
        return self.text[given:]

    def _decode(self, start: int, end: int) -> str:
        tokens = self._tokens[start:end]
        text = self._codec.decode(tokens, self._skip)
        if sum(token in self._joined for token in tokens) < 2:
            return text
        cuts = [i for i in range(1, len(tokens)) if tokens[i] in self._joined and tokens[i - 1] in self._joined]
        pieces = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
        return "".join(self._codec.decode(piece, self._skip) for piece in pieces)

    def _new_text(self) -> str:
        return self._decode(self._context, len(self._tokens))[len(self._decode(self._context, self._settled)) :]

    def _settle(self, new: str, upto: int, may_stop: bool) -> None:
        """Takes `new` into the text, which is what tokens up to `upto` add to it."""
        if upto > self._settled:
            self._context, self._settled = self._settled, upto
        old = len(self.text)
        self.text += new
        if self._stops:
            self._read_stops(old, may_stop)

    def _settle_front(self, new: str, may_stop: bool) -> None:
        """Bytes that are no text at all must not be held for ever, nor tokens without text be decoded again and again.

        Of so many tokens the last few may belong to a character that is not finished; a cut before them is right when
        the text up to it remains what it was.
        """
        before = len(self._decode(self._context, self._settled))
        latest = len(self._tokens) - _MOST_TOKENS_OF_A_CHARACTER
        for cut in range(latest, self._settled, -1):
            front = self._decode(self._context, cut)[before:]
            if new.startswith(front):
                self._settle(front, cut, may_stop)
                return

    def _read_stops(self, old: int, may_stop: bool) -> None:
        """Ends the text at the stop string that is complete first in what follows the first `old` characters."""
        stops, state = self._stops, self._stop_state
        for end, character in enumerate(self.text[old:], old + 1):
            state = stops.step(state, character)
            if may_stop and (found := stops.found(state)):
                self.stopped_by = found
                self.text = self.text[: end if self._include_stop else end - len(found)]
                break
        self._stop_state = state

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return 0 if self._include_stop else self._stops.num_open(self._stop_state)
