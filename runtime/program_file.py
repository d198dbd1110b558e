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
from llmopt.compiler.kv_formats import KV_CACHE_DTYPES
from llmopt.compiler.options import MAX_LORAS
from llmopt.compiler.step import CacheSpec, LoraSpec, LoraTarget
from llmopt.runtime.step_program import StepProgram

FORMAT = "llmopt-program"
VERSION = 4
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
        "caches": [
            [
                *(c.layer, c.kv_heads, c.key_size, c.value_size, program_json.dtype_name(c.dtype)),
                *(c.window, c.kv_dtype, c.group),
            ]
            for c in program.caches
        ],
        "vocab_size": vocab_size,
        "max_model_len": max_model_len,
        "eos_token_ids": list(eos_token_ids),
        "tokenizer": tokenizer,
        "lora": _lora_json(program.adapters.spec) if program.adapters is not None else None,
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


def load_program(path: str | Path, threads: int = 0) -> LoadedProgram:
    """Reads a program file and compiles its kernels (or takes them from the cache).

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
    caches, lora = _caches(data["caches"]), _lora(data.get("lora"))
    pools = [
        (value.dtype, value.sizes) for value in program.values if (value.kind, value.name) == ("input", "lora_pool")
    ]
    if pools != ([(lora.dtype, (lora.max_loras, lora.slot_elements))] if lora is not None else []):
        raise ProgramFileError("the description of adapters does not fit the program")
    block_size = _positive(data, "block_size", 1024)
    try:
        step = StepProgram(program, caches, block_size, threads, lora=lora)
        step.bind([tensors[name].to(step.executable.device) for name in names])
    except InputError as error:
        raise ProgramFileError(str(error)) from error
    eos = data["eos_token_ids"]
    if not isinstance(eos, list) or not all(isinstance(t, int) for t in eos):
        raise ProgramFileError("eos_token_ids is no list of numbers")
    vocabulary, length = _positive(data, "vocab_size", 1 << 31), _positive(data, "max_model_len", 1 << 31)
    return LoadedProgram(step, vocabulary, length, tuple(eos), _tokenizer(data["tokenizer"]), costs)


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
    if version != VERSION or isinstance(version, bool):
        raise ProgramFileError(f"the file has format version {version!r}, this llmopt reads {VERSION}: export it again")
    wanted = ("program", "weights", "block_size", "caches", "vocab_size", "max_model_len", "eos_token_ids", "tokenizer")
    missing = [key for key in wanted if key not in data]
    if missing:
        raise ProgramFileError(f"the program's description lacks {missing[0]}")
    return data


def _positive(data: dict[str, Any], key: str, most: int) -> int:
    number = data[key]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= most:
        raise ProgramFileError(f"{key} is {str(number)[:40]}")
    return number


def _caches(data: Any) -> list[CacheSpec]:
    specs = []
    for row in data if isinstance(data, list) else [None]:
        if not isinstance(row, list) or len(row) != 8 or row[6] not in KV_CACHE_DTYPES:
            raise ProgramFileError("malformed cache description")
        numbers = [row[i] for i in (0, 1, 2, 3, 5, 7)]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in numbers)
        if not whole or row[7] > 1:
            raise ProgramFileError("malformed cache description")
        layer, heads, key_size, value_size, dtype, window, kv_dtype, group = row
        read = program_json.read_dtype(dtype)
        specs.append(CacheSpec(layer, heads, key_size, value_size, read, window, kv_dtype, group))
    return specs


def _lora_json(spec: LoraSpec) -> dict[str, Any]:
    targets = [[target.name, target.in_features, target.out_features] for target in spec.targets]
    dtype = program_json.dtype_name(spec.dtype)
    return {"targets": targets, "max_loras": spec.max_loras, "max_rank": spec.max_rank, "dtype": dtype}


def _lora(data: Any) -> LoraSpec | None:
    if data is None:
        return None
    if not isinstance(data, dict) or {"targets", "max_loras", "max_rank", "dtype"} - data.keys():
        raise ProgramFileError("malformed description of adapters")
    targets = []
    for row in data["targets"] if isinstance(data["targets"], list) else [None]:
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
            raise ProgramFileError("malformed description of adapters")
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 31 for n in row[1:]):
            raise ProgramFileError("malformed description of adapters")
        targets.append(LoraTarget(*row))
    slots, rank = _positive(data, "max_loras", MAX_LORAS), _positive(data, "max_rank", 512)
    return LoraSpec(tuple(targets), slots, rank, program_json.read_dtype(data["dtype"]))


def _tokenizer(text: Any) -> Tokenizer | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ProgramFileError("the tokenizer is no text")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ProgramFileError(f"the tokenizer cannot be read: {error}") from error
