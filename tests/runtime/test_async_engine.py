"""The engine behind event loops: the same tokens whatever arrives when, ends in every phase, and nothing left over."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from models.gate import HANGS_AFTER_S, Gate, until
from models.zoo import build, prompts, reference_generate

from llmopt import RequestOutput, RequestOutputKind, SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.errors import EngineDeadError, InputError, QueueFullError, RequestError
from llmopt.runtime.async_engine import AsyncEngine, _Stop
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import Job, SequenceGroup
from llmopt.runtime.output_stream import OutputStream, is_last
from llmopt.runtime.request import Request
from llmopt.runtime.snapshot import Delta

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG = GREEDY.replace(max_tokens=40)


@functools.cache
def model() -> ModelEngine:
    return ModelEngine(build("llama"), Options.make({"block_size": 4, "fallback": "error"}), Report())


def core_of(num_blocks: int = 0, **options: Any) -> EngineCore:
    """An engine over pages full of NaN: nothing may be read that was not written."""
    program = model().program()
    if num_blocks:
        options["kv_cache_memory_bytes"] = num_blocks * program.bytes_per_block()
    core = EngineCore(program, model().info, Options.make({"block_size": 4, **options}), 64)
    for tensor in core.cache.tensors:
        tensor.fill_(float("nan"))
    step = core.step

    def paced() -> list[Request]:
        time.sleep(0.002)  # so that all is not over before the loop has looked at it, as it may be with a tiny model
        return step()

    core.step = paced  # type: ignore[method-assign]
    return core


@asynccontextmanager
async def running(core: EngineCore) -> AsyncIterator[AsyncEngine]:
    """An engine that must leave nothing behind."""
    engine = AsyncEngine(core)
    try:
        yield engine
        await until(lambda: not engine._streams and not core.has_unfinished)
    finally:
        await asyncio.to_thread(engine.shutdown)
    assert_idle(engine)


def assert_idle(engine: AsyncEngine) -> None:
    engine.core.scheduler.check_books()
    assert engine.core.cache.pool.num_held == 0 and not engine.core.has_unfinished
    assert not (engine._streams or engine._pending or engine._growing or engine._cancelled or engine._changed)
    assert not engine._stepper.is_alive() and not engine._writer.is_alive()


async def outputs_of(stream: OutputStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def last_of(stream: OutputStream) -> RequestOutput:
    return (await outputs_of(stream))[-1]


def num_generated(stream: OutputStream) -> int:
    """Tokens of a stream's first continuation."""
    sequences = stream.group.sequences
    return sequences[0].request.num_generated if sequences else 0


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in an event loop of its own, and fails it when it hangs."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), 2 * HANGS_AFTER_S))

    return run


# ---- the same tokens -----------------------------------------------------------------------------------------------


@in_loop
async def test_random_arrivals_give_the_tokens_of_transformers() -> None:
    """Many at once, partly alike, of several priorities, in a pool that is too small for them."""
    chance = random.Random(3)
    rows = prompts([chance.randint(1, 30) for _ in range(30)], seed=5)
    rows[20:24] = [rows[0][:8] + row[:6] for row in rows[20:24]]
    params = GREEDY.replace(max_tokens=20)
    core = core_of(14, max_num_seqs=6, max_num_batched_tokens=16)
    async with running(core) as engine:

        async def serve(row: list[int]) -> list[RequestOutput]:
            await asyncio.sleep(chance.random() * 0.1)
            return await outputs_of(engine.submit(Job(row, params, priority=chance.randint(0, 2))))

        answers = await asyncio.gather(*map(serve, rows))
        metrics = engine.metrics()
    for seen, expected in zip(answers, reference_generate("llama", rows, 20), strict=True):
        assert tokens(seen[-1]) == expected
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
        for earlier, later in itertools.pairwise(seen):
            assert tokens(later)[: len(tokens(earlier))] == tokens(earlier)
    assert metrics.requests_finished == 30 and metrics.num_preemptions > 0
    assert metrics.num_requests_running == metrics.num_requests_waiting == 0


@in_loop
async def test_several_continuations_and_kinds_of_output() -> None:
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=8, n=3, logprobs=2, prompt_logprobs=1)
    (row,) = prompts([9])
    async with running(core_of()) as engine:
        whole = await last_of(engine.submit(Job(row, params)))
        parts = await outputs_of(engine.submit(Job(row, params.replace(output_kind=RequestOutputKind.DELTA))))
        final = await outputs_of(engine.submit(Job(row, params.replace(output_kind=RequestOutputKind.FINAL_ONLY))))
    assert len({completion.token_ids for completion in whole.outputs}) == 3
    assert len(final) == 1 and final[0].finished and final[0].outputs == whole.outputs
    assert [part.prompt_logprobs is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    for completion in whole.outputs:
        mine = [c for part in parts for c in part.outputs if c.index == completion.index]
        assert sum((c.token_ids for c in mine), ()) == completion.token_ids
        assert sum((c.logprobs or () for c in mine), ()) == completion.logprobs
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
        assert all(c.token_ids for c in mine)


class Watched(list[Any]):
    """Counts the entries that are read of it."""

    num_read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.num_read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Iterator[Any]:
        self.num_read += len(self)
        return super().__iter__()


def test_news_cost_what_is_new() -> None:
    core = core_of()
    group = SequenceGroup(core, Job([1, 2, 3], LONG.replace(logprobs=1, prompt_logprobs=1)))
    request, delta, seen = group.start(deque()), Delta(), []
    while core.has_unfinished:
        core.step()
        request.tokens, request.logprobs = lists = Watched(request.tokens), Watched(request.logprobs)
        request.prompt_logprobs = prompt = Watched(request.prompt_logprobs)
        snapshot = group.snapshot()
        part = delta(snapshot)
        assert part is not None and sum(each.num_read for each in (*lists, prompt)) <= 4 + 3 * (not seen)
        seen.append(part.outputs[0])
    whole = group.output().outputs[0]
    assert sum((part.token_ids for part in seen), ()) == whole.token_ids == tuple(request.generated)
    assert sum((part.logprobs or () for part in seen), ()) == whole.logprobs
    assert seen[-1].cumulative_logprob == pytest.approx(sum(value for value, _ in request.logprobs))


@in_loop
async def test_several_loops_share_an_engine() -> None:
    rows = prompts([9, 17, 5, 12])
    async with running(core_of(max_num_seqs=2)) as engine:

        def serve(row: list[int]) -> list[int]:
            async def main() -> list[int]:
                first, second = await asyncio.gather(*(last_of(engine.submit(Job(row, GREEDY))) for _ in range(2)))
                assert tokens(first) == tokens(second)
                return tokens(first)

            return asyncio.run(main())

        answers = await asyncio.gather(*(asyncio.to_thread(serve, row) for row in rows))
        assert list(answers) == reference_generate("llama", rows, 8)
        await until(lambda: not len(engine._mailboxes))  # loops that have ended are forgotten


@in_loop
async def test_a_slow_consumer_gets_several_steps_as_one() -> None:
    (row,) = prompts([9])
    core = core_of()
    gate = Gate(core)
    async with running(core) as engine:
        for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA):
            gate.close()
            stream = engine.submit(Job(row, LONG.replace(output_kind=kind)))
            gate.hold_while(lambda: num_generated(stream) > 2)
            first = await anext(stream)
            gate.open()
            # Not only until all is computed: the end must have been delivered.
            await until(lambda: stream._ended)
            (rest,) = await outputs_of(stream)  # what was not fetched waits as one output
            given = tokens(first) + tokens(rest) if kind is RequestOutputKind.DELTA else tokens(rest)
            assert given == reference_generate("llama", [row], 40)[0]


@in_loop
async def test_a_loop_that_is_blocked_collects_one_output_for_each_stream() -> None:
    (row,) = prompts([9])
    core = core_of()
    gate = Gate(core)
    async with running(core) as engine:
        gate.close()
        stream = engine.submit(Job(row, LONG))
        gate.hold_while(lambda: num_generated(stream) > 2)
        await anext(stream)
        gate.open()
        deadline = time.monotonic() + HANGS_AFTER_S
        while not is_last(stream.mailbox._waiting.get(stream)):
            assert time.monotonic() < deadline
            time.sleep(0.005)  # the loop does nothing meanwhile
        assert len(stream.mailbox._waiting) == 1
        (rest,) = await outputs_of(stream)
        assert tokens(rest) == reference_generate("llama", [row], 40)[0]


@in_loop
async def test_one_wake_up_for_all_requests_of_a_step() -> None:
    rows = prompts([5] * 8)
    async with running(core_of(max_num_seqs=8)) as engine:
        loop, calls = asyncio.get_running_loop(), 0
        original = loop.call_soon_threadsafe

        def counted(*arguments: Any, **more: Any) -> asyncio.Handle:
            nonlocal calls
            calls += threading.current_thread() is engine._writer
            return original(*arguments, **more)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        steps = engine.core.program.num_steps
        await asyncio.gather(*(last_of(engine.submit(Job(row, LONG))) for row in rows))
        steps = engine.core.program.num_steps - steps
    assert 0 < calls <= steps


# ---- ends ----------------------------------------------------------------------------------------------------------


# What holds as soon as a request of 20 tokens, which are computed in steps of at most 8, is in a phase.
PHASES: dict[str, Callable[[OutputStream], bool]] = {
    "arrived": lambda stream: True,
    "queued": lambda stream: bool(stream.group.sequences),
    "prefill": lambda stream: bool(stream.group.sequences) and stream.group.sequences[0].request.num_computed > 0,
    "decode": lambda stream: num_generated(stream) > 2,
    "preempted": lambda stream: num_generated(stream) > 2,
    "forked": lambda stream: len(stream.group.sequences) == 3,
    "finished": lambda stream: bool(stream.group.sequences) and stream.group.sequences[0].request.published[1],
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["abort", "close", "cancel"])
@in_loop
async def test_requests_end_in_every_phase(phase: str, how: str) -> None:
    """The victim ends, in a phase in which the engine is held, and its neighbour does not notice."""
    neighbour, row = prompts([7, 20])
    core = core_of(max_num_seqs=1 if phase == "queued" else 4, max_num_batched_tokens=8)
    gate = Gate(core)
    async with running(core) as engine:
        gate.close()
        other = asyncio.create_task(last_of(engine.submit(Job(neighbour, LONG))))
        await until(lambda: gate.holds)
        params = {
            "forked": SamplingParams(temperature=1.5, seed=1, max_tokens=40, n=3),
            "finished": GREEDY,  # while its neighbour runs
        }.get(phase, LONG)
        stream = engine.submit(Job(row, params, request_id="victim"))
        reader = asyncio.create_task(outputs_of(stream))
        gate.hold_while(lambda: PHASES[phase](stream))
        await until(lambda: gate.holds)
        sequences = stream.group.sequences
        if phase == "arrived":
            assert stream in engine._pending and not sequences
        elif phase == "queued":
            assert core.scheduler.num_waiting == 1
        elif phase == "prefill":
            assert 0 < sequences[0].request.num_computed < len(row)
        elif phase == "preempted":
            with core._lock:
                core.scheduler.preempt(sequences[0].request)
        if how == "abort":
            engine.abort("victim")
        elif how == "close":
            stream.close()
            stream.close()
            reader.cancel()
        else:
            reader.cancel()
            stream.close()
        gate.open()
        if how == "abort":
            seen = await reader
            assert seen[-1].finished
            reasons = {completion.finish_reason for completion in seen[-1].outputs}
            assert reasons == {"length" if phase == "finished" else "abort"}
        assert tokens(await other) == reference_generate("llama", [neighbour], 40)[0]
        # The name is free again.
        await until(lambda: "victim" not in engine._streams)
        again = await last_of(engine.submit(Job(row, GREEDY, request_id="victim")))
        assert again.request_id == "victim"
        assert tokens(again) == reference_generate("llama", [row], 8)[0]


@in_loop
async def test_a_full_queue_is_said_at_once() -> None:
    rows = prompts([3] * 5)
    core = core_of(max_num_queued=2, max_num_seqs=1)
    gate = Gate(core)
    async with running(core) as engine:
        gate.close()
        steps = core.program.num_steps
        streams = [engine.submit(Job(rows[0], GREEDY))]
        await until(lambda: gate.holds)
        streams.append(engine.submit(Job(rows[1], GREEDY)))
        with pytest.raises(QueueFullError, match="2 requests wait, max_num_queued is 2"):
            engine.submit(Job(rows[2], GREEDY))
        assert gate.holds and core.program.num_steps == steps, "without waiting for the step"
        assert engine.metrics().num_requests_waiting == 2
        gate.open()
        answers = await asyncio.gather(*map(last_of, streams))
        assert [*map(tokens, answers)] == reference_generate("llama", rows[:2], 8)
        assert tokens(await last_of(engine.submit(Job(rows[2], GREEDY)))) == reference_generate("llama", rows, 8)[2]


@in_loop
async def test_more_continuations_than_the_queue_holds() -> None:
    (row,) = prompts([9])
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=6, n=12)
    async with running(core_of(max_num_queued=2, max_num_seqs=2)) as engine:
        output = await last_of(engine.submit(Job(row, params)))
    assert [completion.finish_reason for completion in output.outputs] == ["length"] * 12


@in_loop
async def test_what_cannot_be_served_is_said_at_once() -> None:
    core = core_of(num_blocks=6)
    gate = Gate(core)
    async with running(core) as engine:
        gate.close()
        stream = engine.submit(Job([1, 2, 3], GREEDY, request_id="a"))
        for job, message in (
            (Job([], GREEDY), "empty"),
            (Job([1, -1], GREEDY), "token id -1"),
            (Job([1] * 64, GREEDY), "64 tokens"),
            (Job([1] * 20, GREEDY), "do not fit into the KV cache"),
            (Job([1], GREEDY, priority=1 << 40), "priority"),
            (Job([1], GREEDY, cache_salt=""), "cache_salt"),
            (Job([1], GREEDY, request_id="a"), "'a' has not finished"),
            (Job([1], GREEDY, request_id=""), "request_id must be"),
            (Job([1], GREEDY, request_id=3), "request_id must be"),  # type: ignore[arg-type]
        ):
            with pytest.raises(InputError, match=message):
                engine.submit(job)
        assert engine.metrics().num_steps == core.program.num_steps
        gate.open()
        assert tokens(await last_of(stream)) == reference_generate("llama", [[1, 2, 3]], 8)[0]


# ---- failures ------------------------------------------------------------------------------------------------------


@in_loop
async def test_a_failing_request_ends_alone() -> None:
    """In a step, where it is started, and where its output is made."""
    rows = prompts([9, 6, 30, 7, 5])
    core = core_of()
    program = core.program

    def evil(batch: Any, cache: Any, **more: Any) -> torch.Tensor:
        logits = program(batch, cache, **more).clone()  # the program has looked at its own already
        logits[batch.seq_lens == 32] = float("nan")  # the third row, with two tokens of its own
        return logits

    core.program = evil  # type: ignore[assignment]

    class Codec:
        def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
            raise OverflowError("an evil tokenizer")

    def broken(outbox: Any) -> Request:
        raise ZeroDivisionError("cannot start")

    async with running(core) as engine:
        good = [asyncio.create_task(last_of(engine.submit(Job(row, GREEDY)))) for row in rows[:2]]
        bad = asyncio.create_task(last_of(engine.submit(Job(rows[2], GREEDY))))
        mute = engine.submit(Job(rows[3][:3], GREEDY, codec=Codec()))  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="an evil tokenizer") as caught:
            await outputs_of(mute)
        assert isinstance(caught.value.__cause__, OverflowError)
        with engine._wake:
            unborn = engine.submit(Job(rows[4][:2], GREEDY))
            unborn.group.start = broken  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await outputs_of(unborn)
        assert [tokens(await task) for task in good] == reference_generate("llama", rows[:2], 8)
        (completion,) = (await bad).outputs
        assert completion.finish_reason == "error" and "NaN" in str(completion.error)
        assert len(completion.token_ids) == 2
        assert engine.is_running


@pytest.mark.parametrize("culprit", ["steps", "outputs"])
@in_loop
async def test_the_death_of_the_engine_reaches_everybody(culprit: str) -> None:
    """Those that run, those that wait, and those that come later; also on another loop."""
    rows = prompts([9, 6, 11])
    core = core_of(max_num_seqs=2, max_num_queued=4)
    engine = AsyncEngine(core)

    def serve_elsewhere() -> None:
        with pytest.raises(EngineDeadError):
            asyncio.run(outputs_wrapped())

    async def outputs_wrapped() -> None:
        await outputs_of(engine.submit(Job(rows[0], GREEDY.replace(max_tokens=None))))

    gate = Gate(core)
    gate.close()
    tasks = [asyncio.create_task(outputs_of(engine.submit(Job(row, GREEDY)))) for row in rows]
    other = asyncio.create_task(asyncio.to_thread(serve_elsewhere))
    await until(lambda: len(engine._streams) == 4)

    def evil(*arguments: Any) -> Any:
        raise MemoryError("an evil day")

    if culprit == "steps":
        core.scheduler.commit = evil  # type: ignore[method-assign]
    else:
        engine._outcome = evil  # type: ignore[method-assign]
    gate.open()
    for task in tasks:
        with pytest.raises(EngineDeadError, match="MemoryError: an evil day") as caught:
            await task
        assert isinstance(caught.value.__cause__, MemoryError)
    await other
    assert not engine.is_running and isinstance(engine.error, MemoryError)
    with pytest.raises(EngineDeadError, match="an evil day"):
        engine.submit(Job(rows[0], GREEDY))
    await asyncio.to_thread(engine.shutdown)
    assert_idle(engine)


# ---- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain", [False, True])
@in_loop
async def test_shutdown_under_load(drain: bool) -> None:
    rows = prompts([5] * 12)
    core = core_of(max_num_seqs=2)
    gate = Gate(core)
    gate.hold_while(lambda: core.metrics().requests_finished > 2)
    engine = AsyncEngine(core)
    params = [GREEDY] * 12 if drain else [GREEDY] * 4 + [LONG] * 8
    jobs = [Job(row, each) for row, each in zip(rows, params, strict=True)]
    tasks = [asyncio.create_task(last_of(engine.submit(job))) for job in jobs]
    await until(lambda: gate.holds)
    ends = [asyncio.create_task(asyncio.to_thread(engine.shutdown, drain=drain)) for _ in range(3)]
    await until(lambda: engine._stop is (_Stop.DRAIN if drain else _Stop.ABORT))
    gate.open()
    await asyncio.gather(*ends)
    assert_idle(engine)
    with pytest.raises(EngineDeadError, match="was shut down"):
        engine.submit(Job(rows[0], GREEDY))
    assert not engine.is_running and engine.error is None
    answers = [await task for task in tasks]
    reasons = [answer.outputs[0].finish_reason for answer in answers]
    assert all(answer.finished for answer in answers)
    if drain:
        assert reasons == ["length"] * 12
        assert [*map(tokens, answers)] == reference_generate("llama", rows, 8)
    else:
        assert set(reasons) == {"length", "abort"}
    engine.shutdown()


@in_loop
async def test_draining_has_an_end() -> None:
    core = core_of()
    gate = Gate(core)
    gate.close()
    engine = AsyncEngine(core)
    task = asyncio.create_task(last_of(engine.submit(Job([1, 2], LONG))))
    await until(lambda: gate.holds)
    end = asyncio.create_task(asyncio.to_thread(engine.shutdown, drain=True, timeout=0.05))
    await until(lambda: engine._stop is _Stop.ABORT)
    gate.open()
    await end
    assert (await task).outputs[0].finish_reason == "abort"
    assert_idle(engine)


@in_loop
async def test_a_closed_loop_ends_its_requests() -> None:
    core = core_of()
    gate = Gate(core)
    gate.close()
    engine = AsyncEngine(core)

    async def leave() -> OutputStream:
        return engine.submit(Job([1, 2, 3], LONG))

    stream = await asyncio.to_thread(asyncio.run, leave())
    # It cannot end before somebody has noticed.
    gate.hold_while(lambda: num_generated(stream) > 2 and not engine._cancelled)
    await until(lambda: not core.has_unfinished and not engine._streams)
    assert core.metrics().requests_aborted == 1
    await asyncio.to_thread(engine.shutdown)
    assert_idle(engine)


@in_loop
async def test_requests_leave_no_objects_behind() -> None:
    rows = prompts([5] * 6)
    others = [thing for thing in gc.get_objects() if type(thing) is OutputStream]  # of a test that failed

    def left() -> list[Any]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is OutputStream and thing not in others]

    async with running(core_of()) as engine:

        async def use() -> None:
            streams = [engine.submit(Job(row, GREEDY)) for row in rows]
            for stream in streams[:3]:
                stream.close()
            await asyncio.gather(*map(last_of, streams[3:]))

        await use()
        # Not at once: the writing thread may still have an end in its hands.
        await until(lambda: not left())
