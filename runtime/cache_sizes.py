"""How large the KV cache of an engine is: how many pages each group of layers gets."""

from __future__ import annotations

from llmopt.compiler.options import Options
from llmopt.compiler.step import group_windows
from llmopt.runtime.memory import device_memory
from llmopt.runtime.step_program import StepProgram

# Layers with a window get pages for so many times what the running requests can hold at once: what is beyond serves
# prompts that begin alike, of which they keep but the last window's pages.
_WINDOW_ROOM = 2


def cache_sizes(program: StepProgram, options: Options, max_model_len: int) -> list[int]:
    """How many pages of the KV cache each group of layers gets.

    `kv_cache_memory_bytes` says how much memory they take together. Else it is the fraction `gpu_memory_utilization`
    of the memory that its device has available now, but no more than `max_num_seqs` of the longest sequences could ever
    hold.

    A group with a window has as many pages as the one without, for short sequences take as many of both, up to what
    all running requests could hold of it. So it is never what runs out first, and what it does not need goes to the
    layers that see everything.
    """
    per_page = program.bytes_per_block_of_groups()
    most = [options.max_num_seqs * -(-max_model_len // program.block_size)] * len(per_page)
    for group, window in enumerate(group_windows(program.caches)):
        if window and len(per_page) > 1:
            # Between them, one step's tokens add no more than max_num_batched_tokens to what windows cover.
            windows = options.max_num_seqs * (-(-window // program.block_size) + 2)
            held = windows + -(-options.max_num_batched_tokens // program.block_size)
            most[group] = min(most[group], _WINDOW_ROOM * held)
    if options.kv_cache_memory_bytes:
        return _divide(options.kv_cache_memory_bytes, per_page, most, capped=False)
    return _divide(
        int(device_memory(program.executable.device) * options.gpu_memory_utilization), per_page, most, capped=True
    )


def _divide(budget: int, per_page: list[int], most: list[int], capped: bool) -> list[int]:
    """Pages of each group for `budget` bytes; the first group takes what others do not need."""
    count = budget // sum(per_page)
    others = [min(count, limit) for limit in most[1:]]
    rest = budget - sum(pages * size for pages, size in zip(others, per_page[1:], strict=True))
    first = rest // per_page[0]
    return [max(1, pages) for pages in (min(first, most[0]) if capped else first, *others)]


def host_sizes(sizes: list[int], per_page: list[int], budget: int) -> list[int]:
    """Pages of the swap space of `budget` bytes for each group, in the proportions of the KV cache."""
    total = sum(pages * size for pages, size in zip(sizes, per_page, strict=True))
    return [min(pages * budget // total, budget // size) for pages, size in zip(sizes, per_page, strict=True)]
