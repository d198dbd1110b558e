"""`batch_invariant=True`: a request's logits are the same to the bit alone, in any batch, in any chunks."""

from __future__ import annotations

import functools

import pytest
import torch
from models.test_generate import FLOAT_TOLERANCE, all_logits
from models.zoo import build, eager_logits, prompts

from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine

LENGTHS = (1, 17, 64, 90)
# Grouped heads; windows and soft caps; learned positions and LayerNorm; ALiBi; experts, of which a batch hits more.
MODELS = ("llama", "gemma2", "gpt2", "bloom", "qwen3-moe")
# The others run in the long sweep: compiling is what takes the time here.
ALWAYS = ("float32-gemma2", "bfloat16-qwen3-moe")
CASES = [
    pytest.param(name, dtype, id=case, marks=[] if case in ALWAYS else [pytest.mark.slow])
    for dtype in ("float32", "bfloat16")
    for name in MODELS
    for case in (f"{dtype}-{name}",)
]


@functools.cache
def engine_of(name: str, dtype: str, **options: object) -> ModelEngine:
    settings = {"block_size": 4, "fallback": "error", "batch_invariant": True, **options}
    return ModelEngine(build(name, getattr(torch, dtype)), Options.make(settings), Report())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_are_the_same_bits(name: str, dtype: str) -> None:
    engine, rows = engine_of(name, dtype), prompts(LENGTHS)
    executable = engine.program().executable
    executable.threads = 1
    alone = [all_logits(engine, [row], len(row))[0] for row in rows]
    if dtype == "float32":
        for row, logits in zip(rows, alone, strict=True):
            expected = eager_logits(build(name), row)
            torch.testing.assert_close(logits, expected, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    for threads in (1, 2):
        executable.threads = threads
        for chunk in (1, 13, 90):
            for row, (mine, want) in enumerate(zip(all_logits(engine, rows, chunk), alone, strict=True)):
                assert torch.equal(mine, want), f"row {row}, chunks of {chunk}, {threads} threads"
        (last,) = all_logits(engine, [rows[-1]], 13)
        assert torch.equal(last, alone[-1])


@pytest.mark.parametrize("kv_cache_dtype", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_with_a_quantized_cache(kv_cache_dtype: str) -> None:
    engine, rows = engine_of("llama", "float32", kv_cache_dtype=kv_cache_dtype), prompts(LENGTHS)
    alone = [all_logits(engine, [row], len(row))[0] for row in rows]
    for chunk in (1, 13):
        assert all(map(torch.equal, all_logits(engine, rows, chunk), alone))


def test_without_the_option_chunks_show() -> None:
    """What the test above would see if the option did nothing."""
    engine, rows = engine_of("llama", "float32", batch_invariant=False), prompts(LENGTHS)
    whole, chunked = all_logits(engine, rows, 90), all_logits(engine, rows, 13)
    assert not all(map(torch.equal, whole, chunked))
    assert "batch invariant" not in str(engine.report)
    invariant = engine_of("gemma2", "float32")
    invariant.program()
    assert "batch invariant" in str(invariant.report)
