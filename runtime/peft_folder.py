"""Reads LoRA adapters from folders as PEFT saves them: settings in JSON, weights in safetensors.

Whatever the configuration asks for that would change results and is not known here is refused by name: an adapter is
applied as it was trained, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from llmopt.compiler.errors import AdapterError, UnsupportedError
from llmopt.compiler.step import LoraSpec, LoraTarget
from llmopt.runtime.adapters import Adapter, AdapterPart, Stamp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

# Settings that say nothing about what an adapter computes, or that show in the weights. `fan_in_fan_out` is about
# merging: A is [rank, in] and B [out, rank] whichever way the module keeps its own weight.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    }
)
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern"}
)
# Ways to begin training that leave the model's own weights as they are; others (PiSSA, OLoRA, LoftQ) move a part of the
# weights into the adapter.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.lora_(A|B)\.weight", re.ASCII)
_PLAIN_NAME = re.compile(r"\^?([\w.]+)\$?", re.ASCII)


def stamp(folder: Path) -> Stamp:
    """The state of an adapter's two files; raises AdapterError when one is missing."""
    found = []
    for name in (CONFIG, WEIGHTS):
        try:
            state = (folder / name).stat()
        except (OSError, ValueError) as error:
            if name == WEIGHTS and (folder / "adapter_model.bin").exists():
                raise UnsupportedError(
                    f"{folder} holds pickled weights (adapter_model.bin), which can run code when they are read; "
                    f"save the adapter as safetensors"
                ) from None
            raise AdapterError(f"{folder} is no folder of a PEFT adapter: {name} cannot be read ({error})") from None
        found.append((state.st_mtime_ns, state.st_size, state.st_ino))
    return tuple(found)


def read_adapter(folder: Path, spec: LoraSpec) -> Adapter:
    """The adapter in a folder, fitted to a program: in its dtype, by the numbers of its targets.

    Raises AdapterError, naming file, setting or module, for what is missing, damaged or does not fit; UnsupportedError
    for what PEFT can do beyond plain LoRA on linear layers.
    """
    stamp(folder)
    try:
        raw_config, raw_weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise AdapterError(f"{folder}: {error}") from None
    config = _config(folder, raw_config)
    try:
        tensors = load(raw_weights)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is no valid safetensors file: {error}") from None
    pairs = _pairs(folder, tensors)
    by_name = {target.name: number for number, target in enumerate(spec.targets)}
    parts = {}
    for module, (a, b) in pairs.items():
        if module not in by_name:
            raise AdapterError(
                f"{folder}: the adapter changes {module!r}, where this program has no place for one; it has them at "
                f"{_summary(spec)}"
            )
        number = by_name[module]
        rank = _check_shapes(folder, module, a, b, spec.targets[number], spec.max_rank, config)
        a, b = a.to(spec.dtype), b.to(spec.dtype).T.contiguous()
        for name, tensor in (("A", a), ("B", b)):
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"{folder}: lora_{name} of {module!r} holds values that {spec.dtype} cannot hold")
        parts[number] = AdapterPart(a.contiguous(), b, _scale(module, rank, config))
    digest = hashlib.sha256(len(raw_config).to_bytes(8, "little") + raw_config)
    digest.update(raw_weights)
    return Adapter(digest.hexdigest(), parts)


def _config(folder: Path, raw: bytes) -> dict[str, Any]:
    path = folder / CONFIG
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {len(raw)} bytes; {MAX_CONFIG_BYTES} are allowed")
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {_short(config.get('peft_type'))}, only 'LORA' is supported")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{path}: bias is {_short(config['bias'])}, only 'none' is supported")
    init = config.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
        raise UnsupportedError(
            f"{path}: init_lora_weights is {_short(init)}, which changes the model's own weights; save the adapter "
            f"converted to plain LoRA"
        )
    value: Any
    for name, value in config.items():
        if name not in _WITHOUT_EFFECT | _READ and value:
            raise UnsupportedError(f"{path}: {name}={_short(value)} is not supported")
    for name, most in (("r", 1 << 20), ("lora_alpha", 1e9)):
        value = config.get(name)
        is_number = isinstance(value, int) or (name == "lora_alpha" and isinstance(value, float))
        if not is_number or isinstance(value, bool) or not 0 < value <= most:
            raise AdapterError(f"{path}: {name} must be a number above 0, got {_short(value)}")
    if not isinstance(config.get("use_rslora", False), bool):
        raise AdapterError(f"{path}: use_rslora must be true or false, got {_short(config['use_rslora'])}")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, name, config.get(name) or {})
    return config


def _check_pattern(path: Path, name: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise AdapterError(f"{path}: {name} must map names of modules to numbers, got {_short(pattern)}")
    for key, value in pattern.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e9:
            raise AdapterError(f"{path}: {name}[{_short(key)}] must be a number above 0, got {_short(value)}")
        # Ranks are those of the weights; a factor has nothing else to be told by.
        if name == "alpha_pattern" and not _PLAIN_NAME.fullmatch(key):
            raise UnsupportedError(f"{path}: {name} has the regular expression {_short(key)}; names are supported")


def _pairs(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if "lora_embedding_" in key:
            raise UnsupportedError(f"{folder}: {_short(key)}: adapters of embeddings are not supported")
        if "lora_magnitude_vector" in key:
            raise UnsupportedError(f"{folder}: {_short(key)}: DoRA is not supported")
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None or not key.startswith(_PREFIX):
            raise UnsupportedError(
                f"{folder}: the tensor {_short(key)} is no part of a plain LoRA adapter "
                f"({_PREFIX}<module>.lora_A.weight and lora_B.weight)"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors")
    for module, found in halves.items():
        if len(found) != 2:
            raise AdapterError(f"{folder}: {module!r} lacks lora_{'B' if 'A' in found else 'A'}")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def _check_shapes(
    folder: Path,
    module: str,
    a: torch.Tensor,
    b: torch.Tensor,
    target: LoraTarget,
    max_rank: int,
    config: Mapping[str, Any],
) -> int:
    """The rank of a pair, whose shapes must be those of the module, and whose rank one that the configuration names."""
    if not a.is_floating_point() or not b.is_floating_point():
        raise AdapterError(f"{folder}: the adapter of {module!r} has dtypes {a.dtype} and {b.dtype}, not floats")
    rank = len(a) if a.ndim == 2 else 0
    shapes = (tuple(a.shape), tuple(b.shape))
    if rank == 0 or shapes != ((rank, target.in_features), (target.out_features, rank)):
        raise AdapterError(
            f"{folder}: A and B of {module!r} are {list(a.shape)} and {list(b.shape)}; the module takes "
            f"[r, {target.in_features}] and [{target.out_features}, r]"
        )
    if rank > max_rank:
        raise AdapterError(f"{folder}: {module!r} has rank {rank}, max_lora_rank is {max_rank}")
    if rank not in (config["r"], *(config.get("rank_pattern") or {}).values()):
        raise AdapterError(f"{folder}: {module!r} has rank {rank}, {CONFIG} says r={config['r']}")
    return rank


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config["lora_alpha"]
    for key, value in (config.get("alpha_pattern") or {}).items():
        name = key.removeprefix("^").removesuffix("$")
        if module == name or (module.endswith(f".{name}") and not key.startswith("^")):
            alpha = value
            break
    # rsLoRA: Kalajdzievski, 2023.
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def _summary(spec: LoraSpec) -> str:
    """The targets' names without the numbers of their layers."""
    names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", target.name) for target in spec.targets)
    shown = list(names)[:20]
    return ", ".join(shown) + (" ..." if len(names) > len(shown) else "")


def _short(value: Any) -> str:
    return f"{value!r:.80}"
