"""What a step program stores and takes, as typed JSON, and back, with every field checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmopt.codegen import program_json
from llmopt.codegen.program import Program, View
from llmopt.compiler.errors import ProgramFileError
from llmopt.compiler.kv_formats import KV_CACHE_DTYPES
from llmopt.compiler.options import MAX_LORAS
from llmopt.compiler.step import EMBEDS_INPUTS, LORA_INPUTS, CacheSpec, LoraSpec, LoraTarget, step_inputs


def caches_to_json(caches: Sequence[CacheSpec]) -> list[list[Any]]:
    """A row for each attention layer."""
    return [
        [
            *(c.layer, c.kv_heads, c.key_size, c.value_size, program_json.dtype_name(c.dtype)),
            *(c.window, c.kv_dtype, c.group),
        ]
        for c in caches
    ]


def caches_from_json(data: Any) -> list[CacheSpec]:
    """Reads what `caches_to_json` wrote. Raises ProgramFileError for anything else."""
    specs = []
    for row in data if isinstance(data, list) else [None]:
        if not isinstance(row, list) or len(row) != 8 or row[6] not in KV_CACHE_DTYPES:
            raise ProgramFileError("malformed cache description")
        numbers = [row[i] for i in (0, 1, 2, 3, 5, 7)]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in numbers)
        if not whole or row[7] > 1 or not all(row[1:4]):
            raise ProgramFileError("malformed cache description")
        layer, heads, key_size, value_size, dtype, window, kv_dtype, group = row
        read = program_json.read_dtype(dtype)
        specs.append(CacheSpec(layer, heads, key_size, value_size, read, window, kv_dtype, group))
    return specs


def lora_to_json(spec: LoraSpec | None) -> dict[str, Any] | None:
    """Places for adapters as plain data; None where there are none."""
    if spec is None:
        return None
    targets = [[target.name, target.in_features, target.out_features] for target in spec.targets]
    dtype = program_json.dtype_name(spec.dtype)
    return {"targets": targets, "max_loras": spec.max_loras, "max_rank": spec.max_rank, "dtype": dtype}


def lora_from_json(data: Any) -> LoraSpec | None:
    """Reads what `lora_to_json` wrote. Raises ProgramFileError for anything else."""
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
    slots, rank = positive(data, "max_loras", MAX_LORAS), positive(data, "max_rank", 512)
    return LoraSpec(tuple(targets), slots, rank, program_json.read_dtype(data["dtype"]))


def check_caches(program: Program, caches: Sequence[CacheSpec], block_size: int) -> None:
    """Raises ProgramFileError unless the program takes caches of just this description: kernels trust it."""
    given = [program.values[slot] for slot in program.inputs if slot is not None]
    step, end = step_inputs(caches), len(step_inputs(caches)) + 2 * len(caches)
    inputs = [(value.name, value.dtype) for value in given[: len(step)]]
    pages = [(value.dtype, value.sizes[1:]) for value in given[len(step) : end]]
    described = [(spec.storage_dtype, (spec.kv_heads, block_size, row)) for spec in caches for row in spec.row_sizes]
    others = {value.name for value in given[end:]} - {*LORA_INPUTS, *EMBEDS_INPUTS}
    if not caches or inputs != list(step.items()) or pages != described or others:
        raise ProgramFileError("the description of caches does not fit the program")


def logits_width(program: Program) -> int:
    """How many logits a row of the program has. Raises ProgramFileError where there are no rows of logits."""
    result = program.results[0] if len(program.results) == 1 else None
    width = result.sizes[-1] if isinstance(result, View) and len(result.sizes) == 2 else None
    if not isinstance(width, int):
        raise ProgramFileError("the program gives no rows of logits")
    return width


def token_ids(data: dict[str, Any], key: str) -> tuple[int, ...]:
    """Token ids of a description, be they the model's or not. Raises ProgramFileError for anything else."""
    ids = data[key]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise ProgramFileError(f"{key} is no list of token ids")
    return tuple(ids)


def check_lora(program: Program, lora: LoraSpec | None) -> None:
    """Raises ProgramFileError unless the program takes adapters of just this description."""
    pools = [
        (value.dtype, value.sizes) for value in program.values if (value.kind, value.name) == ("input", "lora_pool")
    ]
    if pools != ([(lora.dtype, (lora.max_loras, lora.slot_elements))] if lora is not None else []):
        raise ProgramFileError("the description of adapters does not fit the program")


def positive(data: dict[str, Any], key: str, most: int) -> int:
    """A whole number of a description. Raises ProgramFileError for one below 1 or above `most`."""
    number = data[key]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= most:
        raise ProgramFileError(f"{key} is {str(number)[:40]}")
    return number
