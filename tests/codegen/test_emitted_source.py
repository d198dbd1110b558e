"""The emitted source of three tiny models, so that a change of generated code is seen in review.

EMITTED_ACCEPT=1 writes the files anew. They are held on one pair of torch and transformers versions (VERSIONS), because
other versions trace other graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from graphs import tiny_programs as tiny

from llmopt.codegen.program import KernelCall, Program

GOLDEN = Path(__file__).parent / "emitted"
VERSIONS = {"torch": "2.13", "transformers": "5.24"}
MODELS: dict[str, Callable[[], Program]] = {
    "llama_step": lambda: tiny.llama_step(2),
    "mixtral_step": lambda: tiny.mixtral_step(2),
    "bert_forward": lambda: tiny.bert_forward(2),
}


@pytest.mark.parametrize("name", MODELS)
def test_emitted_source(name: str) -> None:
    held = all(metadata.version(package).startswith(f"{version}.") for package, version in VERSIONS.items())
    if not held:
        pytest.skip(f"held on {VERSIONS}")
    text = tiny.listing(MODELS[name]())
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EMITTED_ACCEPT") == "1":
        path.write_text(text, "utf-8")
    assert text.splitlines() == path.read_text("utf-8").splitlines(), (
        f"the code that is generated for {name} has changed; if that is meant, run this test with EMITTED_ACCEPT=1 and "
        "commit the file"
    )


def _counts(program: Program) -> int:
    assert all(isinstance(step, KernelCall) for step in program.steps)
    return len(program.steps)


@pytest.mark.parametrize(("shallow", "deep"), [(3, 5), pytest.param(8, 32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [tiny.llama_step, tiny.bert_forward])
def test_depth_adds_calls_but_no_code(make: Callable[[int], Program], shallow: int, deep: int) -> None:
    """The same kernels, the same arena, and a fixed number of calls a layer."""
    few, many = make(shallow), make(deep)
    assert tiny.sources(few) == tiny.sources(many)
    assert few.arena_bytes == many.arena_bytes
    calls, rest = divmod(_counts(many) - _counts(few), deep - shallow)
    assert rest == 0 and 0 < calls < 16
