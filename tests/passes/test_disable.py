"""A pass that is switched off makes its own tests fail: they test the pass, not what happens to be true without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.passes.pipeline import BACKEND, step_pipeline

FOLDER = Path(__file__).parent
# Passes whose tests share a file with another one's.
FILES = {"simplify_views": "test_normalize.py"}
OPTIONAL = sorted({p.name for p in (*BACKEND, *step_pipeline(4)) if not p.required})


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_disabling_a_pass_makes_its_tests_fail(name: str) -> None:
    file = FOLDER / FILES.get(name, f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", str(file)]
    if name in FILES:
        command += ["-k", name]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LLMOPT_DISABLE": name}
    )
    assert answer.returncode == pytest.ExitCode.TESTS_FAILED, answer.stdout[-2000:]


def test_every_pass_has_a_test_file() -> None:
    assert [name for name in OPTIONAL if not (FOLDER / FILES.get(name, f"test_{name}.py")).exists()] == []
