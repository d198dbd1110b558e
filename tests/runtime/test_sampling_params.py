"""Sampling parameters are checked before any work."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llmopt.errors import InputError, OptionError
from llmopt.runtime.sampling import ConstraintCompiler, SamplingParams, SamplingState, StructuredOutputsParams

WRONG_WHOLE: tuple[object, ...] = (1.5, "3", True, 1 << 70, -2, math.nan)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("n", v) for v in (0, None, *WRONG_WHOLE)),
        *(("best_of", v) for v in (0, *WRONG_WHOLE)),
        *(("temperature", v) for v in (-0.1, 101, math.nan, math.inf, "1", True, None)),
        *(("top_p", v) for v in (0, -1, 1.01, math.nan, "0.5", True)),
        *(("typical_p", v) for v in (0, -1, 1.01, math.nan, None)),
        *(("min_p", v) for v in (-0.1, 1.5, math.nan, False)),
        *(("top_k", v) for v in WRONG_WHOLE),
        *((f"{kind}_penalty", v) for kind in ("presence", "frequency") for v in (-2.1, 2.1, math.nan, math.inf, None)),
        *(("repetition_penalty", v) for v in (0, -1, math.nan, math.inf, 1e9, None)),
        *(("max_tokens", v) for v in (0, *WRONG_WHOLE)),
        *(("min_tokens", v) for v in (17, None, *WRONG_WHOLE)),
        *(("logprobs", v) for v in (-1, 129, *WRONG_WHOLE)),
        *(("prompt_logprobs", v) for v in (-1, 129, *WRONG_WHOLE)),
        *(("seed", v) for v in (-1, *WRONG_WHOLE)),
        *(("stop", v) for v in ("", ["a", ""], [3], 3, ["x" * 5000], ["s" + str(i) for i in range(1000)])),
        *(("bad_words", v) for v in ("", ["a", ""], [3], 3, ["x" * 5000])),
        *(("stop_token_ids", v) for v in ([-1], ["a"], [1.5], [True], 3, [1 << 40])),
        *(("allowed_token_ids", v) for v in ([], [-1], ["a"], 3, [1 << 40])),
        *(("logit_bias", v) for v in ([1], {-1: 0.0}, {"1": 0.0}, {1: math.nan}, {1: math.inf}, {1: 101}, {1: True})),
        *(("ignore_eos", v) for v in (1, "yes", None)),
        *(("skip_special_tokens", v) for v in (0, None)),
        *(("include_stop_str_in_output", v) for v in (0, None)),
        *(("spaces_between_special_tokens", v) for v in (0, None)),
        *(("detokenize", v) for v in (0, None)),
        *(("structured_outputs", v) for v in ("{}", {"json": "{}"}, 1)),
    ],
)
def test_bad_values_name_option_value_and_what_is_allowed(name: str, bad: object) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: bad})  # type: ignore[arg-type]
    assert caught.value.option == name
    assert caught.value.allowed
    assert name in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("n", {"n": 2, "temperature": 0}),
        ("best_of", {"best_of": 2, "temperature": 0}),
        ("stop", {"stop": "x", "detokenize": False}),
        ("ignore_eos", {"ignore_eos": True, "structured_outputs": StructuredOutputsParams(regex="a")}),
    ],
)
def test_contradictions(option: str, given: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**given)  # type: ignore[arg-type]
    assert caught.value.option == option


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"json": "{}", "regex": "a"},
        {"regex": ""},
        {"regex": 3},
        {"choice": []},
        {"choice": ["a", ""]},
        {"json": 3},
        {"regex": "a", "disable_any_whitespace": True},
        {"json": "{}", "disable_any_whitespace": True, "whitespace_pattern": " "},
        {"json_object": 1},
    ],
)
def test_bad_structured_outputs(given: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        StructuredOutputsParams(**given)  # type: ignore[arg-type]


def test_good_values() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_k=-1,
        max_tokens=9,
        min_tokens=9,
        stop="end",
        stop_token_ids=[3, 3],  # type: ignore[arg-type]
        seed=0,
        logit_bias={3: -100},
        allowed_token_ids=range(3) and [0, 1],  # type: ignore[arg-type]
    )
    assert params.stop == ("end",) and params.stop_token_ids == (3,) and params.allowed_token_ids == (0, 1)
    assert params.num_likeliest == 0 and params.num_sequences == 1
    assert not params.is_greedy
    assert params.replace(temperature=0).is_greedy and params.replace(temperature=1e-6).is_greedy
    assert SamplingParams(max_tokens=None, stop=None, n=2, best_of=5).num_sequences == 5  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        params.replace(max_tokens=8)
    with pytest.raises(TypeError):
        SamplingParams(top_q=1)  # type: ignore[call-arg]
    assert StructuredOutputsParams(json={}).kind == "json"
    assert StructuredOutputsParams(json_object=True).kind == "json_object"


def test_the_caller_cannot_change_parameters_afterwards() -> None:
    bias, stop = {1: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[2], stop[0] = math.nan, ""
    assert params.logit_bias == {1: 1.0} and params.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]


@pytest.mark.parametrize("given", [{"stop_token_ids": [9]}, {"logit_bias": {9: 1.0}}, {"allowed_token_ids": [3, 9]}])
def test_ids_beyond_the_vocabulary(given: dict[str, object]) -> None:
    params = SamplingParams(**given)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="below the vocabulary size 9"):
        ConstraintCompiler(9).compile(params)
    ConstraintCompiler(10).compile(params)


def test_what_needs_a_tokenizer_says_so() -> None:
    for params in (
        SamplingParams(bad_words=("x",)),
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")),
    ):
        with pytest.raises(InputError, match="needs a tokenizer"):
            ConstraintCompiler(10, (1,)).compile(params)
        with pytest.raises(InputError, match="needs a tokenizer"):
            SamplingState(params, [1])
