"""Text from tokens: no half characters, no half stop strings, and nothing lost on the way."""

from __future__ import annotations

import functools

import pytest
from models.target import FOLDER
from tokenizers import Tokenizer

from llmopt.huggingface import load_tokenizer
from llmopt.runtime.text import REPLACEMENT, IncrementalText, TextCodec

TEXTS = (
    'def f(x):\n    return "naïve 🙂 日本語 é"\n',
    "🙂🙃 é e\u0301 \u200d👩\u200d👩\u200d👧 ẞ",
    "  leading and   inner   spaces\t\n\n",
    "x",
)


@functools.cache
def codec() -> TextCodec:
    return TextCodec(load_tokenizer(FOLDER))


def ids_of(text: str) -> list[int]:
    return codec().encode(text)[1:]  # the template's <|bos|>


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_text(text: str) -> None:
    stream = IncrementalText(codec())
    ids = ids_of(text)
    parts = []
    for token in ids:
        assert not stream.push(token)
        parts.append(stream.take())
        assert REPLACEMENT not in parts[-1]
        assert text.startswith("".join(parts))
    parts.append(stream.finish())
    assert "".join(parts) == stream.text == codec().decode(ids) == text
    assert len([part for part in parts if part]) > 1 or len(text) == 1


def test_the_tokenizer_does_split_characters() -> None:
    """The test above would be idle with a tokenizer that has a token for every character."""
    pieces = [codec().decode([token]) for token in ids_of("🙂")]
    assert len(pieces) > 1 and pieces[0] == REPLACEMENT


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    stream = IncrementalText(codec())
    *most, _ = ids_of("a 🙂")
    for token in most:
        stream.push(token)
        assert REPLACEMENT not in stream.take()
    assert REPLACEMENT in stream.finish()
    assert stream.finish() == ""


def test_special_tokens_are_left_out_unless_wanted() -> None:
    tokens = [*ids_of("x"), 1, *ids_of("y")]
    for skip, expected in ((True, "xy"), (False, "x<|eos|>y")):
        stream = IncrementalText(codec(), skip)
        for token in tokens:
            stream.push(token)
        stream.finish()
        assert stream.text.replace(" ", "") == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("o t",), "one tw"),
        ("abababac rest", ("abac",), "abab"),
        ("x = '日本語'", ("本",), "x = '日"),
        ("one", ("never", "on ", "one!"), "one"),
        ("stop", ("stop",), ""),
        ("line\n\n\nmore", ("\n\n",), "line"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str) -> None:
    """The text ends before the first stop string, and streaming never shows a piece of it."""
    stream = IncrementalText(codec(), stop=stop)
    shown = ""
    for token in ids_of(text):
        stopped = stream.push(token)
        shown += stream.take()
        assert expected.startswith(shown)
        if stopped:
            break
    assert stream.stopped is (expected != text)
    assert shown + stream.finish() == stream.text == expected


def test_a_possible_stop_string_is_held_back_and_then_given() -> None:
    stream = IncrementalText(codec(), stop=("ENDING",))
    for character in "xEND":
        for token in ids_of(character):
            stream.push(token)
    assert stream.text == "xEND"
    assert stream.take() == "x"
    for token in ids_of("!"):
        stream.push(token)
    assert stream.take() == "END!"


def test_stop_strings_before_the_least_number_of_tokens_are_text() -> None:
    stream = IncrementalText(codec(), stop=("b",))
    for number, character in enumerate("abab"):
        (token,) = ids_of(character)
        assert stream.push(token, may_stop=number >= 2) is (number == 3)
    assert stream.text == "aba"


def test_a_transformers_tokenizer_does_as_well() -> None:
    from transformers import AutoTokenizer

    slow = TextCodec(AutoTokenizer.from_pretrained(FOLDER))
    assert isinstance(slow.tokenizer, Tokenizer)
    assert slow.encode(TEXTS[0]) == codec().encode(TEXTS[0])
    assert Tokenizer.from_str(slow.to_json()).encode("x").ids == codec().encode("x")
