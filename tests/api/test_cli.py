"""The command line, with layers of the trained model under examples/models: what it prints, where, its exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.target import FOLDER, write_adapter, write_shallow
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import llmopt
from llmopt.cli import app
from llmopt.codegen.cpu.toolchain import find_compiler, host_level
from llmopt.compiler.errors import ToolchainError

PROMPTS = ["import os", "def fib(n):\n    "]
# float32, because only there a token is equal or wrong.
GREEDY = ["--temperature", "0", "--max-tokens", "12", "--dtype", "float32"]


def has_compiler() -> bool:
    try:
        find_compiler()
    except ToolchainError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


def run(*arguments: str | Path, stdin: str | None = None, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    assert result.exit_code == status, result.output
    return result


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two layers of the trained model: commands compile it again and again."""
    return write_shallow(tmp_path_factory.mktemp("shallow") / "target")


@pytest.fixture(scope="module")
def llm(target: Path) -> llmopt.LLM:
    return llmopt.LLM(target, dtype="float32")


@pytest.fixture(scope="module")
def expected(llm: llmopt.LLM) -> list[llmopt.RequestOutput]:
    return llm.generate(PROMPTS, llmopt.SamplingParams(temperature=0.0, max_tokens=12))


@pytest.fixture(scope="module")
def engine(llm: llmopt.LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "target.engine"
    llmopt.export(llm, path)
    return path


# ---- generate ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_generate_json_equals_the_library(target: Path, expected: list[llmopt.RequestOutput]) -> None:
    found = records(run("generate", target, *PROMPTS, *GREEDY, "--json").stdout)
    assert [r["index"] for r in found] == [0, 1]
    assert [r["prompt"] for r in found] == PROMPTS
    assert [r["prompt_token_ids"] for r in found] == [list(e.prompt_token_ids) for e in expected]
    assert [r["token_ids"] for r in found] == [list(e.outputs[0].token_ids) for e in expected]
    assert [r["text"] for r in found] == [e.outputs[0].text for e in expected]
    assert {r["finish_reason"] for r in found} <= {"length", "stop"}
    assert all(found[i]["text"] for i in range(2))


@needs_compiler
def test_generate_text(engine: Path, expected: list[llmopt.RequestOutput]) -> None:
    texts = [e.outputs[0].text for e in expected]
    arguments = ["--temperature", "0", "--max-tokens", "12"]
    assert run("generate", engine, PROMPTS[0], *arguments).stdout == f"{texts[0]}\n"
    both = run("generate", engine, *PROMPTS, *arguments).stdout
    assert both == f"==> prompt 1 <==\n{texts[0]}\n\n==> prompt 2 <==\n{texts[1]}\n"


@needs_compiler
def test_generate_with_an_adapter(
    target: Path, engine: Path, expected: list[llmopt.RequestOutput], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base=target)
    arguments = [PROMPTS[0], "--lora", adapter.lora_path]
    (found,) = records(run("generate", target, *arguments, *GREEDY, "--json").stdout)
    own = llmopt.LLM(target, dtype="float32", enable_lora=True)
    params = llmopt.SamplingParams(temperature=0.0, max_tokens=12)
    (output,) = own.generate(PROMPTS[0], params, lora_request=adapter)
    assert found["token_ids"] == list(output.outputs[0].token_ids) != list(expected[0].outputs[0].token_ids)
    assert "needs the option enable_lora" in run("generate", engine, *arguments, status=2).stderr


@needs_compiler
def test_prompts_from_file_and_stdin(engine: Path, tmp_path: Path, expected: list[llmopt.RequestOutput]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPTS[1], "utf-8")
    arguments = ["--temperature", "0", "--max-tokens", "12", "--json"]
    found = run("generate", engine, "--prompt-file", "-", "--prompt-file", file, *arguments, stdin=PROMPTS[0])
    assert [r["token_ids"] for r in records(found.stdout)] == [list(e.outputs[0].token_ids) for e in expected]


@needs_compiler
def test_stream(engine: Path, expected: list[llmopt.RequestOutput]) -> None:
    arguments = ["--temperature", "0", "--max-tokens", "12", "--stream"]
    assert run("generate", engine, PROMPTS[0], *arguments).stdout == f"{expected[0].outputs[0].text}\n"
    chunks = records(run("generate", engine, *PROMPTS, *arguments, "--json").stdout)
    for number, result in enumerate(expected):
        mine = [c for c in chunks if c["index"] == number]
        assert [c["token_id"] for c in mine] == list(result.outputs[0].token_ids)
        assert "".join(str(c["text"]) for c in mine) == result.outputs[0].text
        assert [c["finish_reason"] for c in mine][:-1] == [None] * (len(mine) - 1)
    refused = run("generate", engine, *PROMPTS, "--stream", status=2)
    assert "--stream" in refused.stderr


@needs_compiler
def test_a_stream_that_fails_says_so(engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.engine"
    with safe_open(str(engine), framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(engine)
    for tensor in weights.values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.fill_(torch.nan)
    save_file(weights, path, metadata)
    for more in ([], ["--json"]):
        result = run("generate", path, PROMPTS[0], "--temperature", "0", "--stream", *more, status=1)
        assert result.stderr.startswith("error: prompt 1 failed: ") and "NaN" in result.stderr
    last = records(result.stdout)[-1]
    assert last["finish_reason"] == "error" and "NaN" in str(last["error"])


@needs_compiler
def test_defaults_of_the_folder_come_first(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(target, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 3, "temperature": 0.0}))
    (found,) = records(run("generate", folder, PROMPTS[0], "--dtype", "float32", "--json").stdout)
    (longer,) = records(run("generate", folder, PROMPTS[0], *GREEDY, "--json").stdout)
    assert len(found["token_ids"]) == 3 < len(longer["token_ids"])  # type: ignore[arg-type]
    assert found["token_ids"] == longer["token_ids"][:3]  # type: ignore[index]


@needs_compiler
def test_sampling_options_arrive(engine: Path) -> None:
    """Each option of the command line changes what its name says."""
    loaded = llmopt.load(engine)
    hot: dict[str, object] = {"seed": 7, "temperature": 3.0}
    choice = llmopt.StructuredOutputsParams(choice=("yes", "no"))
    digits = llmopt.StructuredOutputsParams(regex="[0-9]{3}")
    cases: list[tuple[list[str], dict[str, object]]] = [
        (["--seed", "7"], {"seed": 7}),
        (["--seed", "7", "--temperature", "3.0"], {"seed": 7, "temperature": 3.0}),
        (["--seed", "7", "--temperature", "3.0", "--top-k", "2"], {"seed": 7, "temperature": 3.0, "top_k": 2}),
        (["--seed", "7", "--temperature", "3.0", "--top-p", "0.1"], {"seed": 7, "temperature": 3.0, "top_p": 0.1}),
        (["--seed", "7", "--temperature", "3.0", "--min-p", "0.5"], {"seed": 7, "temperature": 3.0, "min_p": 0.5}),
        (["--seed", "7", "--temperature", "3.0", "--typical-p", "0.2"], {**hot, "typical_p": 0.2}),
        (["--seed", "7", "--temperature", "3.0", "--presence-penalty", "2"], {**hot, "presence_penalty": 2.0}),
        (["--temperature", "0", "--repetition-penalty", "1.9"], {"temperature": 0.0, "repetition_penalty": 1.9}),
        (
            ["--temperature", "0", "--choice", "yes", "--choice", "no"],
            {"temperature": 0.0, "structured_outputs": choice},
        ),
        (["--temperature", "0", "--regex", "[0-9]{3}"], {"temperature": 0.0, "structured_outputs": digits}),
        (["--temperature", "0", "--stop", "o", "--stop", "x"], {"temperature": 0.0, "stop": ("o", "x")}),
        (["--temperature", "0", "--max-tokens", "3"], {"temperature": 0.0, "max_tokens": 3}),
    ]
    seen = set()
    for arguments, parameters in cases:
        found = records(run("generate", engine, "import os", *arguments, "--json").stdout)[0]
        output = loaded.generate("import os", llmopt.SamplingParams(**parameters))[0].outputs[0]  # type: ignore[arg-type]
        assert (found["token_ids"], found["text"]) == (list(output.token_ids), output.text), arguments
        seen.add(output.token_ids)
    assert len(seen) == len(cases), "options that change nothing prove nothing"


@needs_compiler
def test_several_continuations_and_logprobs(engine: Path) -> None:
    arguments = ["--seed", "5", "--max-tokens", "4", "--n", "2"]
    found = records(run("generate", engine, "import os", *arguments, "--logprobs", "2", "--json").stdout)
    params = llmopt.SamplingParams(seed=5, max_tokens=4, n=2, logprobs=2)
    outputs = llmopt.load(engine).generate("import os", params)[0].outputs
    assert [r["sequence"] for r in found] == [0, 1]
    assert [r["token_ids"] for r in found] == [list(output.token_ids) for output in outputs]
    for record, output in zip(found, outputs, strict=True):
        assert output.logprobs is not None
        expected = [[{"token_id": t, **vars(e)} for t, e in position.items()] for position in output.logprobs]
        assert record["logprobs"] == expected
    text = run("generate", engine, "import os", *arguments).stdout
    assert text == "\n".join(f"==> continuation {i + 1} <==\n{o.text}\n" for i, o in enumerate(outputs))


def test_defaults_are_those_of_the_library() -> None:
    """The numbers in the help text; the values themselves are left to the library."""
    text = " ".join(run("generate", "--help").stdout.split())
    params, options = llmopt.SamplingParams(), llmopt.Options()
    sampling = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "n")
    sampling += ("best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens")
    for name in (*sampling, "logprobs"):
        flag = text.split(f"--{name.replace('_', '-')} ")[1]
        assert flag.split("[")[1].split("]")[0] == str(getattr(params, name)), name
    engine = ("dtype", "threads", "max_model_len", "block_size", "kv_cache_dtype", "kv_cache_memory_bytes")
    engine += ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")
    for name in (*engine, "batch_invariant"):
        flag = text.split(f"--{name.replace('_', '-')} ")[1]
        assert flag.split("[")[1].split("]")[0] == str(getattr(options, name)), name


# ---- explain, export, env ------------------------------------------------------------------------------------------


@needs_compiler
def test_explain_folder(target: Path) -> None:
    out = run("explain", target, "--dtype", "float32", "--graph", "--kernels").stdout
    assert "substitute_attention  2" in out
    assert "fallbacks to ATen\n  none" in out
    assert "paged_attention" in out.split("time:")[1], "the graph"
    assert "LLMOPT_KERNEL(" in out and "llmopt::linear<float>" in out


@needs_compiler
def test_explain_folder_json(target: Path, llm: llmopt.LLM, expected: list[llmopt.RequestOutput]) -> None:
    data = json.loads(run("explain", target, "--dtype", "float32", "--json").stdout)
    graph, same = data["graphs"][0], llmopt.explain(llm).to_json()["graphs"][0]
    assert [(p["name"], p["matched"]) for p in graph["passes"]] == [(p["name"], p["matched"]) for p in same["passes"]]
    assert {k["template"] for k in graph["kernels"]} >= {"linear", "attention", "rms_norm"}
    assert all("source" not in kernel for kernel in graph["kernels"])


@needs_compiler
def test_explain_program(engine: Path) -> None:
    out = run("explain", engine, "--kernels").stdout
    assert "KV cache: 2 layers, blocks of 16 tokens" in out
    assert "linear<float>" in out and "llmopt.paged_attention" in out and "LLMOPT_KERNEL(" in out
    data = json.loads(run("explain", engine, "--json", "--at", "tokens=3").stdout)
    assert data.keys() == llmopt.explain(engine).to_json().keys(), "one schema for all models"
    (graph,) = data["graphs"]
    assert graph["kind"] == "program" and graph["calls"] and graph["sizes"]["tokens"] == 3
    assert "vocabulary 4096" in data["notes"][0]
    assert "bogus" in run("explain", engine, "--at", "bogus=1", status=2).stderr
    assert "does not exist" in run("explain", engine, "--html", "no/such/folder.html", status=2).stderr
    assert "holds no graph" in run("explain", engine, "--graph", status=2).stderr


@needs_compiler
def test_export_then_generate_in_a_fresh_process(target: Path, tmp_path: Path) -> None:
    """The console script, end to end; the second process must not load transformers or Dynamo."""
    path = tmp_path / "bf16.engine"
    assert str(path) in run("export", target, path, "--block-size", "32").stdout
    code = (
        "import sys; from llmopt.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('transformers', 'torch._dynamo') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "generate", str(path), "import os", "--temperature", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.strip() == "[]"
    assert answer.stdout.strip()
    assert "already" in run("export", path, tmp_path / "again", status=2).stderr


def test_env() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["llmopt"] == llmopt.__version__
    assert found["instruction set"] == host_level().name
    assert found["threads"] >= 1
    text = run("env").stdout
    assert all(name in text for name in found)


def test_env_shows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_FUEL", "12")
    assert "LLMOPT_FUEL=12" in run("env").stdout


# ---- mistakes ------------------------------------------------------------------------------------------------------


def check_one_line(result: Result, *words: str) -> None:
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_bad_options_name_option_value_and_what_is_allowed() -> None:
    generate = ("generate", FOLDER, "x")
    check_one_line(run(*generate, "--dtype", "int3", status=2), "'dtype'", "'int3'", "'bfloat16'")
    check_one_line(run(*generate, "--top-p", "1.5", status=2), "'top_p'", "1.5", "to 1")
    check_one_line(run(*generate, "--max-tokens", "0", status=2), "'max_tokens'", "0", "from 1 to")
    check_one_line(run(*generate, "--threads", "-1", status=2), "'threads'", "-1", "0 to 1024")
    check_one_line(run(*generate, "--block-size", "0", status=2), "'block_size'", "1 to 1024")
    check_one_line(run("explain", FOLDER, "--dtype", "int3", status=2), "'dtype'", "'int3'")
    check_one_line(run("export", FOLDER, "x.engine", "--dtype", "int3", status=2), "'dtype'", "'int3'")


def test_unknown_options_and_commands() -> None:
    assert "--no-such-option" in run("generate", FOLDER, "x", "--no-such-option", status=2).stderr
    assert "no-such-command" in run("no-such-command", status=2).stderr
    assert "'--top-p'" in run("generate", FOLDER, "x", "--top-p", "abc", status=2).stderr


def test_missing_model_and_prompt(tmp_path: Path) -> None:
    check_one_line(run("generate", tmp_path / "none", "x", status=2), "none", "does not exist")
    check_one_line(run("generate", tmp_path, "x", status=2), str(tmp_path), "config.json")
    check_one_line(run("explain", FOLDER, "--html", tmp_path, status=2), "it is a folder")
    check_one_line(run("generate", FOLDER, status=2), "--prompt-file")
    check_one_line(run("generate", FOLDER, "--prompt-file", tmp_path / "none.txt", status=1), "none.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"a\xff")
    check_one_line(run("generate", FOLDER, "--prompt-file", binary, status=2), "UTF-8", "byte 1")
    check_one_line(run("generate", binary, "x", status=2), "safetensors")
    check_one_line(run("export", FOLDER, tmp_path, status=2), "it is a folder")
    check_one_line(run("export", FOLDER, tmp_path / "a" / "b", status=2), "does not exist")


@needs_compiler
def test_what_a_program_file_cannot_take(engine: Path) -> None:
    check_one_line(run("generate", engine, "x", "--dtype", "float32", status=2), "'dtype'", "compiled in")
    check_one_line(run("generate", engine, "x", "--block-size", "8", status=2), "'block_size'", "compiled in")
    check_one_line(run("generate", engine, "x " * 3000, status=2), "longest sequence")


# ---- the process ---------------------------------------------------------------------------------------------------


def test_version_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys; from llmopt.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    for argument, text in (("--version", f"llmopt {llmopt.__version__}"), ("--help", "generate")):
        answer = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        assert answer.returncode == 0 and text in answer.stdout
        assert answer.stderr.strip() == "[]"


@needs_compiler
@pytest.mark.slow
def test_interrupt_ends_cleanly(engine: Path) -> None:
    script = Path(sys.executable).with_name("llmopt")
    command = [str(script), "generate", str(engine), "import os", "--stream", "--json", "--ignore-eos", "--max-tokens"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert len(rest.splitlines()) < 1990, "it ran to the end"
    assert "Traceback" not in errors
