"""Requests: refused before any work, nothing leaked, ends found, and repeatable."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
from models.zoo import VOCABULARY, build, prompts, reference_generate

import llmopt
from llmopt import LLM, SamplingParams
from llmopt.compiler.options import Options
from llmopt.errors import InputError
from llmopt.runtime.generator import Generator

MAX_LEN = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@functools.cache
def llm_of(**options: Any) -> LLM:
    """A tiny model without a tokenizer. Options that only the generator reads share one compiled program."""
    if not options:
        return LLM(build("llama"), block_size=4, max_model_len=MAX_LEN)
    llm = copy.copy(llm_of())
    llm.options = Options.make(llm.options, **options)
    engine = llm._engine = copy.copy(llm_of()._engine)
    assert engine is not None
    engine.program()
    engine.options, engine._caches = llm.options, {}
    return llm


def generator_for(lengths: Sequence[int], **options: Any) -> Generator:
    engine = llm_of(**options)._engine
    assert engine is not None
    return engine.generator(lengths)


def tokens_of(llm: LLM, rows: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(list(rows), params)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCABULARY], rf"token id {VOCABULARY} is not in 0..{VOCABULARY - 1}"),
        ([3, -1], "token id -1"),
        ([1.5], "token id 1.5"),
        ([True], "token id True"),
        ([5] * MAX_LEN, f"the prompt has {MAX_LEN} tokens; the longest sequence is {MAX_LEN}"),
    ],
)
def test_a_bad_prompt_stops_everything_before_any_work(prompt: list[int], message: str) -> None:
    """The good prompt before it is not run either."""
    llm = llm_of()
    generator = generator_for([20, 20])
    steps = generator.program.num_steps
    with pytest.raises(InputError, match=message):
        llm.generate([[1, 2, 3], prompt], GREEDY)
    assert generator.program.num_steps == steps
    assert generator.cache.num_free == generator.cache.num_blocks


def test_a_cache_that_is_too_small_is_named_before_any_work() -> None:
    per_block = generator_for([4]).program.bytes_per_block()
    llm = llm_of(kv_cache_memory_bytes=5 * per_block)
    generator = generator_for([8], kv_cache_memory_bytes=5 * per_block)
    steps = generator.program.num_steps
    assert generator.cache.num_blocks == 5
    with pytest.raises(InputError, match=r"21 tokens do not fit into the KV cache of 20; raise kv_cache_memory_bytes"):
        llm.generate([[1, 2], [3] * 13], GREEDY)
    assert generator.program.num_steps == steps
    assert generator.cache.num_free == 5
    # What fits is served, one after the other where it does not fit at once.
    rows = prompts([12, 12, 1, 5])
    assert tokens_of(llm, rows, GREEDY) == reference_generate("llama", rows, 8)
    assert generator.cache.num_free == 5


def test_closing_early_gives_everything_back() -> None:
    generator = generator_for([20, 20, 20])
    rows = prompts([9, 3, 5])
    stream = generator.run(rows, [GREEDY] * 3)
    for _ in range(4):
        next(stream)
    assert generator.cache.num_free < generator.cache.num_blocks
    stream.close()
    assert generator.cache.num_free == generator.cache.num_blocks
    # Pages are not mixed up afterwards: the same prompts give the right tokens.
    assert tokens_of(llm_of(), rows, GREEDY) == reference_generate("llama", rows, 8)


def test_an_error_in_the_callers_check_gives_everything_back() -> None:
    generator = generator_for([20])

    def check(request: object) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(generator.run([[1, 2, 3]], [GREEDY], check))
    assert generator.cache.num_free == generator.cache.num_blocks


def test_two_generations_at_once_do_not_disturb_each_other() -> None:
    llm = llm_of()
    rows = prompts([9, 17])
    expected = reference_generate("llama", rows, 8)
    first = llm.stream([rows[0]], GREEDY)
    got = [next(first).token_id]
    assert tokens_of(llm, rows[1:], GREEDY.replace(max_tokens=8)) == expected[1:]
    got += [chunk.token_id for chunk in first]
    assert got == expected[0]


def test_a_fixed_cache_held_by_another_generation_is_named() -> None:
    per_block = generator_for([4]).program.bytes_per_block()
    options = {"kv_cache_memory_bytes": 6 * per_block}
    first = generator_for([20], **options).run([[1, 2, 3, 4, 5, 6, 7, 8, 9]], [GREEDY])
    next(first)
    with pytest.raises(InputError, match=r"5 of 6 KV cache blocks are held by another generation"):
        llm_of(**options).generate([[1, 2, 3]], GREEDY)
    first.close()
    assert len(llm_of(**options).generate([[1, 2, 3]], GREEDY)) == 1


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 1}, {"max_num_seqs": 1}])
def test_limits_of_a_step_change_no_token(options: dict[str, int]) -> None:
    rows = prompts([1, 30, 7, 19, 2])
    program = generator_for([4], **options).program
    before = program.rows_computed, program.num_steps
    assert tokens_of(llm_of(**options), rows, GREEDY) == reference_generate("llama", rows, 8)
    computed, steps = program.rows_computed - before[0], program.num_steps - before[1]
    # Every token once, but the last of each request.
    assert computed == sum(map(len, rows)) + 5 * 7
    assert steps == {"": 8, "max_num_batched_tokens": computed}.get(next(iter(options), ""), steps)


def test_max_model_len_ends_a_request() -> None:
    (out,) = llm_of().generate([prompts([60])[0]], GREEDY)
    assert len(out.outputs[0].token_ids) == MAX_LEN - 60
    assert out.outputs[0].finish_reason == "length"


def test_ends_of_sequence() -> None:
    """eos ends a request, ignore_eos and min_tokens keep it going, and other ids end it as well."""
    model = build("llama")
    (row,) = prompts([20])
    (expected,) = reference_generate("llama", [row], 8)
    end = expected[3]
    assert end not in expected[:3]
    model.generation_config.eos_token_id = [end, 130]
    llm = LLM(model, block_size=4, max_model_len=MAX_LEN)

    def run(**changes: Any) -> tuple[list[int], str | None]:
        (out,) = llm.generate([row], GREEDY.replace(**changes))
        return list(out.outputs[0].token_ids), out.outputs[0].finish_reason

    assert run() == (expected[:4], "stop")
    assert run(ignore_eos=True) == (expected, "length")
    assert run(stop_token_ids=[expected[1]]) == (expected[:2], "stop")
    assert run(max_tokens=4) == (expected[:4], "stop")
    tokens, _ = run(min_tokens=6)
    assert tokens[:3] == expected[:3]
    assert len(tokens) >= 6 and not {end, 130} & set(tokens[:6])
    # Nor is a stop token chosen before min_tokens.
    tokens, _ = run(stop_token_ids=[expected[1]], min_tokens=3, ignore_eos=True)
    assert tokens[0] == expected[0] and len(tokens) >= 3 and expected[1] not in tokens[:3]


def test_seeds_repeat_whatever_else_is_in_the_batch() -> None:
    llm = llm_of()
    rows = prompts([6, 11, 3])
    params = SamplingParams(temperature=1.5, max_tokens=8, seed=7)
    (alone,) = tokens_of(llm, rows[:1], params)
    batch = llm.generate(rows, [params, params.replace(seed=8), params.replace(seed=None)])
    assert list(batch[0].outputs[0].token_ids) == alone
    assert tokens_of(llm, rows[:1], params.replace(seed=8))[0] != alone
    assert [out.prompt_token_ids for out in batch] == [tuple(row) for row in rows]


def test_generate_takes_one_prompt_or_none() -> None:
    llm = llm_of()
    assert llm.generate([], GREEDY) == []
    (row,) = prompts([5])
    (single,) = llm.generate(row, GREEDY)
    assert list(single.outputs[0].token_ids) == reference_generate("llama", [row], 8)[0]
    with pytest.raises(InputError, match="needs a tokenizer"):
        llm.generate("text", GREEDY)
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        llm.generate([row], GREEDY.replace(stop="x"))
    with pytest.raises(InputError, match="1 prompts but 2 sampling parameters"):
        llm.generate([row], [GREEDY, GREEDY])
    assert llmopt.explain(llm).graphs[0].kind == "step"
