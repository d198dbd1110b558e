"""Program files: the same tokens from a fresh process without Dynamo or transformers; damage is named, never run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.target import PROMPT, target_llm
from models.zoo import build, prompts, reference_generate
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llmopt
from llmopt import LLM, SamplingParams
from llmopt.errors import InputError, ProgramFileError, UnsupportedError
from llmopt.runtime import program_file

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ROWS = prompts([1, 17, 40])
# Windows and soft caps; derived weights; experts.
EXPORTED = ("gemma2", "gpt2", "mixtral")

LOAD_AND_GENERATE = """
import json, sys
import llmopt
from llmopt import SamplingParams

llm = llmopt.load(sys.argv[1])
prompts = json.loads(sys.argv[2])
outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3])))
loaded = [m for m in ("torch._dynamo", "torch._inductor", "transformers", "triton", "sympy") if m in sys.modules]
print(json.dumps([[o.outputs[0].token_ids for o in outputs], [o.outputs[0].text for o in outputs], loaded]))
"""


@functools.cache
def llm_of(name: str) -> LLM:
    return LLM(build(name), block_size=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A program file of GPT-2."""
    path = tmp_path / "model.llmopt"
    llmopt.export(llm_of("gpt2"), path)
    return path


def in_a_fresh_process(path: Path, asked: Any, count: int) -> tuple[list[list[int]], list[str], list[str]]:
    command = [sys.executable, "-c", LOAD_AND_GENERATE, str(path), json.dumps(asked), str(count)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)
    assert answer.returncode == 0, answer.stderr
    tokens, texts, loaded = json.loads(answer.stdout.splitlines()[-1])
    return tokens, texts, loaded


@pytest.mark.parametrize("name", EXPORTED)
def test_a_fresh_process_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.llmopt"
    llmopt.export(llm_of(name), path)
    tokens, texts, loaded = in_a_fresh_process(path, ROWS, 8)
    assert tokens == reference_generate(name, ROWS, 8)
    assert texts == [""] * 3
    assert [m for m in loaded if m != "sympy"] == []
    assert os.listdir(tmp_path) == ["model.llmopt"]  # noqa: PTH208


def test_the_trained_model_takes_its_tokenizer_along(tmp_path: Path) -> None:
    path = tmp_path / "target.llmopt"
    llmopt.export(target_llm(), path)
    (expected,) = target_llm().generate(PROMPT, GREEDY)
    tokens, texts, loaded = in_a_fresh_process(path, [PROMPT], 8)
    assert tokens == [list(expected.outputs[0].token_ids)]
    assert texts == [expected.outputs[0].text] != [""]
    assert [m for m in loaded if m != "sympy"] == []
    # The embedding is the head as well, and is stored once.
    assert (
        path.stat().st_size
        < 1.1 * 2 * (Path(__file__).parents[2] / "examples/models/target/model.safetensors").stat().st_size
    )


def test_export_from_a_module_with_options_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "model.llmopt"
    llmopt.export(build("llama"), path, block_size=8, max_model_len=32)
    llm = llmopt.load(path, max_num_seqs=2)
    assert llm.max_model_len == 32
    assert [list(o.outputs[0].token_ids) for o in llm.generate(ROWS[:2], GREEDY)] == reference_generate(
        "llama", ROWS[:2], 8
    )
    with pytest.raises(InputError, match="the longest sequence is 32"):
        llm.generate(ROWS, GREEDY)
    with pytest.raises(InputError, match="loaded from a program file already"):
        llm.export(tmp_path / "again")


def test_options_that_were_decided_at_export_are_refused(file: Path) -> None:
    for name, value in (("dtype", "bfloat16"), ("block_size", 8), ("fallback", "error")):
        with pytest.raises(InputError, match=f"{name}=.* was decided when"):
            llmopt.load(file, **{name: value})


def test_a_file_gets_the_permissions_of_any_new_file(file: Path) -> None:
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_stock_safetensors_reads_the_file(file: Path) -> None:
    with safe_open(str(file), framework="pt") as opened:
        data = json.loads(opened.metadata()["llmopt"])
        assert data["format"] == "llmopt-program"
        assert set(data["weights"]) == set(opened.keys())


def test_truncated_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut"
    for size in (0, 1, 7, 8, 9, *range(4096, len(whole), 4096), len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ProgramFileError, match="no valid safetensors file"):
            llmopt.load(cut)


def test_flipped_bits_in_the_header(file: Path, tmp_path: Path) -> None:
    """Every flip is refused, or changes nothing that the program depends on, such as a name that nobody reads."""
    whole = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    bad = tmp_path / "bad"
    generator = torch.Generator().manual_seed(0)
    places = [*range(8), *torch.randint(8, header, (250,), generator=generator).tolist()]
    refused = 0
    for place in places:
        bit = 1 << int(torch.randint(0, 8, (), generator=generator))
        whole[place] ^= bit
        bad.write_bytes(whole)
        whole[place] ^= bit
        try:
            program_file.load_program(bad)
        except ProgramFileError:
            refused += 1
    assert refused > len(places) // 2


@pytest.mark.parametrize("digest", [None, "", "0" * 64])
def test_a_description_without_its_checksum_is_refused(file: Path, tmp_path: Path, digest: str | None) -> None:
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["llmopt.sha256"]
    save_file(load_file(file), tmp_path / "bad", metadata if digest is None else {**metadata, "llmopt.sha256": digest})
    with pytest.raises(ProgramFileError, match="checksum"):
        llmopt.load(tmp_path / "bad")


Damage = Callable[[dict[str, Any]], Any]


def rewritten(file: Path, damage: Damage, target: Path) -> Path:
    """The file with its description changed and its tensors as they were."""
    with safe_open(str(file), framework="pt") as opened:
        data = json.loads(opened.metadata()["llmopt"])
    changed = damage(data)
    text = changed if isinstance(changed, str) else json.dumps(data)
    # A correct checksum, so that the checks behind it are what answers.
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(load_file(file), target, {"llmopt": text, "llmopt.sha256": digest})
    return target


def _set(*path: Any) -> Damage:
    """Sets the item at `path[:-1]` to `path[-1]`."""

    def damage(data: dict[str, Any]) -> None:
        place: Any = data
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("version", 1), r"format version 1, this llmopt reads 5: export it again"),
        (_set("version", True), "format version"),
        (_set("version", 4.0), "format version"),
        (_set("format", "other"), "holds no llmopt program"),
        (lambda data: "[]", "holds no llmopt program"),
        (lambda data: "{", "no JSON"),
        (lambda data: "[" * 100000, "no JSON"),
        (lambda data: data.pop("weights") and None, "lacks weights"),
        (lambda data: data.pop("program") and None, "lacks program"),
        (_set("weights", 0, "weight.999"), "lacks weights"),
        (_set("weights", {}), "lacks weights"),
        (lambda data: data["weights"].pop() and None, "takes .* weights, got"),
        (lambda data: data["weights"].reverse(), "weight .* must be"),
        (_set("block_size", 0), "block_size is 0"),
        (_set("block_size", "16"), "block_size is 16"),
        (_set("vocab_size", -1), "vocab_size is -1"),
        (_set("vocab_size", 1 << 31), "vocab_size is 2147483648"),
        (_set("max_model_len", 1.5), "max_model_len is 1.5"),
        (_set("eos_token_ids", [None]), "eos_token_ids"),
        (_set("eos_token_ids", [True]), "eos_token_ids"),
        (_set("eos_token_ids", [-5]), "eos_token_ids"),
        (_set("eos_token_ids", [1 << 70]), "eos_token_ids"),
        (_set("tokenizer", "{}"), "tokenizer cannot be read"),
        (_set("tokenizer", 3), "tokenizer is no text"),
        (_set("caches", None), "malformed cache"),
        (_set("caches", 0, 4, "complex64"), "unknown dtype"),
        (_set("caches", 0, 1, -1), "malformed cache"),
        (_set("caches", 0, 6, "int2"), "malformed cache"),
        (_set("caches", 0, 1, 0), "malformed cache"),
        (_set("caches", []), "caches does not fit"),
        (lambda data: data["caches"].extend(data["caches"]), "caches does not fit"),
        (lambda data: data["caches"].pop() and None, "caches does not fit"),
        (_set("caches", 0, 1, 1), "caches does not fit"),
        (_set("caches", 0, 2, 1), "caches does not fit"),
        (_set("caches", 0, 3, 64), "caches does not fit"),
        (_set("caches", 0, 4, "bfloat16"), "caches does not fit"),
        (_set("caches", 0, 6, "int8"), "caches does not fit"),
        (_set("caches", 0, 7, 1), "caches does not fit"),
        (_set("block_size", 8), "caches does not fit"),
        (_set("program", []), "no JSON object"),
        (_set("program", "values", 0, 0, "secret"), "unknown kind"),
        (_set("program", "values", 0, 2, "float1"), "unknown dtype"),
        (_set("program", "values", 3), "values is missing"),
        (_set("program", "kernels", 0, 0, "system"), "unknown kernel template"),
        (_set("program", "kernels", 0, 1, ["float>(a, w); } //"]), "unknown arguments"),
        (_set("program", "steps", 0, 0, 9999), "outside 0.."),
        (_set("program", "steps", 0, 0, True), "kernel is True"),
        (_set("program", "steps", 0, 3, ["x"]), "malformed kernel call"),
        (_set("program", "steps", 0, 1, 0, [99999, 0]), "outside 0.."),
        (_set("program", "inputs", 0, 99999), "outside 0.."),
        (_set("program", "results", 0, ["view"]), "malformed result"),
        (_set("program", "arena_bytes", "__import__('os')"), "."),
        (_set("program", "symbols", 0, 0, "a b"), "no valid name"),
        (_set("costs", {}), "not those of the program's steps"),
        (lambda data: data["costs"].pop() and None, "not those of the program's steps"),
        (_set("costs", 0, []), "malformed cost"),
        (_set("costs", 0, [1, 2, 3, 4]), "malformed cost"),
        (_set("costs", 0, 0, "__import__('os')"), "undeclared symbol"),
        (_set("costs", 0, 0, "tokens"), "undeclared symbol"),
        (_set("costs", 0, 0, 1.5), "not an index expression"),
        (_set("costs", 0, 0, ["**", 2, "s0"]), "not an index expression"),
        (_set("costs", 0, 0, ["//", 1, "s0"]), "no sensible number"),
        (_set("costs", 0, 0, ["//", 1, 0]), "divides by 0"),
        (_set("costs", 0, 0, functools.reduce(lambda a, _: ["*", a, "s0"], range(40), "s0")), "no sensible number"),
        (_set("costs", 0, 0, functools.reduce(lambda a, _: ["+", a, 1], range(100), 1)), "too large"),
    ],
)
def test_a_wrong_description_is_refused(file: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    with pytest.raises(ProgramFileError, match=message):
        llmopt.load(rewritten(file, damage, tmp_path / "bad"))


@pytest.mark.parametrize("change", ["dtype", "shape", "missing"])
def test_wrong_tensors_are_refused(file: Path, tmp_path: Path, change: str) -> None:
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].half() if change == "dtype" else tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(ProgramFileError, match="lacks weights" if change == "missing" else r"must be torch.float32\["):
        llmopt.load(tmp_path / "bad")


def test_foreign_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ProgramFileError, match="holds no llmopt program"):
        llmopt.load(tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("not a model at all")
    with pytest.raises(ProgramFileError, match="no valid safetensors"):
        llmopt.load(tmp_path / "text")
    with pytest.raises(InputError):
        llmopt.load(tmp_path / "absent")


def test_a_failed_save_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(program_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        llmopt.export(llm_of("gpt2"), file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]  # noqa: PTH208


def test_what_cannot_be_saved_is_refused_before_writing(tmp_path: Path) -> None:
    """A program with an op that runs on ATen needs PyTorch's code for it."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(17, 8)
            self.max_model_len = 32

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(ids)
            return torch.linalg.matrix_exp(hidden[..., :1, None])[..., 0] * hidden @ self.embedding.weight.T

    with pytest.raises(UnsupportedError, match="matrix_exp"):
        llmopt.export(Odd().eval(), tmp_path / "model")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
