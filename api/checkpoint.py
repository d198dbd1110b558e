"""A Hugging Face folder before anything is loaded: its JSON files, and whether its weights are there and whole."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmopt.compiler.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Formats that hold weights too, by the endings of their files. The first ones are unpickled, which runs what they say.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FOREIGN = (".h5", ".msgpack", ".gguf", ".onnx")
_MOST_JSON = 64 << 20


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError, with the file's name, for anything else."""
    try:
        if file.stat().st_size > _MOST_JSON:
            raise InputError(f"{file} has more than {_MOST_JSON >> 20} MiB")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds {type(found).__name__} where a JSON object is expected")
    return found


def check_weights(folder: Path, named: object = None) -> None:
    """Looks at every file of weights, reading headers only.

    Args:
        folder: of the model.
        named: what its configuration calls the file (`transformers_weights`), None for the usual names.

    Raises InputError for weights in other formats than safetensors, for files that are missing, cut off or damaged,
    and for an index that does not agree with them.
    """
    if named is not None and (not isinstance(named, str) or not _is_file_name(named)):
        raise InputError(
            f"{folder / 'config.json'}: transformers_weights must name a file of the folder, got {named!r}"
        )
    present = [name for name in ([named] if named else [WEIGHTS, INDEX]) if (folder / name).is_file()]
    if not present:
        raise InputError(f"{folder} has no {named or WEIGHTS}{_others(folder)}")
    if not present[0].endswith(".json"):
        _tensor_names(folder / present[0])
        return
    for shard, tensors in _shards(folder / present[0]):
        absent = tensors - _tensor_names(shard)
        if absent:
            raise InputError(f"{shard} lacks {len(absent)} of the weights that {present[0]} says it has: {min(absent)}")


def _shards(index: Path) -> Iterator[tuple[Path, set[str]]]:
    """Files of an index, each with the tensors that it should hold."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise InputError(f"{index} has no weight_map")
    by_file: dict[str, set[str]] = defaultdict(set)
    for tensor, name in places.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise InputError(f"{index}: {tensor} must be in a file of the folder, not in {name!r}")
        by_file[name].add(tensor)
    for name, tensors in by_file.items():
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name}, which is no safetensors file; {_CONVERT}")
        yield index.parent / name, tensors


def _tensor_names(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file, whose header must be sound and cover the file exactly."""
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or cut off: {error}") from error


def _is_file_name(name: str) -> bool:
    return bool(name) and Path(name).name == name and name not in (".", "..") and "\\" not in name and "\0" not in name


_CONVERT = "convert it to safetensors (save_pretrained does) where you trust it: llmopt never unpickles"


def _others(folder: Path) -> str:
    """What the folder has instead of safetensors, as the end of a message."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    foreign = [name for name in names if name.endswith(_FOREIGN)]
    if pickles:
        return f", only {pickles[0]}; {_CONVERT}"
    return f", only {foreign[0]}; convert it to safetensors" if foreign else ""
