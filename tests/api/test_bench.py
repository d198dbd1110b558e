"""`llmopt bench`: what it counts is what was asked for; timings are not judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.target import target_llm
from typer.testing import CliRunner

from llmopt.cli import app
from llmopt.commands.workload import Lengths, random_work, work_from_file
from llmopt.compiler.errors import InputError, OptionError


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("program") / "target.engine"
    target_llm().export(path)
    yield path


def bench(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_throughput_counts_the_work(program: Path, tmp_path: Path) -> None:
    plot = tmp_path / "run.png"
    arguments = ["--num-prompts", 6, "--input-len", "10:40", "--output-len", 5, "--seed", 3, "--max-num-seqs", 4]
    found = json.loads(bench("throughput", program, *arguments, "--plot", plot, "--json"))
    work = random_work(6, Lengths(10, 40), Lengths(5, 5), 4096, 3)
    assert found["num_requests"] == 6 and found["num_output_tokens"] == 30
    assert found["num_prompt_tokens"] == sum(len(each.prompt) for each in work)
    assert found["num_steps"] >= 10, "six requests in four places"
    assert 0 < found["max_kv_cache_usage"] <= 1 and found["prefix_cache_hits"] == 0
    assert found["output_tokens_per_second"] == pytest.approx(30 / found["elapsed_time"])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    text = bench("throughput", program, *arguments)
    assert "requests/s" in text and "preemptions" in text


def test_throughput_over_a_file(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "import os\n" * 9, "output_len": 3}, {"prompt": "import os\n" * 9}, {"prompt": [5, 6, 7]}]
    file.write_text("\n".join(map(json.dumps, records)), "utf-8")
    arguments = ["--dataset", file, "--output-len", 4, "--max-num-seqs", 1]
    found = json.loads(bench("throughput", program, *arguments, "--json"))
    assert found["num_requests"] == 3 and found["num_output_tokens"] == 11
    assert found["prefix_cache_hits"] > 0, "two prompts are the same"
    found = json.loads(bench("throughput", program, *arguments, "--num-prompts", 1, "--json"))
    assert found["num_requests"] == 1 and found["num_output_tokens"] == 3


def test_latency_has_a_sample_for_everything(program: Path, tmp_path: Path) -> None:
    plot = tmp_path / "latency.svg"
    arguments = ["--batch-size", 3, "--input-len", 8, "--output-len", 4, "--num-iters", 2, "--num-iters-warmup", 1]
    found = json.loads(bench("latency", program, *arguments, "--plot", plot, "--json"))
    assert {name: len(found[name]["samples"]) for name in ("runs", "ttft", "tpot", "steps")} == {
        "runs": 2,
        "ttft": 6,
        "tpot": 6,
        "steps": 6,
    }
    for name in ("runs", "ttft", "tpot", "steps"):
        assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
    assert "<svg" in plot.read_text("utf-8")
    assert "first token" in bench("latency", program, *arguments)


def test_a_missing_matplotlib_is_said_before_any_work(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["bench", "latency", "no-such-model", "--plot", "x.png"])
    assert result.exit_code == 2 and "pip install 'llmopt[bench]'" in result.stderr


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "5:2", "1:2:3", "a", ":", "3:", "\N{SUPERSCRIPT TWO}", "9" * 30]
)
def test_bad_lengths(text: str) -> None:
    with pytest.raises(OptionError, match="input_len"):
        Lengths.parse("input_len", text)


BAD_LINES = ["{", "[]", "3", "{}", "[" * 100_000, '{"prompt": ""}', '{"prompt": []}', '{"prompt": [1, "a"]}']
BAD_LINES += ['{"prompt": "a", "output_len": 0}', '{"prompt": "a", "output_len": true}']


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_bad_lines(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line, "utf-8")
    with pytest.raises(InputError, match="line 3"):
        work_from_file(file, None, Lengths(1, 2), 0)
    assert len(work_from_file(file, 1, Lengths(1, 2), 0)) == 1
    with pytest.raises(InputError, match=r"line 3|holds 1 prompts"):
        work_from_file(file, 5, Lengths(1, 2), 0)
