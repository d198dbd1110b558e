"""The engine over real programs: tokens equal transformers' whatever happens, and nothing leaks."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models.cores import (
    GREEDY,
    LEARNED_POSITIONS,
    MAX_LEN,
    core_of,
    engine_of,
    expected,
    finish,
    llm,
    long_model,
    tokens_of,
)
from models.zoo import ZOO, build, greedy, prompts, reference_generate

import llmopt
from llmopt import LLM, SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.errors import InputError
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import Job, run_jobs
from llmopt.runtime.request import Request
from llmopt.runtime.step_program import StepBatch

# ---- the same tokens whatever happens ------------------------------------------------------------------------------


SWEEP = [name if name in ("llama", "mistral") else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", SWEEP)
def test_random_arrivals_chunks_preemption_and_prefixes(name: str) -> None:
    """Prompts of 1 to 300 tokens that partly begin alike, arriving while others run, in a pool that is too small."""
    generator = torch.Generator().manual_seed(3)
    longest = 100 if name in LEARNED_POSITIONS else 300
    lengths = [1, longest, *torch.randint(1, longest // 3, (6,), generator=generator).tolist()]
    rows = prompts(lengths, seed=5)
    rows[4:6] = [rows[1][: longest // 2] + row[:5] for row in rows[4:6]]
    limit = longest + 20
    blocks = -(-limit // 4) + 12
    settings = [
        (7, {}),
        (64, {"async_scheduling": True}),
        (33, {"swap_space_bytes": 1 << 24}),
        (64, {"swap_space_bytes": 1 << 24, "async_scheduling": True}),
    ]
    for budget, options in settings:
        core = core_of(name, blocks, limit, max_num_batched_tokens=budget, max_num_seqs=4, **options)
        core.scheduler.config = dataclasses.replace(core.scheduler.config, min_swapped_tokens=1)
        requests: list[Request] = []
        waits = torch.randint(0, 5, (len(rows),), generator=generator).tolist()
        for row, wait in zip(rows, waits, strict=True):
            requests.append(core.add_request(row, GREEDY.replace(max_tokens=12)))
            for _ in range(wait):
                core.step()
        # The tokens of a request that is preempted by force are not computed in the order of the others.
        core.scheduler.preempt(max(core.scheduler.running, key=lambda r: r.num_computed))
        finish(core)
        # Asked again: what is left in the cache is used.
        requests += [core.add_request(row, GREEDY.replace(max_tokens=12)) for row in rows[4:6]]
        finish(core)
        for row, request in zip([*rows, *rows[4:6]], requests, strict=True):
            assert request.generated == expected(name, tuple(row), 12)
        metrics = core.metrics()
        assert metrics.num_preemptions > 0
        assert (metrics.num_swapped_in > 0) == ("swap_space_bytes" in options)
        assert metrics.prefix_cache_hits > 0
        assert metrics.requests_finished == len(requests)
        assert metrics.generation_tokens == 12 * len(requests)


def test_a_pool_that_is_too_small_for_all_preempts() -> None:
    core = core_of(num_blocks=14, max_num_seqs=4)
    rows = prompts([9, 12, 5, 7])
    requests = [core.add_request(row, GREEDY.replace(max_tokens=30)) for row in rows]
    finish(core)
    assert [request.generated for request in requests] == reference_generate("llama", rows, 30)
    assert core.metrics().num_preemptions > 0
    assert requests[0].num_preempted == 0


def test_windows_of_all_layers_free_pages() -> None:
    """Mistral's layers all slide: a long text runs in a pool that could never hold it."""
    windows = {spec.window for spec in engine_of("mistral").program().caches}
    assert 0 not in windows and max(windows) < 30
    core = core_of("mistral", 24, 200, max_num_batched_tokens=16)
    (row,) = prompts([120])
    requests = [core.add_request(row, GREEDY.replace(max_tokens=40)) for _ in range(2)]
    finish(core)
    assert [request.generated for request in requests] == [expected("mistral", tuple(row), 40)] * 2


@pytest.mark.parametrize("name", ["gemma2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_windows_of_some_layers_free_their_own_pages(name: str) -> None:
    """Layers with a window keep no more than it covers; the memory that this saves holds longer texts."""
    specs = engine_of(name).program().caches
    assert {spec.group for spec in specs} == {0, 1}
    assert all((spec.window > 0) == (spec.group == 1) for spec in specs)
    limit = 200
    core = core_of(name, 48, limit, max_num_batched_tokens=16, max_num_seqs=2)
    full, windowed = (group.pool for group in core.cache.groups)
    assert windowed.num_blocks < 48 < full.num_blocks
    rows = prompts([120, 37], seed=2)
    requests = [core.add_request(row, GREEDY.replace(max_tokens=40)) for row in rows]
    most = 0
    while core.has_unfinished:
        core.step()
        core.scheduler.check_books()
        most = max(most, windowed.num_held)
    assert [request.generated for request in requests] == [expected(name, tuple(row), 40) for row in rows]
    # 160 and 77 tokens are 40 and 20 pages of 4.
    assert most <= sum(core.scheduler.pages.most(core.cache.groups[1], count) for count in (160, 77)) < 20
    # Of what begins alike, the last window's pages are enough where there is a window.
    again = core.add_request([*rows[0], *requests[0].generated], GREEDY)
    finish(core)
    assert again.num_hit >= 140
    assert again.generated == expected(name, (*rows[0], *requests[0].generated), 8)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}], ids=["float", "int8"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_swapped_requests_go_on_where_they_were(name: str, options: dict[str, Any]) -> None:
    """With room in the swap space no token is computed twice, and what comes back are the same pages, scales too."""
    engine = (
        engine_of(name)
        if not options
        else ModelEngine(long_model(name), Options.make({"block_size": 4, "fallback": "error", **options}), Report())
    )
    rows, program = prompts([9, 12, 5, 7], seed=1), engine.program()
    params = GREEDY.replace(max_tokens=30)

    def run(num_blocks: int, swapped: int) -> tuple[list[list[int]], int, EngineCore]:
        limits = {
            "block_size": 4,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": num_blocks * program.bytes_per_block(),
            "swap_space_bytes": swapped * program.bytes_per_block(),
        }
        core = EngineCore(program, engine.info, Options.make(limits), MAX_LEN)
        core.scheduler.config = dataclasses.replace(core.scheduler.config, min_swapped_tokens=1)
        requests = [core.add_request(row, params) for row in rows]
        before = program.rows_computed
        finish(core)
        return [request.generated for request in requests], program.rows_computed - before, core

    roomy, computed, core = run(200, 0)
    assert core.metrics().num_preemptions == 0
    tokens, again, core = run(14, 40)
    metrics = core.metrics()
    assert metrics.num_preemptions == metrics.num_swapped_out == metrics.num_swapped_in > 0
    assert metrics.swap_space_usage == metrics.num_requests_swapped == 0
    assert tokens == roomy
    assert again == computed
    tokens, again, core = run(14, 0)
    assert core.metrics().num_swapped_out == 0 < core.metrics().num_preemptions
    assert tokens == roomy if not options else True
    assert again > computed
    if not options:
        assert roomy == [expected(name, tuple(row), 30) for row in rows]


def test_a_request_may_be_aborted_in_the_swap_space() -> None:
    core = core_of(swap_space_bytes=1 << 20)
    core.scheduler.config = dataclasses.replace(core.scheduler.config, min_swapped_tokens=1)
    requests = [core.add_request(row, GREEDY) for row in prompts([9, 14])]
    core.step()
    core.scheduler.preempt(requests[1])
    metrics = core.metrics()
    assert (metrics.num_requests_swapped, metrics.num_swapped_out) == (1, 1) and metrics.swap_space_usage > 0
    core.abort(requests[1])
    core.scheduler.check_books()
    assert core.metrics().swap_space_usage == core.metrics().num_requests_swapped == 0
    finish(core)
    assert requests[1].finish_reason == "abort"


def test_forks_continue_a_prompt_on_shared_pages() -> None:
    core = core_of()
    (row,) = prompts([22])
    params = SamplingParams(temperature=1.5, max_tokens=8, seed=7)
    alone = core.add_request(row, params, stream=1)
    finish(core)
    core.reset_prefix_cache()
    parent = core.add_request(row, params)
    core.step()
    held = core.cache.pool.num_held
    child = core.fork(parent, stream=1)
    assert core.cache.pool.num_held == held
    finish(core)
    assert child.generated == alone.generated != parent.generated
    again = core.add_request(row, params)
    finish(core)
    assert again.generated == parent.generated


def test_blocks_are_copied_in_every_layer() -> None:
    cache = core_of().cache
    for tensor in cache.tensors:
        tensor.copy_(torch.arange(len(tensor)).view(-1, 1, 1, 1).expand_as(tensor))
    cache.copy([(0, 1), (1, 2)])
    for tensor in cache.tensors:
        assert tensor[:4, 0, 0, 0].tolist() == [0, 0, 0, 3], "a copy may be copied on"


# ---- the next step runs while results are looked at ----------------------------------------------------------------


def test_what_happens_during_a_step_changes_no_token() -> None:
    """Requests are preempted, aborted, forked and forgotten while a step that computes them is under way."""
    rows = prompts([9, 14, 22, 6])
    params = SamplingParams(temperature=1.3, max_tokens=20, seed=4)
    alone = core_of()
    calm = [alone.add_request(row, params, stream=i) for i, row in enumerate([*rows, rows[0]])]
    finish(alone)
    for space in (0, 1 << 20):
        core = core_of(async_scheduling=True, swap_space_bytes=space)
        core.scheduler.config = dataclasses.replace(core.scheduler.config, min_swapped_tokens=1)
        requests = [core.add_request(row, params, stream=i) for i, row in enumerate(rows)]
        for _ in range(3):
            core.step()
        assert core._flight is not None and len(core._flight.work.chunks) == 4
        child = core.fork(requests[0], stream=4)
        core.scheduler.preempt(requests[0])
        core.abort(requests[3])
        core.reset_prefix_cache()
        finish(core)
        assert [r.generated for r in (*requests[:3], child)] == [calm[i].generated for i in (0, 1, 2, 4)]
        assert requests[3].generated == calm[3].generated[:3]
        assert core.metrics().num_swapped_in == (space > 0)
        assert core.cache.pool.num_cached == 0 or not requests[1].cacheable


def test_failures_of_steps_under_way_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(async_scheduling=True)
    rows = prompts([9, 6, 11])
    requests = [core.add_request(row, GREEDY) for row in rows]
    program = core.program

    def evil(batch: StepBatch, cache: Any, lend: bool = False) -> torch.Tensor:
        if any(batch.seq_lens == 9):
            raise ValueError("an evil forward")
        return program(batch, cache, lend=lend)

    monkeypatch.setattr(core, "program", evil)
    finish(core)
    # A prompt of 9 tokens fails at once, that of 6 when it has become 9 long.
    assert [request.finish_reason for request in requests] == ["error", "error", "length"]
    assert [request.generated for request in requests] == [[], *_cut(reference_generate("llama", rows[1:], 8), 3)]
    # A step that failed for somebody who is gone by then concerns nobody.
    gone = core.add_request(rows[0], GREEDY)
    core._flight = core._launch()
    core.abort(gone)
    assert core.step() == [] and gone.finish_reason == "abort"
    # Who is left out of a plan under way is not waited for.
    request = core.add_request(rows[2], GREEDY)
    core.step()
    core.fail_all(RuntimeError("gone"))
    assert not core.has_unfinished and request.finish_reason == "error"
    again = core.add_request(rows[2], GREEDY)
    finish(core)
    assert again.generated == requests[2].generated


def _cut(rows: list[list[int]], count: int) -> list[list[int]]:
    """The first row cut to its first tokens."""
    return [rows[0][:count], *rows[1:]]


# ---- several callers -----------------------------------------------------------------------------------------------


def test_a_short_queue_serves_many_prompts() -> None:
    core = core_of(max_num_queued=2, max_num_seqs=2)
    rows = prompts([3] * 9)
    rows = [[i, *row] for i, row in enumerate(rows)]
    updates = list(run_jobs(core, [Job(row, GREEDY) for row in rows]))
    last = {update.index: update.request.generated for update in updates if update.is_last}
    assert [last[i] for i in range(9)] == reference_generate("llama", rows, 8)


def test_closing_early_gives_everything_back() -> None:
    core = core_of()
    rows = prompts([9, 3, 5])
    updates = run_jobs(core, [Job(row, GREEDY) for row in rows])
    for _ in range(4):
        next(updates)
    assert core.cache.pool.num_held > 0
    updates.close()
    assert core.cache.pool.num_held == 0 and not core.has_unfinished
    core.scheduler.check_books()
    assert core.metrics().requests_aborted == 3


def test_generations_share_steps_and_do_not_disturb_each_other() -> None:
    model = llm()
    rows = prompts([9, 17])
    reference = reference_generate("llama", rows, 8)
    first = model.stream([rows[0]], GREEDY)
    got = [next(first).token_id]
    steps = model.get_metrics().num_steps
    assert tokens_of(model, rows[1:], GREEDY) == reference[1:]
    shared = model.get_metrics().num_steps - steps
    got += [chunk.token_id for chunk in first]
    assert got == reference[0]
    assert model.get_metrics().num_steps - steps == shared == 8, "the first stream's tokens came in the same steps"


def test_threads_share_an_engine() -> None:
    model = llm()
    rows = prompts([9, 17, 5, 12])
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda row: tokens_of(model, [row, row[:3]], GREEDY)[0], rows))
    assert answers == reference_generate("llama", rows, 8)
    model._engine_core(fresh=False).scheduler.check_books()


def test_weights_that_changed_are_not_answered_from_the_cache() -> None:
    """Even when the change cannot be seen: through `.data`, no version counts."""
    module = build("llama")
    model = LLM(module, block_size=4, max_model_len=MAX_LEN)
    (row,) = prompts([30])
    before = tokens_of(model, [row], GREEDY)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data.mul_(1.1)
    assert tokens_of(model, [row], GREEDY) == [greedy(module, row, 8)] != before
    # Within one call prefixes are shared.
    hits = model.get_metrics().prefix_cache_hits
    model.generate([row, row, [1], row], GREEDY.replace(max_tokens=1))
    assert model.get_metrics().prefix_cache_hits == hits
    rows = [row] * 20
    outputs = model.generate(rows, GREEDY)
    assert outputs[-1].num_cached_tokens == 28
    assert {out.outputs[0].token_ids for out in outputs} == {outputs[0].outputs[0].token_ids}


# ---- ends and seeds ------------------------------------------------------------------------------------------------


def test_max_model_len_ends_a_request() -> None:
    (out,) = llm().generate([prompts([60])[0]], GREEDY)
    assert len(out.outputs[0].token_ids) == MAX_LEN - 60
    assert out.outputs[0].finish_reason == "length"


def test_ends_of_sequence() -> None:
    """eos ends a request, ignore_eos and min_tokens keep it going, and other ids end it as well."""
    model = build("llama")
    (row,) = prompts([20])
    (reference,) = reference_generate("llama", [row], 8)
    end = reference[3]
    assert end not in reference[:3]
    model.generation_config.eos_token_id = [end, 130]
    ending = LLM(model, block_size=4, max_model_len=MAX_LEN)

    def run(**changes: Any) -> tuple[list[int], str | None]:
        (out,) = ending.generate([row], GREEDY.replace(**changes))
        return list(out.outputs[0].token_ids), out.outputs[0].finish_reason

    assert run() == (reference[:4], "stop")
    assert run(ignore_eos=True) == (reference, "length")
    assert run(stop_token_ids=[reference[1]]) == (reference[:2], "stop")
    assert run(max_tokens=4) == (reference[:4], "stop")
    tokens, _ = run(min_tokens=6)
    assert tokens[:3] == reference[:3]
    assert len(tokens) >= 6 and not {end, 130} & set(tokens[:6])
    # Nor is a stop token chosen before min_tokens.
    tokens, _ = run(stop_token_ids=[reference[1]], min_tokens=3, ignore_eos=True)
    assert tokens[0] == reference[0] and len(tokens) >= 3 and reference[1] not in tokens[:3]


def test_seeds_repeat_whatever_else_is_in_the_batch() -> None:
    rows = prompts([6, 11, 3])
    params = SamplingParams(temperature=1.5, max_tokens=8, seed=7)
    (alone,) = tokens_of(llm(), rows[:1], params)
    batch = llm().generate(rows, [params, params.replace(seed=8), params.replace(seed=None)])
    assert list(batch[0].outputs[0].token_ids) == alone
    assert tokens_of(llm(), rows[:1], params.replace(seed=8))[0] != alone
    assert [out.prompt_token_ids for out in batch] == [tuple(row) for row in rows]


def test_generate_takes_one_prompt_or_none() -> None:
    assert llm().generate([], GREEDY) == []
    (row,) = prompts([5])
    (single,) = llm().generate(row, GREEDY)
    assert list(single.outputs[0].token_ids) == reference_generate("llama", [row], 8)[0]
    with pytest.raises(InputError, match="needs a tokenizer"):
        llm().generate("text", GREEDY)
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        llm().generate([row], GREEDY.replace(stop="x"))
    with pytest.raises(InputError, match="1 prompts but 2 sampling parameters"):
        llm().generate([row], [GREEDY, GREEDY])
    assert llmopt.explain(llm()).graphs[0].kind == "step"
