"""Structured output is valid whatever the model wants, and what is hostile is refused before any work."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.target import FOLDER

from llmopt.errors import InputError, OptionError, SamplingError
from llmopt.huggingface import load_tokenizer
from llmopt.runtime.sampling import (
    ConstraintCompiler,
    Sampled,
    Sampler,
    SamplingParams,
    SamplingState,
    StructuredOutputsParams,
)
from llmopt.runtime.sampling.structured import MAX_DEPTH, MAX_REPETITIONS, check_repetitions
from llmopt.runtime.text import TextCodec

EOS = 1
PADDING = 13  # the model's vocabulary is wider than the tokenizer's


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Everything here is small: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def codec() -> TextCodec:
    return TextCodec(load_tokenizer(FOLDER))


@functools.cache
def vocab_size() -> int:
    return int(codec().tokenizer.get_vocab_size()) + PADDING


@functools.cache
def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(vocab_size(), (EOS,), codec())


def state_for(seed: int = 0, max_tokens: int = 200, **wanted: Any) -> SamplingState:
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(**wanted), seed=seed, top_k=500, max_tokens=max_tokens
    )
    return SamplingState(params, [2], seed, constraints=compiler().compile(params))


def generate(states: list[SamplingState], steps: int = 200, close: float = 0.0) -> list[str]:
    """Texts from random logits; a bias for JSON's closing characters lets them end."""
    sampler, live = Sampler(vocab_size(), (EOS,)), list(states)
    closing = [token for text in ('"', "}", "]", '"}', "0") for token in codec().encode(text, False)]
    generator = torch.Generator().manual_seed(len(states))
    for _ in range(steps):
        if not live:
            break
        logits = torch.randn(len(live), vocab_size(), generator=generator) * 3
        logits[:, closing] += close
        results = sampler(logits, live)
        assert all(isinstance(result, Sampled) for result in results), results
        live = [s for s in live if s.generated[-1] != EOS and not s.is_complete]
    assert not live, [codec().decode(state.generated) for state in live]
    return [codec().decode([t for t in state.generated if t != EOS]) for state in states]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("as_text", [True, False])
def test_json_schema(as_text: bool) -> None:
    schema = json.dumps(PERSON) if as_text else PERSON
    for text in generate([state_for(s, json=schema, whitespace_pattern=" ?") for s in range(6)], close=4.0):
        person = json.loads(text)
        assert set(person) == {"name", "age", "tags"}
        assert isinstance(person["name"], str) and len(person["name"]) <= 12
        assert type(person["age"]) is int and 0 <= person["age"] <= 150
        assert len(person["tags"]) <= 3 and set(person["tags"]) <= {"a", "b"}


def test_json_without_white_space() -> None:
    for text in generate([state_for(s, json=PERSON, disable_any_whitespace=True) for s in range(3)], close=4.0):
        assert re.search(r'\s(?=(?:[^"]*"[^"]*")*[^"]*$)', text) is None
        json.loads(text)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}-\d{3}", r"(?:yes|no|nö 🙂)", r"\w{1,9}@\w{1,5}\.(com|org)"])
def test_regex(pattern: str) -> None:
    for text in generate([state_for(seed, regex=pattern) for seed in range(6)], close=0.0):
        assert re.fullmatch(pattern, text), text


def test_choice() -> None:
    choices = ("red", "green", 'a "quoted"\nline', "🙂 é", "re", "\\d+")
    seen = set(generate([state_for(seed, choice=choices) for seed in range(60)]))
    assert seen == set(choices)


def test_thousands_of_choices() -> None:
    choices = tuple(f"number {i}" for i in range(4000))
    assert set(generate([state_for(seed, choice=choices) for seed in range(5)])) <= set(choices)


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'],
    ids=["lark", "gbnf"],
)
def test_grammar(grammar: str) -> None:
    for text in generate([state_for(seed, grammar=grammar) for seed in range(4)]):
        depth = len(text) // 2
        assert text == "(" * depth + "x" + ")" * depth


def test_any_json_object() -> None:
    assert isinstance(
        json.loads(generate([state_for(json_object=True, disable_any_whitespace=True)], close=8.0)[0]), dict
    )


def test_without_the_grammar_the_text_is_not_valid() -> None:
    """The tests above would be idle if random logits gave what is wanted anyway."""
    state = SamplingState(SamplingParams(seed=0), [2])
    (result,) = Sampler(vocab_size(), (EOS,))(torch.randn(1, vocab_size()), [state])
    assert isinstance(result, Sampled)
    assert not "(x".startswith(codec().decode([result.token])[:1])


def test_free_rows_in_the_same_batch_are_not_touched() -> None:
    logits = torch.randn(3, vocab_size())
    free = [SamplingState(SamplingParams(seed=s), [2]) for s in range(2)]
    again = [SamplingState(SamplingParams(seed=s), [2]) for s in range(2)]
    sampler = Sampler(vocab_size(), (EOS,))
    mixed = sampler(logits, [free[0], state_for(regex="[0-9]"), free[1]])
    assert [mixed[0], mixed[2]] == sampler(logits[[0, 2]], again)
    assert isinstance(mixed[1], Sampled) and codec().decode([mixed[1].token]).isdigit()


def test_the_end_may_come_only_when_the_output_is_complete_and_then_must() -> None:
    sampler, state = Sampler(vocab_size(), (EOS,)), state_for(regex="ab")
    logits = torch.zeros(1, vocab_size())
    logits[0, EOS] = 50.0
    tokens = []
    while not state.is_complete or EOS not in tokens:
        (result,) = sampler(logits, [state])
        assert isinstance(result, Sampled)
        tokens.append(result.token)
        assert len(tokens) < 5
    assert codec().decode(tokens[:-1]) == "ab" and tokens[-1] == EOS


def test_a_token_that_is_not_allowed_fails_that_row() -> None:
    state, other = state_for(regex="[0-9]+"), state_for(regex="[0-9]+")
    state.accept(codec().encode("x", False)[0])
    results = Sampler(vocab_size(), (EOS,))(torch.randn(2, vocab_size()), [state, other])
    assert isinstance(results[0], SamplingError) and "grammar" in str(results[0])
    assert isinstance(results[1], Sampled)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "unclosed": {"regex": "(a"},
    "look-ahead": {"regex": "(?=a)b"},
    "explosive": {"regex": "(a{1000}){1000}"},
    "explosive thrice": {"regex": "((a{100}){100}){100}"},
    "long": {"regex": "a" * 5000},
    "deep": {"regex": "(" * 2000 + "a" + ")" * 2000},
    "huge count": {"regex": "a{99999999999999999999}"},
    "no json": {"json": "{"},
    "json number": {"json": "3"},
    "unknown type": {"json": {"type": "foo"}},
    "deep schema": {"json": nested(500)},
    "deep text": {"json": "[" * 100_000},
    "large schema": {"json": {"enum": ["x" * 20 + str(i) for i in range(10_000)]}},
    "not json": {"json": {"enum": [object()]}},
    "endless": {"json": {"$ref": "#"}},
    "remote": {"json": {"$ref": "http://example.com/x.json"}},
    "file": {"json": {"$ref": "file:///etc/passwd"}},
    "impossible": {"json": {"type": "integer", "minimum": 5, "maximum": 1}},
    "product": {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(8)]}},
    "bad pattern": {"json": {"type": "string", "pattern": "("}},
    "explosive pattern": {"json": {"type": "string", "pattern": "(a{1000}){1000}"}},
    "bad lark": {"grammar": "start: (("},
    "left recursion": {"grammar": "start: a\na: a"},
    "deep lark": {"grammar": "start: " + "(" * 500 + '"a"' + ")" * 500},
    "bad white space": {"json": "{}", "whitespace_pattern": "("},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_refused(name: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**HOSTILE[name]))
    with pytest.raises(OptionError) as caught:
        compiler().compile(params)
    assert len(str(caught.value)) < 2000
    # The next request is served as ever.
    compiler().compile(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))


def test_a_schema_at_the_limit_is_served() -> None:
    compiler().compile(SamplingParams(structured_outputs=StructuredOutputsParams(json=nested(MAX_DEPTH // 2))))


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (f"a{{{MAX_REPETITIONS}}}", True),
        (f"a{{{MAX_REPETITIONS + 1}}}", False),
        ("(a{300}){300}", False),
        ("a{300}b{300}c{300}", True),
        (r"\(a{300}\){300}", True),
        (r"(\){300}){300}", False),
        ("(a{0,300}){,300}", False),
        ("(a{2}){3,}", True),
    ],
)
def test_repetitions(pattern: str, allowed: bool) -> None:
    if allowed:
        check_repetitions("regex", pattern)
    else:
        with pytest.raises(OptionError):
            check_repetitions("regex", pattern)


def test_costly_automata_are_stopped_by_fuel_not_by_time() -> None:
    """An automaton of 2^30 states is built as far as it is walked, within limits that are counted."""
    state = state_for(regex="(a|b)*a(a|b){30}")
    started = time.process_time()
    for token in codec().encode("ab" * 40, False):
        state.accept(token)
    (result,) = Sampler(vocab_size(), (EOS,))(torch.randn(1, vocab_size()), [state])
    assert isinstance(result, Sampled | SamplingError)
    assert time.process_time() - started < 60


def test_equal_constraints_are_compiled_once() -> None:
    first, second = (
        compiler().compile(SamplingParams(structured_outputs=StructuredOutputsParams(regex="[a-z]+"))) for _ in range(2)
    )
    assert first.grammar is second.grammar
    small = ConstraintCompiler(vocab_size(), (EOS,), codec())
    for number in range(80):
        small.compile(SamplingParams(structured_outputs=StructuredOutputsParams(regex=f"a{number}")))
    assert len(small._grammars) == 64


def test_bad_words_become_tokens() -> None:
    words = compiler().compile(SamplingParams(bad_words=("return", "x"))).bad_words
    assert tuple(codec().encode("return", False)) in words
    assert all(0 <= token < vocab_size() for word in words for token in word)
    assert any(codec().decode(word).startswith(" ") for word in words)


def test_a_model_without_an_end_of_sequence() -> None:
    with pytest.raises(InputError, match="end of sequence"):
        ConstraintCompiler(vocab_size(), (), codec()).compile(
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        )
