"""`llmopt.AsyncLLM` over a trained model: the outputs of `LLM`, as they come."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from models.gate import HANGS_AFTER_S, Gate, until
from models.target import PROMPT, target_llm, write_adapter, write_shallow

from llmopt import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    LoRARequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    explain,
)
from llmopt.beam_requests import BeamRequest
from llmopt.errors import AdapterError, EngineDeadError, InputError, OptionError
from llmopt.runtime.outputs import BeamSearchOutput
from llmopt.runtime.text import REPLACEMENT

PROMPTS = [PROMPT, "import os\nimport sys\n", "class Queue:\n    def __init__(self", "# ünï 🙂\n"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=12)
DELTA = RequestOutputKind.DELTA


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loads faster than the model compiles."""
    path = tmp_path_factory.mktemp("program") / "target.engine"
    target_llm().export(path)
    return path


@pytest.fixture(scope="module")
def engine(program: Path) -> Iterator[AsyncLLM]:
    found = AsyncLLM(program, max_num_seqs=8)
    yield found
    found.shutdown()
    core = found._engine.core
    core.scheduler.check_books()
    assert core.cache.pool.num_held == 0 and not core.has_unfinished


async def all_of(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


def test_many_at_once_equal_llm(engine: AsyncLLM) -> None:
    params = [
        GREEDY,
        GREEDY.replace(max_tokens=5),
        SamplingParams(temperature=1.8, seed=3, max_tokens=24),
        SamplingParams(temperature=1.2, seed=4, max_tokens=12, n=2, logprobs=1),
        GREEDY.replace(stop=["\n"]),
    ]
    cases = [(prompt, each) for prompt in PROMPTS for each in params]
    expected = target_llm().generate([prompt for prompt, _ in cases], [each for _, each in cases])

    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(all_of(engine.generate(prompt, each)) for prompt, each in cases))

    for want, got in zip(expected, asyncio.run(main()), strict=True):
        last = got[-1]
        assert (last.prompt, last.prompt_token_ids, last.finished) == (want.prompt, want.prompt_token_ids, True)
        for one, other in zip(last.outputs, want.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
                other.token_ids,
                other.text,
                other.finish_reason,
                other.stop_reason,
            )


def test_deltas_add_up_to_the_text(engine: AsyncLLM) -> None:
    params = SamplingParams(temperature=1.8, seed=3, max_tokens=40, output_kind=DELTA)
    for prompt in PROMPTS:
        (whole,) = target_llm().generate(prompt, params)
        parts = [output.outputs[0] for output in asyncio.run(all_of(engine.generate(prompt, params)))]
        assert "".join(part.text for part in parts) == whole.outputs[0].text
        assert sum((part.token_ids for part in parts), ()) == whole.outputs[0].token_ids
        assert all(REPLACEMENT not in part.text for part in parts[:-1])
        assert parts[-1].finish_reason == whole.outputs[0].finish_reason


def until_aborted(engine: AsyncLLM) -> None:
    """Lets no request of this engine end by itself: one that has 20 tokens waits for somebody to end it."""
    inner = engine._engine
    scheduler = inner.core.scheduler
    Gate(inner.core).hold_while(lambda: any(r.num_generated > 20 for r in scheduler.running) and not inner._cancelled)


def test_leaving_early_aborts(program: Path) -> None:
    """By break, by closing the generator, and by cancelling the task that reads it."""
    params = GREEDY.replace(max_tokens=200, ignore_eos=True)

    async def main() -> None:
        async with AsyncLLM(program) as engine:
            until_aborted(engine)
            async for _ in engine.generate(PROMPT, params):
                break
            outputs = engine.generate(PROMPT, params)
            await anext(outputs)
            await outputs.aclose()
            await until(lambda: engine.get_metrics().requests_aborted == 2)
            task = asyncio.create_task(all_of(engine.generate(PROMPT, params)))
            await until(lambda: engine.get_metrics().num_requests_running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            engine.generate(PROMPT, params)  # never begun: nothing happens
            await until(lambda: engine.get_metrics().requests_aborted == 3)
            metrics = engine.get_metrics()
            assert metrics.num_requests_running == metrics.num_requests_waiting == 0

    asyncio.run(main())


def test_abort_by_name(program: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(program) as engine:
            until_aborted(engine)
            outputs = engine.generate(PROMPT, GREEDY.replace(max_tokens=200, ignore_eos=True), "mine")
            first = await anext(outputs)
            assert first.request_id == "mine" and not first.finished
            await engine.abort(["mine", "nobody's"])
            rest = await all_of(outputs)
            assert rest[-1].outputs[0].finish_reason == "abort" and rest[-1].finished
            await engine.abort("mine")

    asyncio.run(main())


def test_chat_and_structured_output(engine: AsyncLLM) -> None:
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# {{ mood }}:"
    talk = [{"role": "user", "content": "write a queue"}]
    (expected,) = target_llm().chat(talk, GREEDY, chat_template=template, mood="glad")
    outputs = asyncio.run(all_of(engine.chat(talk, GREEDY, chat_template=template, mood="glad")))
    assert outputs[-1].outputs == expected.outputs and outputs[-1].prompt_token_ids == expected.prompt_token_ids
    choice = GREEDY.replace(structured_outputs=StructuredOutputsParams(choice=("yes", "no")))
    assert asyncio.run(all_of(engine.generate(PROMPT, choice)))[-1].outputs[0].text in ("yes", "no")
    with pytest.raises(InputError, match="no chat template"):
        asyncio.run(all_of(engine.chat(talk, GREEDY)))


def test_best_of_is_known_at_the_end(engine: AsyncLLM) -> None:
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=8, n=2, best_of=4)
    with pytest.raises(OptionError, match=r"output_kind.*best_of"):
        asyncio.run(all_of(engine.generate(PROMPT, params)))
    (output,) = asyncio.run(all_of(engine.generate(PROMPT, params.replace(output_kind=RequestOutputKind.FINAL_ONLY))))
    assert output.outputs == target_llm().generate(PROMPT, params)[0].outputs


def test_the_end_of_an_engine(program: Path) -> None:
    """`async with` ends it; one that nobody holds any more ends by itself."""

    async def main() -> AsyncLLM:
        async with AsyncLLM(program) as engine:
            await engine.check_health()
            assert engine.is_running and not engine.errored
            await all_of(engine.generate(PROMPT, GREEDY))
        with pytest.raises(EngineDeadError, match="was shut down"):
            await all_of(engine.generate(PROMPT, GREEDY))
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        engine.shutdown()
        assert not engine.is_running and not engine.errored
        return engine

    asyncio.run(main())

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("llmopt-")}

    before = threads()
    forgotten = AsyncLLM(program)
    asyncio.run(all_of(forgotten.generate(PROMPT, GREEDY)))
    del forgotten
    gc.collect()
    asyncio.run(until(lambda: threads() <= before))


def test_beams_beside_other_requests(engine: AsyncLLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=20)
    begun, cancelled = threading.Event(), threading.Event()
    step = BeamRequest.advance

    def advance(search: BeamRequest) -> bool:
        """Ends its first step when nobody waits for it any more."""
        more = step(search)
        begun.set()
        cancelled.wait(HANGS_AFTER_S)
        return more

    async def main() -> tuple[list[BeamSearchOutput], list[RequestOutput]]:
        other = asyncio.create_task(all_of(engine.generate(PROMPT, GREEDY)))
        beams = await asyncio.gather(*(engine.beam_search(prompt, params) for prompt in PROMPTS))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BeamRequest, "advance", advance)
            lost = asyncio.create_task(engine.beam_search(PROMPT, params))
            await until(begun.is_set)
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            cancelled.set()
        for bad in (PROMPT * 200, [], [1, -1]):
            with pytest.raises(InputError):
                await engine.beam_search(bad, params)
        with pytest.raises(InputError, match="BeamSearchParams"):
            await engine.beam_search(PROMPT, GREEDY)  # type: ignore[arg-type]
        return beams, await other

    beams, other = asyncio.run(main())
    assert beams == target_llm().beam_search(PROMPTS, params)
    assert other[-1].outputs[0].token_ids == target_llm().generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def test_no_beams_after_shutdown(program: Path) -> None:
    engine = AsyncLLM(program)
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        asyncio.run(engine.beam_search(PROMPT, BeamSearchParams(beam_width=2)))


def test_an_adapter_for_one_request_of_several(tmp_path: Path) -> None:
    folder = write_shallow(tmp_path / "target")
    adapter = write_adapter(tmp_path / "adapter", base=folder)

    async def main() -> tuple[list[list[RequestOutput]], BeamSearchOutput]:
        async with AsyncLLM(folder, dtype="float32", enable_lora=True) as engine:
            with pytest.raises(AdapterError):
                await all_of(engine.generate(PROMPT, GREEDY, lora_request=LoRARequest("b", tmp_path / "missing")))
            assert await engine.list_loras() == set()
            assert await engine.add_lora(adapter) and not await engine.add_lora(adapter)
            assert await engine.list_loras() == {adapter.lora_name}
            assert await engine.remove_lora(adapter.lora_name) and not await engine.remove_lora(adapter.lora_name)
            assert engine.options.enable_lora and engine.vocab_size == 4096
            report = explain(engine, html=tmp_path / "page.html")
            assert [graph.kind for graph in report.graphs] == ["step"]
            assert "LlamaForCausalLM - llmopt" in (tmp_path / "page.html").read_text("utf-8")
            each = (None, adapter, None)
            outputs = await asyncio.gather(*(all_of(engine.generate(PROMPT, GREEDY, lora_request=a)) for a in each))
            return outputs, await engine.beam_search(PROMPT, BEAMS, lora_request=adapter)

    found, beams = asyncio.run(main())
    base, adapted, again = (outputs[-1].outputs[0].token_ids for outputs in found)
    assert base == again == LLM(folder, dtype="float32").generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    llm = LLM(folder, dtype="float32", enable_lora=True)
    assert adapted == llm.generate(PROMPT, GREEDY, lora_request=adapter)[0].outputs[0].token_ids != base
    assert [beams] == llm.beam_search(PROMPT, BEAMS, lora_request=adapter) != llm.beam_search(PROMPT, BEAMS)
