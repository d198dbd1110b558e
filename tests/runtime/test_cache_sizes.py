"""How a budget is divided between groups of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmopt.compiler.options import Options
from llmopt.compiler.step import CacheSpec
from llmopt.runtime.cache_sizes import cache_sizes, host_sizes


def program(windows: list[int], block_size: int = 16) -> Any:
    """As much of a step program as is asked for; a page of one layer takes `16 * 2 * 64 * 4` bytes."""
    grouped = 0 in windows and any(windows)
    specs = [CacheSpec(i, 2, 16, 16, torch.float32, w, group=int(grouped and w > 0)) for i, w in enumerate(windows)]
    counts = [sum(spec.group == g for spec in specs) for g in range(1 + grouped)]
    per_page = [count * block_size * specs[0].bytes_per_token() for count in counts]
    executable = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(
        caches=specs, block_size=block_size, bytes_per_block_of_groups=lambda: per_page, executable=executable
    )


@pytest.mark.parametrize("windows", [[0], [0, 0, 0], [64, 64], [512, 0, 512, 512, 0]])
@pytest.mark.parametrize("pages", [1, 7, 400, 100_000])
def test_a_budget_is_used_and_kept(windows: list[int], pages: int) -> None:
    step = program(windows)
    per_page = step.bytes_per_block_of_groups()
    budget = pages * sum(per_page) + 5
    sizes = cache_sizes(step, Options(kv_cache_memory_bytes=budget, max_num_seqs=4, max_num_batched_tokens=256), 4096)
    used = sum(size * each for size, each in zip(sizes, per_page, strict=True))
    assert budget - per_page[0] < used <= budget
    assert sizes[0] >= pages, "no layer that sees everything has fewer pages than with a table for all"
    if len(sizes) > 1:
        # 4 windows of 32 pages with 2 on their borders, and one step's 16 pages; twice for what is kept.
        assert sizes[1] == min(pages, 2 * (4 * 34 + 16))
        assert (sizes[0] > pages) == (pages > sizes[1])


def test_without_a_budget_no_more_than_could_ever_be_held() -> None:
    assert cache_sizes(program([0]), Options(max_num_seqs=2), 100) == [14]
    assert cache_sizes(program([16, 0]), Options(max_num_seqs=1, max_num_batched_tokens=16), 4096) == [256, 2 * 4]
    assert cache_sizes(program([2048, 0]), Options(max_num_seqs=1), 100) == [7, 7]


def test_the_swap_space_has_the_proportions_of_the_cache() -> None:
    assert host_sizes([100], [10], 500) == [50]
    assert host_sizes([100, 20], [10, 50], 1000) == [50, 10]
    assert host_sizes([100, 20], [10, 50], 0) == [0, 0]
