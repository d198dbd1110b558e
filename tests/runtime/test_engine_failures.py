"""Failures of the engine stay alone, and what cannot be served is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.cores import GREEDY, MAX_LEN, core_of, finish, llm
from models.zoo import VOCABULARY, prompts, reference_generate

import llmopt
from llmopt import SamplingParams
from llmopt.errors import InputError, QueueFullError, RequestError
from llmopt.runtime.engine_core import MAX_SALT_LENGTH
from llmopt.runtime.generation import Job, run_jobs
from llmopt.runtime.request import Request
from llmopt.runtime.sampling import SamplingState
from llmopt.runtime.step_program import StepBatch, StepProgram

# ---- failures stay alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", ["decode", "prefill"])
def test_nan_fails_one_request_and_its_pages_are_forgotten(during: str) -> None:
    core = core_of(max_num_batched_tokens=8 if during == "prefill" else 64)
    rows = prompts([30, 6, 11])
    requests = [core.add_request(row, GREEDY) for row in rows]
    for _ in range(2):
        core.step()
    bad = requests[0]
    assert (bad.num_computed < bad.num_prompt) == (during == "prefill")
    for tensor in core.cache.tensors:
        tensor[bad.tables[0].held[0]] = float("nan")
    finish(core)
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, llmopt.errors.RequestError)
    assert "not finite" in str(bad.error) or "NaN" in str(bad.error)
    assert [request.generated for request in requests[1:]] == reference_generate("llama", rows[1:], 8)
    # The same prompt again finds nothing, and is served.
    again = core.add_request(rows[0], GREEDY)
    finish(core)
    assert again.num_hit == 0
    assert [again.generated] == reference_generate("llama", rows[:1], 8)
    assert core.metrics().requests_failed == 1


def test_an_exception_in_a_step_fails_whom_it_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of()
    rows = prompts([9, 6, 11])
    requests = [core.add_request(row, GREEDY) for row in rows]
    core.step()
    program, bad = core.program, requests[1]

    def evil(batch: StepBatch, cache: Any, *, lend: bool) -> torch.Tensor:
        if bad.seat >= 0 and bad.num_generated > 3 and any(batch.seq_lens == bad.num_computed + 1):
            raise ValueError("an evil forward")
        return program(batch, cache)

    monkeypatch.setattr(core, "program", evil)
    finish(core)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert isinstance(bad.error, RequestError) and isinstance(bad.error.__cause__, ValueError)
    reference = reference_generate("llama", rows, 8)
    assert [requests[0].generated, requests[2].generated] == [reference[0], reference[2]]
    assert bad.generated == reference[1][:4]


def test_a_fault_of_the_sampler_fails_whom_it_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others draw the numbers that they would have drawn."""
    rows = prompts([9, 6, 11])
    params = SamplingParams(temperature=1.5, max_tokens=8)

    def run(during: str) -> list[Request]:
        core = core_of()
        requests = [core.add_request(row, params.replace(seed=seed)) for seed, row in enumerate(rows)]
        bad = requests[1].sampling_state

        def uniform(state: SamplingState) -> float:
            if state is bad and during == "draw" and len(bad.generated) == 3:
                raise ValueError("an evil draw")
            return draw(state)

        def accept(state: SamplingState, token: int) -> None:
            if state is bad and during == "accept" and len(bad.generated) == 3:
                raise ValueError("an evil grammar")
            take(state, token)

        draw, take = SamplingState.uniform, SamplingState.accept
        with monkeypatch.context() as patch:
            patch.setattr(SamplingState, "uniform", uniform)
            patch.setattr(SamplingState, "accept", accept)
            finish(core)
        return requests

    expected = run("never")
    for during in ("draw", "accept"):
        found = run(during)
        assert [request.finish_reason for request in found] == ["length", "error", "length"]
        assert "evil" in str(found[1].error)
        assert [found[i].generated for i in (0, 2)] == [expected[i].generated for i in (0, 2)]
        assert found[1].generated == expected[1].generated[:3]


def test_an_interrupt_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of()
    rows = prompts([9, 6])
    requests = [core.add_request(row, GREEDY) for row in rows]
    core.step()
    with monkeypatch.context() as patch:
        patch.setattr(StepProgram, "__call__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            core.step()
    finish(core)
    assert [request.generated for request in requests] == reference_generate("llama", rows, 8)


def test_a_failure_in_generate_is_reported_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm()
    run, rows = StepProgram.__call__, prompts([9, 12])

    def evil(program: StepProgram, batch: StepBatch, cache: Any, **_: Any) -> torch.Tensor:
        logits = run(program, batch, cache)
        logits[batch.seq_lens == 11] = float("nan")
        return logits

    monkeypatch.setattr(StepProgram, "__call__", evil)
    first, second = model.generate(rows, GREEDY)
    assert (first.outputs[0].finish_reason, second.outputs[0].finish_reason) == ("error", "length")
    assert first.outputs[0].error is not None and len(first.outputs[0].token_ids) == 2
    chunks = list(model.stream(rows[:1], GREEDY))
    assert [chunk.token_id is None for chunk in chunks] == [False, False, True]
    assert chunks[-1].finish_reason == "error"


# ---- refused before any work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCABULARY], rf"token id {VOCABULARY} is not in 0..{VOCABULARY - 1}"),
        ([3, -1], "token id -1"),
        ([1.5], "token id 1.5"),
        ([True], "token id True"),
        ([5] * MAX_LEN, f"the prompt has {MAX_LEN} tokens; the longest sequence is {MAX_LEN}"),
    ],
)
def test_a_bad_prompt_stops_everything_before_any_work(prompt: list[int], message: str) -> None:
    """The good prompt before it is not run either."""
    steps = llm().get_metrics().num_steps
    with pytest.raises(InputError, match=message):
        llm().generate([[1, 2, 3], prompt], GREEDY)
    assert llm().get_metrics().num_steps == steps
    assert llm().get_metrics().num_requests_waiting == 0


def test_bad_fields_of_a_request() -> None:
    core = core_of(max_num_queued=1)
    for salt in ("", "x" * (MAX_SALT_LENGTH + 1), 5, b"x"):
        with pytest.raises(InputError, match="cache_salt must be a text"):
            core.add_request([1], GREEDY, cache_salt=salt)  # type: ignore[arg-type]
    for priority in (1.5, True, 1 << 31, "high"):
        with pytest.raises(InputError, match="priority must be"):
            core.add_request([1], GREEDY, priority=priority)  # type: ignore[arg-type]
    request = core.add_request([1], GREEDY, request_id="a", cache_salt="\ud800")
    with pytest.raises(InputError, match="'a' has not finished"):
        core.add_request([1], GREEDY, request_id="a")
    with pytest.raises(QueueFullError, match="max_num_queued is 1"):
        core.add_request([1], GREEDY)
    finish(core)
    assert request.finish_reason == "length"
    with pytest.raises(InputError, match="1 prompts but 2 priorities"):
        llm().generate([[1]], GREEDY, priority=[1, 2])


def test_a_cache_that_is_too_small_is_named_before_any_work() -> None:
    core = core_of(num_blocks=5)
    with pytest.raises(InputError, match=r"21 tokens do not fit into the KV cache of 20; raise kv_cache_memory_bytes"):
        run_jobs(core, [Job([1, 2], GREEDY), Job([3] * 13, GREEDY)])
    assert not core.has_unfinished
    rows = prompts([12, 12, 1, 5])
    updates = list(run_jobs(core, [Job(row, GREEDY) for row in rows]))
    last = {update.index: update.request.generated for update in updates if update.is_last}
    assert [last[i] for i in range(4)] == reference_generate("llama", rows, 8)
    assert core.cache.num_free == 5
