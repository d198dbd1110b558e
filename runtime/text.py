"""Between text and token ids, for whatever tokenizer the user has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmopt.compiler.errors import InputError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """Encodes and decodes with a `tokenizers.Tokenizer` or a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        # A fast transformers tokenizer wraps a tokenizers.Tokenizer, which is all that is needed here.
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer's template adds."""
        encoded = self.tokenizer.encode(text)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def to_json(self) -> str:
        """The tokenizer as JSON text, as `tokenizers.Tokenizer.from_str` reads it."""
        if not hasattr(self.tokenizer, "to_str"):
            raise InputError("this tokenizer cannot be saved; use a fast tokenizer")
        return str(self.tokenizer.to_str())


class IncrementalText:
    """Decodes a growing list of ids, and gives text only once no later token can change it.

    Byte-level tokenizers split characters over tokens; an unfinished character decodes to a replacement character and
    is held back. So is the beginning of a stop string, which would be cut off if the rest of it came.

    Args:
        codec: the tokenizer.
        skip_special_tokens: leave them out of the text.
        stop: texts that end it.
    """

    def __init__(self, codec: TextCodec, skip_special_tokens: bool = True, stop: Sequence[str] = ()) -> None:
        self._codec, self._skip, self._stop = codec, skip_special_tokens, tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        # Tokens up to `_settled` are in `text`; decoding starts at `_context`, because a token's text may depend on the
        # one before it (a leading space).
        self._context = self._settled = 0
        self._given = 0

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Adds a token; whether a stop string is complete now. The text ends before it then.

        With `may_stop` off, a stop string that this token completes is text like any other.
        """
        self.ids.append(token)
        new = self._new_text()
        if not new.endswith(REPLACEMENT):
            self._add(new, may_stop)
        return self.stopped

    def take(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) if self.stopped else len(self.text) - self._possible_stop()
        given, self._given = self._given, max(self._given, end)
        return self.text[given : self._given]

    def finish(self) -> str:
        """As `take`, with the text that was held back; an unfinished character becomes a replacement character."""
        if not self.stopped:
            self._add(self._new_text(), True)
        given, self._given = self._given, len(self.text)
        return self.text[given:]

    def _new_text(self) -> str:
        before = self._codec.decode(self.ids[self._context : self._settled], self._skip)
        return self._codec.decode(self.ids[self._context :], self._skip)[len(before) :]

    def _add(self, new: str, may_stop: bool) -> None:
        if not new:
            return
        old = len(self.text)
        self._context, self._settled = self._settled, len(self.ids)
        self.text += new
        if may_stop:
            starts = [self.text.find(stop, max(0, old - len(stop) + 1)) for stop in self._stop]
            found = [start for start in starts if start >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        tails = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in tails if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)
