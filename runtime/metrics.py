"""What an engine counts: gauges of the moment, and totals since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals that the scheduler adds up. Tokens are counted, not blocks or requests, where nothing else is said."""

    num_preemptions: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    requests_aborted: int = 0


@dataclass(frozen=True)
class Metrics:
    """A snapshot, under vLLM's names without their prefix.

    num_requests_running, num_requests_waiting: now; num_requests_swapped: those of the waiting in the swap space.
    kv_cache_usage: held blocks over all blocks, 0 to 1; cached ones that nobody holds do not count. Of the group of
        layers that has fewest left, where layers with and without a window hold pages apart.
    swap_space_usage: the same of the swap space.
    num_preemptions: how often a request's pages were taken away; num_swapped_out of them went to the swap space.
    num_swapped_in: how often a request came back from there.
    prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked up, and that were found.
    prompt_tokens, generation_tokens: prompts of requests that were started, and tokens chosen.
    requests_finished, requests_failed, requests_aborted: ended requests, each in one of the three.
    num_steps: calls of the step program.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_requests_swapped: int
    kv_cache_usage: float
    swap_space_usage: float
    num_preemptions: int
    num_swapped_out: int
    num_swapped_in: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    requests_finished: int
    requests_failed: int
    requests_aborted: int
    num_steps: int
