"""`generate` of an optimized model in transformers' own decoding loop over the step program: same seed, same result."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from models.target import FOLDER
from models.zoo import VOCABULARY, build
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
)

import llmopt

PAD = 0
LENGTHS = (5, 14, 1)
NEW = 9


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the step program was to run, not the forward")


@functools.cache
def pair(name: str, **options: Any) -> tuple[Any, PreTrainedModel]:
    """An optimized model whose forward must not run, and its twin."""
    model: Any = llmopt.optimize(build(name), **{"block_size": 4, "fallback": "error", **options})
    model.forward.run = refuse
    return model, build(name)


@functools.cache
def prompts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.full((len(LENGTHS), max(LENGTHS)), PAD), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, max(LENGTHS) - length :] = torch.randint(8, VOCABULARY, (length,), generator=generator)
        mask[row, max(LENGTHS) - length :] = 1
    return ids, mask


@functools.cache
def plain() -> Tensor:
    """What greedy search generates without any setting."""
    ids, mask = prompts()
    out: Tensor = pair("llama")[1].generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=PAD)
    return out


def notes(model: Any) -> str:
    return "\n".join(llmopt.explain(model).notes)


def both(name: str, settings: dict[str, Any], seed: int = 5, **options: Any) -> tuple[Any, Any, str]:
    """What the optimized model and its twin give for the same call with the same seed, and what `explain` says."""
    model, twin = pair(name, **options)
    ids, mask = prompts()
    model._llmopt.report.notes.clear()
    outputs = []
    for each in (model, twin):
        torch.manual_seed(seed)
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": PAD, **settings}
        outputs.append(each.generate(**call))
    return outputs[0], outputs[1], notes(model)


def generated(row: int, place: int) -> int:
    """A token that greedy search generates."""
    return int(plain()[row, max(LENGTHS) + place])


SETTINGS: dict[str, dict[str, Any]] = {
    "do_sample=True": {"do_sample": True, "temperature": 1.4, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "do_sample=True (several)": {"do_sample": True, "num_return_sequences": 3, "typical_p": 0.9},
    "repetition_penalty=1.6": {"repetition_penalty": 1.6},
    "encoder_repetition_penalty=1.5": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size=1": {"no_repeat_ngram_size": 1},
    "renormalize_logits=True": {"renormalize_logits": True, "do_sample": True, "top_k": 5},
    "num_beams=3": {"num_beams": 3},
    "num_beams=4": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
    "num_beams=2": {"num_beams": 2, "do_sample": True, "temperature": 1.5},
    "argument logits_processor": {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])},
    "argument prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, 30, 40]},
    "max_time=1000.0": {"max_time": 1000.0},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_loop_gives_what_transformers_gives(case: str) -> None:
    actual, expected, said = both("llama", SETTINGS[case])
    assert torch.equal(actual, expected)
    assert "decoding loop over the step program: " in said and case.split(" (")[0] in said
    neutral = ("max_time=1000.0", "argument logits_processor", "encoder_repetition_penalty=1.5")
    if case not in neutral:
        assert not torch.equal(expected, plain()), "the setting must matter here"


def test_settings_about_certain_tokens() -> None:
    """Made of tokens that greedy search generates, so that each changes the result."""
    first, second, later = generated(0, 0), generated(0, 1), generated(1, 4)
    cases: dict[str, dict[str, Any]] = {
        "bad_words_ids": {"bad_words_ids": [[first, second], [later]]},
        "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [first, later]},
        "min_length": {"min_length": max(LENGTHS) + 5, "eos_token_id": [first, later]},
        "suppress_tokens": {"suppress_tokens": [first, later]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "forced_eos_token_id": {"forced_eos_token_id": 97, "eos_token_id": 97},
        "sequence_bias": {"sequence_bias": [[[first], -50.0], [[second, later], 50.0]]},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (2, 3.0),
            "eos_token_id": later,
        },
    }
    for name, settings in cases.items():
        actual, expected, said = both("llama", settings)
        assert torch.equal(actual, expected), name
        assert "over the step program: " in said and f"{name}=" in said
        without = {key: value for key, value in settings.items() if key != name}
        assert not torch.equal(expected, both("llama", without)[1]), f"{name} must matter here"


def test_stopping_criteria_of_the_callers() -> None:
    """One that ends rows apart, and one that allows more than the configuration does."""
    token = generated(1, 3)
    seen: list[int] = []

    def at_token(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen.append(ids.shape[1])
        return ids[:, -1] == token

    actual, expected, said = both("llama", {"stopping_criteria": [at_token]})
    assert torch.equal(actual, expected) and "argument stopping_criteria" in said
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    longer = {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(max(LENGTHS) + NEW + 4)])}
    actual, expected, said = both("llama", longer)
    assert torch.equal(actual, expected) and actual.shape[1] == max(LENGTHS) + NEW + 4
    assert "argument stopping_criteria" in said


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_and_logits_are_returned(beams: int) -> None:
    settings = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "num_beams": beams}
    actual, expected, said = both("llama", settings)
    assert type(actual) is type(expected) and "over the step program" in said
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert list(actual.keys()) == list(expected.keys())


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_the_cache_that_is_returned_can_be_used(name: str) -> None:
    """It holds the same keys and values where there is no padding, and a generation goes on from it."""
    actual, expected, said = both(name, {"return_dict_in_generate": True}, max_num_batched_tokens=16, max_num_seqs=8)
    assert "return_dict_in_generate=True" in said
    _, twin = pair(name, max_num_batched_tokens=16, max_num_seqs=8)
    field = "cache" if "cache" in expected else "past_key_values"
    mask = torch.cat([prompts()[1], torch.ones(len(LENGTHS), NEW, dtype=torch.long)], 1)
    for ours, theirs in zip(actual[field].layers, expected[field].layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape and type(ours) is type(theirs)
        real = mask[:, :-1][:, -ours.keys.shape[2] :, None].bool()
        for kind in ("keys", "values"):
            pair_of = [torch.where(real[:, None], getattr(layer, kind), 0.0) for layer in (ours, theirs)]
            torch.testing.assert_close(*pair_of, rtol=1e-3, atol=1e-4)
    more = [
        twin.generate(out.sequences, attention_mask=mask, max_new_tokens=3, pad_token_id=PAD, **{field: out[field]})
        for out in (actual, expected)
    ]
    assert torch.equal(*more)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gemma3", "gpt2", *(pytest.param(n, marks=SLOW) for n in ("bloom", "opt", "mixtral"))]
)
def test_other_models(name: str) -> None:
    """Windows, learned positions, ALiBi; prompts in small chunks, and beams that copy pages."""
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "temperature": 1.3}):
        actual, expected, said = both(name, settings, max_num_batched_tokens=16, max_num_seqs=8)
        assert torch.equal(actual, expected)
        assert "over the step program" in said


def test_configuration_objects_and_other_caches() -> None:
    """What a configuration says of a cache that is not used must not get in the way, nor be changed."""
    for settings in (
        {"generation_config": GenerationConfig(num_beams=2, cache_implementation="static", pad_token_id=PAD)},
        {"num_beams": 2, "use_cache": False},
        {"num_beams": 2, "prefill_chunk_size": 4},
    ):
        before = str(settings)
        actual, expected, said = both("llama", settings)
        assert torch.equal(actual, expected) and "num_beams=2" in said
        assert str(settings) == before
    model, twin = pair("llama")
    for each in (model, twin):
        each.generation_config.cache_implementation = "static"
    try:
        actual, expected, said = both("llama", {"num_beams": 2})
        assert torch.equal(actual, expected) and "num_beams=2" in said
        assert model.generation_config.cache_implementation == "static"
    finally:
        for each in (model, twin):
            each.generation_config.cache_implementation = None


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=SLOW) for n in ("llama", "gemma3", "opt"))])
def test_embeddings_in_place_of_token_ids(name: str) -> None:
    """A second step program computes the prompt; what follows are tokens. Rows that no token has count as well."""
    model, twin = pair(name, max_num_batched_tokens=16, max_num_seqs=8)
    ids, mask = prompts()
    embeddings = twin.get_input_embeddings()(ids).detach()
    embeddings[1, -3:] += 0.3 * torch.randn(3, embeddings.shape[2])
    for settings in ({}, {"do_sample": True}, {"num_beams": 3, "attention_mask": None, "max_length": 24}):
        model._llmopt.report.notes.clear()
        call = {"inputs_embeds": embeddings, "attention_mask": mask, "pad_token_id": PAD, "max_new_tokens": NEW}
        call |= settings
        if "max_length" in settings:
            del call["max_new_tokens"]
        outputs = []
        for each in (model, twin):
            torch.manual_seed(2)
            outputs.append(each.generate(**call))
        assert torch.equal(*outputs)
        assert "over the step program: argument inputs_embeds" in notes(model)


def test_prompts_that_are_the_same_are_computed_once() -> None:
    model, _ = pair("llama")
    program = model._llmopt.engine().program()
    ids = prompts()[0][1:2]
    before = program.rows_computed
    model.generate(ids, num_beams=3, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=None)
    assert program.rows_computed - before == ids.shape[1] + 3 * (NEW - 1)


def test_text_streams_and_stop_strings() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model, twin = pair("llama")
    ids = prompts()[0][1:2]
    whole = tokenizer.decode(plain()[1, max(LENGTHS) :], skip_special_tokens=True)
    settings = {"stop_strings": [whole[4:6]], "tokenizer": tokenizer, "max_new_tokens": NEW, "pad_token_id": PAD}
    model._llmopt.report.notes.clear()
    texts = []
    for each in (twin, model):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        each.generate(ids, streamer=streamer, **settings)
        texts.append("".join(streamer))
    assert texts[0] == texts[1] and whole.startswith(texts[0]) and whole[4:6] in texts[0] != whole
    assert "over the step program: argument streamer, stop_strings=" in notes(model)


def test_a_cache_that_does_not_fit_stays_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = pair("llama")
    state = model._llmopt
    monkeypatch.setattr(state, "options", dataclasses.replace(state.options, kv_cache_memory_bytes=1 << 14))
    monkeypatch.setattr(model.forward, "run", state.forward)
    ids = prompts()[0][1:2]
    for settings in ({"num_beams": 8}, {"do_sample": True, "num_return_sequences": 9}):
        state.report.notes.clear()
        outputs = []
        for each in (model, twin):
            torch.manual_seed(1)
            outputs.append(each.generate(ids, pad_token_id=PAD, max_new_tokens=NEW, **settings))
        assert torch.equal(*outputs)
        assert "with the compiled forward: a KV cache of" in notes(model)


def test_a_generate_of_somebody_elses_is_left_alone() -> None:
    model: Any = build("llama")
    own = functools.partial(type(model).generate, model)
    model.generate = own
    llmopt.optimize(model)
    model.forward.run = model._llmopt.forward
    for settings in ({}, {"do_sample": True}):
        model._llmopt.report.notes.clear()
        model.generate(prompts()[0][:1], max_new_tokens=2, pad_token_id=PAD, **settings)
        assert "generate is not transformers' own" in notes(model)


def test_bad_settings_raise_what_transformers_raises() -> None:
    model, twin = pair("llama")
    ids = prompts()[0][:1]
    for settings in ({"num_return_sequences": 2}, {"do_sample": True, "top_k": -3}):
        errors = []
        for each in (model, twin):
            with pytest.raises(ValueError) as raised:
                each.generate(ids, max_new_tokens=2, pad_token_id=PAD, **settings)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
