"""Bad input through every door: a typed error before any work, and an engine that goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.target import PROMPT, target_llm
from typer.testing import CliRunner

from llmopt import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from llmopt.cli import app
from llmopt.errors import InputError, OptionError
from llmopt.runtime.engine_core import EngineCore

VOCABULARY = 4096
POOL = 8 * 16  # tokens
CONTEXT = 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "target.engine"
    target_llm().export(path)
    return path


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """A pool that is smaller than the context."""
    return {"kv_cache_memory_bytes": POOL // 16 * target_llm()._engine_core(fresh=False).program.bytes_per_block()}


@pytest.fixture(scope="module")
def llm(program: Path, options: dict[str, Any]) -> LLM:
    return LLM(program, **options)


@pytest.fixture(scope="module")
def async_llm(program: Path, options: dict[str, Any]) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(program, **options)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    return target_llm().generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def structured(**wanted: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(**wanted)}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# What is wrong, the prompt, the sampling parameters (made late: most are refused right there), and what is said.
Case = tuple[str, Any, Callable[[], dict[str, Any]], type[Exception], str]

CASES: list[Case] = [
    ("no tokens", [], dict, InputError, "empty"),
    ("a text beyond the context", "x = 1\n" * 3000, dict, InputError, f"longest sequence is {CONTEXT}"),
    ("tokens beyond the context", [5] * CONTEXT, dict, InputError, f"longest sequence is {CONTEXT}"),
    ("a prompt beyond the pool", [5] * 150, dict, InputError, f"do not fit into the KV cache of {POOL}"),
    ("an output beyond the pool", [5], lambda: {"max_tokens": 200}, InputError, "lower max_tokens"),
    ("an output without end", [5], lambda: {"max_tokens": None}, InputError, "do not fit into the KV cache"),
    ("a negative token", [1, -1], dict, InputError, "token id -1"),
    ("a token beyond the vocabulary", [VOCABULARY], dict, InputError, f"0..{VOCABULARY - 1}"),
    ("an enormous token", [1 << 70], dict, InputError, "token id"),
    ("a fraction as token", [1, 1.5], dict, InputError, "token id 1.5"),
    ("a truth as token", [True], dict, InputError, "token id True"),
    ("nothing as token", [1, None], dict, InputError, "token id None"),
    ("half a character", "a\ud800b", dict, InputError, "surrogate"),
    ("a dictionary without a prompt", {"text": "x"}, dict, InputError, "one key of"),
    ("bytes as token", [b"import"], dict, InputError, "token id b'import'"),
    ("a number as prompt", 3.5, dict, InputError, "prompt"),
    ("a set of tokens", {5, 6}, dict, InputError, "list of token ids, got {5, 6}"),
    ("a table of tokens", torch.ones((2, 3), dtype=torch.int64), dict, InputError, r"are \[S\], got \[2, 3\]"),
    *(
        (f"{name} = {bad!r:.20}", PROMPT, lambda name=name, bad=bad: {name: bad}, OptionError, name)
        for name, values in {
            "max_tokens": (-1, 0, 1 << 62),
            "n": (-1, 0, 10**6),
            "best_of": (0, 10**6),
            "logprobs": (-1, 10**6),
            "prompt_logprobs": (-1, 10**6),
            "temperature": (math.nan, -1),
            "stop_token_ids": ([VOCABULARY], [-1]),
            "allowed_token_ids": ([VOCABULARY], []),
            "logit_bias": ({VOCABULARY: 1.0},),
        }.items()
        for bad in values
    ),
    ("n greedy", PROMPT, lambda: {"n": 2, "temperature": 0}, OptionError, "greedy"),
    ("min beyond max", PROMPT, lambda: {"min_tokens": 9, "max_tokens": 8}, OptionError, "min_tokens"),
    ("fewer than n", PROMPT, lambda: {"n": 3, "best_of": 2}, OptionError, "best_of"),
    ("two structures", PROMPT, lambda: structured(regex="a", choice=("b",)), OptionError, "exactly one"),
    ("an endless structure", PROMPT, lambda: {"ignore_eos": True, **structured(regex="a")}, OptionError, "ignore_eos"),
    ("an open group", PROMPT, lambda: structured(regex="("), OptionError, "regex"),
    ("look-ahead", PROMPT, lambda: structured(regex="(?=a)b"), OptionError, "regex"),
    ("explosive counts", PROMPT, lambda: structured(regex="((a{1000}){1000}){1000}"), OptionError, "repetitions"),
    ("a deep regex", PROMPT, lambda: structured(regex="(" * 500 + "a" + ")" * 500), OptionError, "deep"),
    ("a long regex", PROMPT, lambda: structured(regex="a" * 100_000), OptionError, "characters"),
    ("a broken schema", PROMPT, lambda: structured(json="{"), OptionError, "JSON schema"),
    ("a schema of a number", PROMPT, lambda: structured(json="3"), OptionError, "JSON schema"),
    ("an unknown type", PROMPT, lambda: structured(json={"type": "nothing"}), OptionError, "json"),
    ("a deep schema", PROMPT, lambda: structured(json=nested(500)), OptionError, "json"),
    (
        "an explosive pattern in a schema",
        PROMPT,
        lambda: structured(json={"type": "string", "pattern": "((a{1000}){1000}){1000}"}),
        OptionError,
        "repetitions",
    ),
    ("no grammar", PROMPT, lambda: structured(grammar="start: ((("), OptionError, "grammar"),
]
EVERY_CASE = pytest.mark.parametrize(
    ("prompt", "params", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


def check_untouched(core: EngineCore, steps: int) -> None:
    """No step was taken, nothing waits, and no page is held."""
    assert core.program.num_steps == steps
    assert not core.has_unfinished and core.cache.pool.num_held == 0
    core.scheduler.check_books()


@EVERY_CASE
def test_llm(
    llm: LLM, prompt: Any, params: Callable[[], dict[str, Any]], error: type[Exception], message: str, expected: Any
) -> None:
    core = llm._engine_core()
    steps = core.program.num_steps
    prompts = prompt if isinstance(prompt, float | dict) else [PROMPT, prompt]
    for door in (llm.generate, lambda *given: list(llm.stream(*given))):
        with pytest.raises(error, match=message):
            door(prompts, SamplingParams(**{"max_tokens": 8, **params()}))
        check_untouched(core, steps)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


def test_one_array_is_one_prompt(llm: LLM, expected: Any) -> None:
    assert llm._model.codec is not None
    ids = llm._model.codec.encode(PROMPT)
    for given in (torch.tensor(ids), np.array(ids), list(np.array(ids)), tuple(ids)):
        (output,) = llm.generate(given, GREEDY)  # type: ignore[arg-type]
        assert output.outputs[0].token_ids == expected
    outputs = llm.generate(torch.tensor([ids, ids]), GREEDY)  # type: ignore[arg-type]
    assert [output.outputs[0].token_ids for output in outputs] == [expected, expected]
    for bad in ({5, 6}, iter([5]), torch.tensor(5), 5, None):
        with pytest.raises(InputError, match="prompts are"):
            llm.generate(bad, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="priority is a list of numbers, one for each prompt, got 5"):
        llm.generate(PROMPT, GREEDY, priority=5)  # type: ignore[arg-type]


@EVERY_CASE
def test_async_llm(
    async_llm: AsyncLLM,
    prompt: Any,
    params: Callable[[], dict[str, Any]],
    error: type[Exception],
    message: str,
    expected: Any,
) -> None:
    """Another request runs meanwhile, and ends as it would have."""

    async def all_of(*arguments: Any) -> list[RequestOutput]:
        return [output async for output in async_llm.generate(*arguments)]

    async def main() -> None:
        other = asyncio.create_task(all_of(PROMPT, GREEDY))
        with pytest.raises(error, match=message):
            await all_of(prompt, SamplingParams(**{"max_tokens": 8, **params()}))
        assert (await other)[-1].outputs[0].token_ids == expected

    before = async_llm.get_metrics()
    asyncio.run(main())
    after = async_llm.get_metrics()
    assert after.requests_finished - before.requests_finished == 1, "and nothing else was begun"
    assert (after.requests_failed, after.requests_aborted) == (0, 0)
    assert async_llm.is_running
    core = async_llm._engine.core
    check_untouched(core, core.program.num_steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "-5"], ["'max_tokens'", "-5", "from 1 to"]),
        (["--max-tokens", "99999999999"], ["'max_tokens'", "from 1 to"]),
        (["--n", "0"], ["'n'", "from 1 to"]),
        (["--n", "1000000"], ["'n'", "from 1 to"]),
        (["--n", "2", "--temperature", "0"], ["'n'", "greedy"]),
        (["--n", "2", "--stream"], ["--stream", "2 continuations"]),
        (["--best-of", "3", "--stream"], ["best_of=3", "streamed"]),
        (["--logprobs", "1000", "--json"], ["'logprobs'", "0 to 128"]),
        (["--logprobs", "1"], ["--logprobs", "--json"]),
        (["--min-tokens", "9", "--max-tokens", "8"], ["'min_tokens'", "max_tokens = 8"]),
        (["--stop-token-id", "99999"], ["'stop_token_ids'", "below the vocabulary size"]),
        (["--regex", "("], ["'regex'"]),
        (["--regex", "((a{1000}){1000}){1000}"], ["'regex'", "repetitions"]),
        (["--regex", "a", "--choice", "b"], ["exactly one of"]),
        (["--json-schema", "-"], ["'json'", "JSON schema"]),
        (["--grammar", "-"], ["'grammar'"]),
        (["--kv-cache-memory-bytes", "-1"], ["'kv_cache_memory_bytes'", "-1"]),
        (["--max-num-seqs", "0"], ["'max_num_seqs'", "1 to 4096"]),
        (["--gpu-memory-utilization", "1.5"], ["'gpu_memory_utilization'"]),
        (["--kv-cache-dtype", "int8"], ["'kv_cache_dtype'", "compiled in"]),
        (["--batch-invariant"], ["'batch_invariant'", "compiled in"]),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) and given[0].startswith("--") else "",
)
def test_generate_command(program: Path, arguments: list[str], words: list[str]) -> None:
    check_refused(["generate", str(program), PROMPT, *arguments], words, stdin="{((")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["throughput", "--num-prompts", "0"], ["'num_prompts'", "1 to"]),
        (["throughput", "--input-len", "0"], ["'input_len'", "range"]),
        (["throughput", "--output-len", "9:3"], ["'output_len'", "9:3"]),
        (["throughput", "--output-len", "300"], ["'output_len'", f"at most {CONTEXT}"]),
        (["throughput", "--dataset", "x.jsonl", "--input-len", "3"], ["'input_len'", "--dataset"]),
        (["throughput", "--plot", "no/such/folder.png"], ["--plot", "does not exist"]),
        (["throughput", "--plot", "plot.exe"], ["'plot'", ".png"]),
        (["latency", "--batch-size", "0"], ["'batch_size'", "1 to"]),
        (["latency", "--num-iters", "0"], ["'num_iters'"]),
        (["latency", "--num-iters-warmup", "-1"], ["'num_iters_warmup'"]),
        (["latency", "--batch-size", "8", "--max-num-seqs", "4"], ["'max_num_seqs'", "--batch-size 8"]),
        (["latency", "--threads", "-1"], ["'threads'", "-1"]),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) and given[0] in ("throughput", "latency") else "",
)
def test_bench_command(program: Path, arguments: list[str], words: list[str]) -> None:
    check_refused(["bench", arguments[0], str(program), *arguments[1:]], words)


def check_refused(command: list[str], words: list[str], stdin: str | None = None) -> None:
    """Exit status 2, and one line on stderr."""
    result = CliRunner().invoke(app, command, input=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
