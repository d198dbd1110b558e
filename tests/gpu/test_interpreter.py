"""Triton kernels against their references in Triton's interpreter, in a process where kernels are interpreted.

Kernels are made interpretable when their modules are loaded, and the rest of the suite needs Triton as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="GPU kernels need triton")


def interpret(*arguments: str) -> str:
    """Runs tests in a process with the interpreter on; gives what pytest printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in [n for n in environment if n.startswith("PYTEST_XDIST")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    answer = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    return answer.stdout


def test_kernels() -> None:
    interpret("tests/gpu/interpreter", "-m", "not slow")


def test_loops() -> None:
    """Some of the tests of the fused loops, with Triton in place of C++."""
    files = ["tests/codegen/test_loops_reductions.py", "tests/codegen/test_loops_gathers.py"]
    words = ("softmax", "any", "all", "mean", "prod", "index_select", "bounds")
    ran = interpret(*files, "-m", "not slow", "-vv", "-k", " or ".join(words))
    assert [word for word in words if word not in ran] == [], "of these there is no test any more"


@pytest.mark.slow
def test_everything() -> None:
    """All tests of the fused loops that compare with eager."""
    loops = [f"tests/codegen/test_loops_{name}.py" for name in ("ops", "views", "random", "reductions", "gathers")]
    # The interpreter cuts float32 off to bfloat16 where a GPU rounds: these two ask for the rounded value.
    interpret("tests/gpu/interpreter", *loops, "-k", "not cast_up_down and not type_as")
