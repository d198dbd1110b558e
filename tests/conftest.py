"""What every test shares: fixed seeds, no network, a fresh Dynamo, and kernel tests only where a compiler is."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers: a test that needs the hub must fail at once, not hang.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests are about compiling, and some break a stage on purpose; those of the graph cache turn it on.
os.environ["LLMOPT_GRAPH_CACHE"] = "0"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from llmopt.codegen.cpu import toolchain
from llmopt.codegen.cpu.toolchain import find_compiler
from llmopt.compiler.errors import ToolchainError

TESTS = Path(__file__).parent

# The same examples in every run, however slow the machine is. Sweeps marked slow say `derandomize=False`.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tests")

# Set by tests/kernels/test_sanitizers.py for the tests that it runs in a process of their own.
if flags := os.environ.get("LLMOPT_TEST_COMPILER_FLAGS"):
    toolchain._COMMON_FLAGS = (*toolchain._COMMON_FLAGS, *flags.split())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the C++ kernels' tests on a machine without a compiler; under CI that is an error instead."""
    try:
        find_compiler()
    except ToolchainError as error:
        if os.environ.get("CI"):
            raise pytest.UsageError(f"CI must test the kernels: {error}") from error
        for item in items:
            if item.path.is_relative_to(TESTS / "kernels"):
                item.add_marker(pytest.mark.skip(reason=str(error)))
    if not torch.cuda.is_available():
        why = "no NVIDIA GPU" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why}"))


def seed_everything() -> None:
    """All random numbers that code draws without a generator of its own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """What a file draws when it is imported must not depend on the files before it."""
    if isinstance(collector, pytest.Module):
        seed_everything()


@pytest.fixture(autouse=True, scope="module")
def _seeded_module() -> None:
    """For fixtures of a whole file."""
    seed_everything()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_everything()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test must not answer in the next; costs nothing where Dynamo was never loaded."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
