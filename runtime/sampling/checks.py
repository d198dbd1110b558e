"""Checks of single parameter values. Each raises OptionError, which names the option, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from llmopt.compiler.errors import OptionError

# Token ids fit into 31 bits in every tokenizer there is.
ID_LIMIT = 1 << 31


def is_whole(number: object, least: int, below: int) -> bool:
    """Whether this is an int (and no bool) with least <= number < below."""
    return isinstance(number, int) and not isinstance(number, bool) and least <= number < below


def check_whole(name: str, number: object, least: int, most: int) -> None:
    """A whole number from `least` to `most`."""
    if not is_whole(number, least, most + 1):
        raise OptionError(name, number, f"a whole number from {least} to {most}")


def check_real(name: str, number: object, low: float, high: float, *, open_low: bool = False) -> None:
    """A number from `low` (or above it) to `high`; neither NaN nor infinite nor a bool."""
    fits = isinstance(number, int | float) and not isinstance(number, bool) and low <= number <= high
    if not fits or (open_low and number == low):
        raise OptionError(name, number, f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")


def check_flag(name: str, flag: object) -> None:
    """True or False."""
    if not isinstance(flag, bool):
        raise OptionError(name, flag, (False, True))


def checked_texts(name: str, texts: object, most: int, longest: int) -> tuple[str, ...]:
    """A tuple of at most `most` non-empty texts; None is none of them, and one text stands for itself."""
    if texts is None:
        return ()
    if isinstance(texts, str):
        texts = (texts,)
    if not isinstance(texts, list | tuple):
        raise OptionError(name, texts, "a text, or a list or tuple of texts")
    if len(texts) > most:
        raise OptionError(name, f"{len(texts)} texts", f"at most {most}")
    if not all(isinstance(text, str) and text for text in texts):
        raise OptionError(name, texts, "non-empty texts")
    if max(map(len, texts), default=0) > longest:
        raise OptionError(name, shortened(max(texts, key=len)), f"texts of at most {longest} characters")
    return tuple(dict.fromkeys(texts))


def checked_ids(name: str, ids: object, most: int) -> tuple[int, ...]:
    """A tuple of at most `most` token ids without repetitions; None is none of them."""
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple | set | frozenset):
        raise OptionError(name, ids, "a list or tuple of token ids")
    if len(ids) > most:
        raise OptionError(name, f"{len(ids)} token ids", f"at most {most}")
    if not all(is_whole(token, 0, ID_LIMIT) for token in ids):
        raise OptionError(name, shortened(ids), "token ids, whole numbers from 0")
    return tuple(dict.fromkeys(ids))


def check_ids_below(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Token ids of the model's vocabulary."""
    bad = next((token for token in ids if token >= vocab_size), None)
    if bad is not None:
        raise OptionError(name, bad, f"token ids below the vocabulary size {vocab_size}")


def checked_bias(name: str, bias: object, most: int, largest: float) -> dict[int, float]:
    """Token ids and what is added to their logits, each within `largest` of zero."""
    if not isinstance(bias, dict):
        raise OptionError(name, bias, "a dict from token id to a number")
    if len(bias) > most:
        raise OptionError(name, f"{len(bias)} token ids", f"at most {most}")
    for token, number in bias.items():
        if not is_whole(token, 0, ID_LIMIT):
            raise OptionError(name, token, "token ids, whole numbers from 0, as keys")
        fits = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= largest
        if not fits or math.isnan(number):
            raise OptionError(name, number, f"numbers from {-largest:g} to {largest:g}")
    return dict(bias)


def shortened(shown: object, limit: int = 120) -> str:
    """A text for an error message: the beginning of `repr`, because a hostile value may be large."""
    if isinstance(shown, Collection) and len(shown) > limit and not isinstance(shown, str):
        return f"{len(shown)} values"
    text = shown if isinstance(shown, str) else repr(shown)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
