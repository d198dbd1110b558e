"""Text from tokens: no half characters, no half stop strings, and nothing lost on the way."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.target import FOLDER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmopt.huggingface import load_tokenizer
from llmopt.runtime.stop_texts import StopTexts
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


# ---- random text ---------------------------------------------------------------------------------------------------


@functools.cache
def metaspace_codec() -> TextCodec:
    """As Llama-2's: a mark for the space, words of the vocabulary, and bytes for everything else."""
    words = ["<unk>", "<s>", "▁", *map(chr, range(33, 127)), "▁the", "▁a", "é", "ing"]
    tokens = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextCodec(tokenizer)


CODECS = {"byte-level": codec, "byte-fallback": metaspace_codec}
# Characters of one to four bytes, combining marks, joiners, and the replacement character itself.
ALPHABET = st.one_of(
    st.sampled_from("ab \n.é日本🙂🙃\u0301\u200d\ufe0f\ufffd\x00"), st.characters(exclude_categories=["Cs"])
)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_text_streams_without_a_broken_character(name: str, data: st.DataObject) -> None:
    chosen, text = CODECS[name](), data.draw(st.text(ALPHABET, max_size=30))
    ids = chosen.encode(text, add_special_tokens=False)
    whole, stream, shown = chosen.decode(ids), IncrementalText(chosen), ""
    for token in ids:
        stream.push(token)
        shown += stream.take()
        assert whole.startswith(shown)
        assert stream.text == shown
    assert shown + stream.finish() == whole == stream.text


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_tokens_give_the_text_that_they_have_together(name: str, data: st.DataObject) -> None:
    """Also bytes that are no text; then it matters that nothing is held for ever."""
    chosen = CODECS[name]()
    size = chosen.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=60))
    stream, most = IncrementalText(chosen), 0
    for token in ids:
        stream.push(token)
        stream.take()
        most = max(most, len(stream._tokens) - stream._settled)
    stream.finish()
    if name == "byte-level":
        assert stream.text == chosen.decode(ids)
    assert most < 12


@settings(max_examples=200)
@given(
    text=st.text("ab🙂é ", max_size=25),
    stops=st.lists(st.text("ab🙂é ", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_tokens(text: str, stops: list[str], include: bool) -> None:
    """The same as when text comes character by character: the first that is complete ends it."""
    expected, by = text, None
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            by = max(complete, key=len)
            expected = text[:end] if include else text[: end - len(by)]
            break
    stream = IncrementalText(codec(), stop=stops, include_stop=include)
    shown = ""
    for token in codec().encode(text, add_special_tokens=False):
        stopped = stream.push(token)
        shown += stream.take()
        assert expected.startswith(shown)
        if stopped:
            break
    assert shown + stream.finish() == stream.text == expected
    assert stream.stopped_by == by


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4, unique=True),
    whole=st.text("abc", max_size=20),
)
def test_stop_texts_are_those_of_their_definition(texts: list[str], whole: str) -> None:
    stops, state = StopTexts(texts), 0
    for end, character in enumerate(whole, 1):
        state, read = stops.step(state, character), whole[:end]
        assert stops.found(state) == max((text for text in texts if read.endswith(text)), key=len, default="")
        begun = {text[:n] for text in texts for n in range(1, len(text))}
        assert stops.num_open(state) == max((len(each) for each in begun if read.endswith(each)), default=0)


def test_many_long_stop_texts_cost_a_step_for_each_character() -> None:
    """They differ only at their ends, and the text is the beginning of all of them again and again."""
    stops = StopTexts([f"{'a' * 60}{number}" for number in range(256)])
    step, num_steps = stops._next.get, 0

    class Counting(dict[tuple[int, str], int]):
        def get(self, *place: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            return step(*place)

    stops._next = Counting(stops._next)
    stream = IncrementalText(codec(), stop=stops)
    text = ("a" * 60 + "b") * 20
    for token in ids_of(text):
        stream.push(token)
        stream.take()
    assert stream.finish() == "" and stream.text == text
    assert num_steps <= 2 * len(text)


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    """Continuation bytes without a beginning never become a character."""
    byte = next(t for t in ids_of("🙂")[1:] if codec().decode([t]) == REPLACEMENT)
    stream = IncrementalText(codec())
    for _ in range(100):
        stream.push(byte)
    assert len(stream.take()) > 80
    for token in ids_of("🙂"):
        stream.push(token)
    assert stream.take().endswith("🙂")
    assert stream.text == codec().decode(stream.ids)


def test_many_tokens_without_text_are_not_decoded_again_and_again() -> None:
    stream = IncrementalText(codec())
    for _ in range(50):
        stream.push(1)
    assert len(stream._tokens) - stream._settled < 10
    for token in ids_of("x"):
        stream.push(token)
    assert stream.take() == "x"


def test_the_prompt_keeps_the_space_of_the_first_word() -> None:
    chosen = metaspace_codec()
    prompt, more = chosen.encode("a", False), chosen.encode("the", False)
    for before, expected in (((), "the"), (prompt, " the")):
        stream = IncrementalText(chosen, prompt=before)
        for token in more:
            stream.push(token)
        assert stream.take() + stream.finish() == expected


def test_spaces_between_special_tokens() -> None:
    tokenizer = Tokenizer.from_str(metaspace_codec().to_json())
    tokenizer.add_special_tokens(["<s>", "<e>"])
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # puts a space between all tokens
    chosen = TextCodec(tokenizer)
    ids = [chosen.tokenizer.token_to_id(token) for token in ("<s>", "<e>", "<s>")]
    for spaced, expected in ((True, "<s> <e> <s>"), (False, "<s><e><s>")):
        stream = IncrementalText(chosen, skip_special_tokens=False, spaces_between_special_tokens=spaced)
        for token in ids:
            stream.push(token)
        stream.finish()
        assert stream.text == expected
    assert chosen.special_ids == set(ids)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = IncrementalText(codec(), stop=("b",), include_stop=True)
    for character in "abc":
        for token in ids_of(character):
            stream.push(token)
    assert stream.text == "ab" and stream.take() == "ab" and stream.finish() == ""
    assert stream.stopped_by == "b" and len(stream.ids) == 2
