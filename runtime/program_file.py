"""A compiled model in one file: safetensors for the weights, typed JSON in its metadata for everything else.

Readable with stock safetensors. No pickle, and no code: kernels are named templates and loop IR, from which source is
printed and compiled on the machine that loads the file. Weights are mapped from the file, not read into memory.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from llmopt.codegen import program_json
from llmopt.codegen.index import Index
from llmopt.codegen.step_costs import costs_from_json
from llmopt.compiler.errors import InputError, ProgramFileError
from llmopt.runtime import step_json
from llmopt.runtime.step_program import StepProgram

FORMAT = "llmopt-program"
VERSION = 5
# Entries of the safetensors metadata: the description, and the digest that tells damage from design.
DESCRIPTION, CHECKSUM = "llmopt", "llmopt.sha256"


@dataclass(frozen=True)
class LoadedProgram:
    """A step program from a file, bound to its weights, and what is needed to generate with it.

    costs: what each step costs, for reports (`codegen/step_costs.py`); None in a file without.
    """

    program: StepProgram
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    costs: list[tuple[Index, ...] | None] | None = None


def save_program(
    path: str | Path,
    program: StepProgram,
    *,
    vocab_size: int,
    max_model_len: int,
    eos_token_ids: Sequence[int],
    tokenizer: str | None,
    costs: list[Any] | None = None,
) -> None:
    """Writes a bound step program. The file appears whole or not at all: it is written beside and renamed.

    `costs`: what `costs_to_json` says of the program's steps.

    Raises UnsupportedError for a program with ATen fallbacks, OSError when the disk is full or not writable.
    """
    names, tensors = _named_weights(program.executable.weights)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "program": program_json.to_json(program.program),
        "weights": names,
        "block_size": program.block_size,
        "caches": step_json.caches_to_json(program.caches),
        "vocab_size": vocab_size,
        "max_model_len": max_model_len,
        "eos_token_ids": list(eos_token_ids),
        "tokenizer": tokenizer,
        "lora": step_json.lora_to_json(program.adapters.spec if program.adapters is not None else None),
        "costs": costs,
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # that of any new file; safetensors leaves one that only its owner can read
        text = json.dumps(metadata)
        save_file(tensors, temporary, {DESCRIPTION: text, CHECKSUM: _digest(text)})
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _named_weights(weights: Sequence[torch.Tensor]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """A tensor name for each weight slot, and the tensors; weights that share memory (tied ones) are stored once."""
    names, tensors, seen = [], {}, dict[Any, str]()
    for number, weight in enumerate(weights):
        key = (weight.data_ptr(), weight.dtype, tuple(weight.shape))
        if key not in seen:
            seen[key] = f"weight.{number}"
            tensors[seen[key]] = weight.detach().contiguous()
        names.append(seen[key])
    # Views of one storage are separate tensors in the file.
    storages = [t.untyped_storage().data_ptr() for t in tensors.values()]
    if len(set(storages)) < len(storages):
        tensors = {name: t.clone() for name, t in tensors.items()}
    return names, tensors


def load_program(path: str | Path, threads: int = 0, huge_pages: bool = False) -> LoadedProgram:
    """Reads a program file and compiles its kernels (or takes them from the cache); see `Executable` for the rest.

    Raises ProgramFileError for a damaged or foreign file, InputError when there is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            data = _metadata(file.metadata())
            stored = set(file.keys())
            names = data["weights"]
            if not isinstance(names, list) or not all(isinstance(n, str) and n in stored for n in names):
                raise ProgramFileError("the file lacks weights that its program names")
            tensors = {name: file.get_tensor(name) for name in set(names)}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ProgramFileError(f"{path} is no valid safetensors file: {error}") from error
    program = program_json.from_json(data["program"])
    costs = costs_from_json(data.get("costs"), program)
    caches, lora = step_json.caches_from_json(data["caches"]), step_json.lora_from_json(data.get("lora"))
    step_json.check_lora(program, lora)
    block_size = step_json.positive(data, "block_size", 1024)
    step_json.check_caches(program, caches, block_size)
    vocabulary = step_json.positive(data, "vocab_size", step_json.logits_width(program))
    length, eos = step_json.positive(data, "max_model_len", 1 << 31), step_json.token_ids(data, "eos_token_ids")
    try:
        step = StepProgram(program, caches, block_size, threads, lora=lora, huge_pages=huge_pages)
        step.bind([tensors[name].to(step.executable.device) for name in names])
    except InputError as error:
        raise ProgramFileError(str(error)) from error
    return LoadedProgram(step, vocabulary, length, eos, _tokenizer(data["tokenizer"]), costs)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(metadata: dict[str, str] | None) -> dict[str, Any]:
    entries = metadata or {}
    text = entries.get(DESCRIPTION)
    if text is None:
        raise ProgramFileError("this safetensors file holds no llmopt program")
    if entries.get(CHECKSUM) != _digest(text):
        raise ProgramFileError("the program's description does not match its SHA-256 checksum: the file is damaged")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProgramFileError(f"the program's description is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProgramFileError("this safetensors file holds no llmopt program")
    version = data.get("version")
    if version != VERSION or type(version) is not int:
        raise ProgramFileError(f"the file has format version {version!r}, this llmopt reads {VERSION}: export it again")
    wanted = ("program", "weights", "block_size", "caches", "vocab_size", "max_model_len", "eos_token_ids", "tokenizer")
    missing = [key for key in wanted if key not in data]
    if missing:
        raise ProgramFileError(f"the program's description lacks {missing[0]}")
    return data


def _tokenizer(text: Any) -> Tokenizer | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ProgramFileError("the tokenizer is no text")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ProgramFileError(f"the tokenizer cannot be read: {error}") from error
