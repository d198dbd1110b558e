"""Whole models over a quantized KV cache: near eager, the same in chunks, as a program file, and in `explain`."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from models.target import write_shallow
from models.test_generate import all_logits
from models.zoo import build, eager_logits, prompts

import llmopt
from llmopt import LLM, SamplingParams
from llmopt.compiler.kv_formats import KV_CACHE_DTYPES
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.errors import InputError

FORMATS = [name for name in KV_CACHE_DTYPES if name != "auto"]
# Mean deviation of logits from eager, in their standard deviations; the zoo's random weights amplify it.
NEAR = {"int8": 0.1, "fp8": 0.4, "int4": 0.8}


@functools.cache
def engine_of(name: str, kv_cache_dtype: str) -> ModelEngine:
    options = {"block_size": 4, "fallback": "error", "kv_cache_dtype": kv_cache_dtype}
    return ModelEngine(build(name), Options.make(options), Report())


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_logits_are_near_eager_and_do_not_depend_on_chunks(kv_cache_dtype: str) -> None:
    name = "llama"
    engine, rows = engine_of(name, kv_cache_dtype), prompts((1, 17, 64, 90))
    whole = all_logits(engine, rows, 90)
    for row, logits, chunked in zip(rows, whole, all_logits(engine, rows, 13), strict=True):
        expected = eager_logits(build(name), row)
        error = (logits - expected).square().mean().sqrt() / expected.std()
        assert error < NEAR[kv_cache_dtype]
        # Rounding to a level may go the other way where sums were added in another order.
        assert (logits - chunked).square().mean().sqrt() < 0.5 * NEAR[kv_cache_dtype] * expected.std()
    assert (whole[3] - eager_logits(build(name), rows[3])).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("kv_cache_dtype", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_program_file_and_explain(kv_cache_dtype: str, tmp_path: Path) -> None:
    llm = LLM(build("llama"), kv_cache_dtype=kv_cache_dtype)
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts((5, 20)), greedy)]
    llmopt.export(llm, tmp_path / "model.engine")
    loaded = llmopt.load(tmp_path / "model.engine")
    assert [o.outputs[0].token_ids for o in loaded.generate(prompts((5, 20)), greedy)] == expected
    with pytest.raises(InputError, match=r"kv_cache_dtype=.* was decided when"):
        llmopt.load(tmp_path / "model.engine", kv_cache_dtype="auto")
    text = str(llm.report)
    assert f"2 attention layers, keys and values in {kv_cache_dtype}" in text
    assert "k_cache_0 uint8[" in text


def test_a_budget_holds_more_tokens(tmp_path: Path) -> None:
    """Of a model whose heads are of a usual size; blocks of any number of layers are in the same proportion."""
    folder, blocks = write_shallow(tmp_path / "target", layers=1), {}
    for name in ("auto", "int8", "int4"):
        engine = ModelEngine(
            llmopt.huggingface.load_model(folder, torch.bfloat16), Options.make({"kv_cache_dtype": name}), Report()
        )
        blocks[name] = (1 << 24) // engine.program().bytes_per_block()
    assert blocks["int8"] >= 1.9 * blocks["auto"] and blocks["int4"] >= 3.5 * blocks["auto"]
