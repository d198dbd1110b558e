"""The trained model that ships with the examples, with its tokenizer; compiled once for all tests."""

from __future__ import annotations

import functools
from pathlib import Path

from llmopt import LLM

FOLDER = Path(__file__).parents[2] / "examples" / "models" / "target"
PROMPT = "def fibonacci(n):\n"


@functools.cache
def target_llm() -> LLM:
    """An LLM over the trained model, in float32 so that its tokens can be compared exactly."""
    return LLM(FOLDER, dtype="float32", max_model_len=256)
