"""Engines over the zoo's models, for tests of what an engine does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from models.zoo import build, greedy

from llmopt import LLM, SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.engine_core import EngineCore

MAX_LEN = 64
# Models whose positions end where their table does.
LEARNED_POSITIONS = ("gpt2", "opt")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def long_model(name: str) -> Any:
    """With positions for longer prompts, unless they are learned."""
    model = build(name)
    if name not in LEARNED_POSITIONS:
        model.config.max_position_embeddings = 512
    return model


@functools.cache
def engine_of(name: str) -> ModelEngine:
    """One compiled program for all tests; its cores differ."""
    return ModelEngine(long_model(name), Options.make({"block_size": 4, "fallback": "error"}), Report())


def core_of(name: str = "llama", num_blocks: int = 0, max_model_len: int = MAX_LEN, **options: Any) -> EngineCore:
    """An engine over pages full of NaN: nothing may be read that was not written."""
    engine = engine_of(name)
    program = engine.program()
    if num_blocks:
        options["kv_cache_memory_bytes"] = num_blocks * program.bytes_per_block()
    core = EngineCore(program, engine.info, Options.make({"block_size": 4, **options}), max_model_len)
    for tensor in core.cache.tensors:
        tensor.fill_(float("nan"))
    return core


@functools.cache
def llm() -> LLM:
    """A tiny model without a tokenizer."""
    return LLM(build("llama"), block_size=4, max_model_len=MAX_LEN)


def tokens_of(model: LLM, rows: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in model.generate(list(rows), params)]


def finish(core: EngineCore) -> None:
    while core.has_unfinished:
        core.step()
        core.scheduler.check_books()
    assert core.cache.pool.num_held == 0


@functools.cache
def expected(name: str, row: tuple[int, ...], count: int) -> list[int]:
    return greedy(long_model(name), row, count)
