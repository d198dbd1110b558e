"""PEFT's folders: what is read from them, and everything that is refused, by name and before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.compiler.step import LoraSpec, LoraTarget
from llmopt.errors import AdapterError, UnsupportedError
from llmopt.runtime.adapters import Adapter, AdapterPool
from llmopt.runtime.peft_folder import read_adapter, stamp

TARGETS = (LoraTarget("layers.0.q", 6, 10), LoraTarget("layers.0.v", 6, 4), LoraTarget("layers.1.q", 6, 10))
SPEC = LoraSpec(TARGETS, 2, 4, torch.float32)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"], "bias": "none"}
# A configuration as PEFT 0.18 writes it, with every default.
COMPLETE: dict[str, Any] = {
    **CONFIG,
    **{
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/model",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_version": "0.18.0",
        "qalora_group_size": 16,
        "rank_pattern": {},
        "revision": None,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    },
}


def pair(module: str = "layers.0.q", k: int = 6, n: int = 10, rank: int = 2) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.randn(rank, k), f"{name}.lora_B.weight": torch.randn(n, rank)}


def write(folder: Path, config: Any = CONFIG, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(pair() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def test_parts(tmp_path: Path) -> None:
    tensors = pair() | pair("layers.0.v", n=4)
    adapter = read_adapter(write(tmp_path, COMPLETE, tensors), SPEC)
    assert sorted(adapter.parts) == [0, 1]
    part = adapter.parts[1]
    assert torch.equal(part.a, tensors["base_model.model.layers.0.v.lora_A.weight"])
    assert torch.equal(part.b, tensors["base_model.model.layers.0.v.lora_B.weight"].T)
    assert part.scale == 1.5


def test_dtype_is_the_programs(tmp_path: Path) -> None:
    spec = LoraSpec(TARGETS, 2, 4, torch.bfloat16)
    part = read_adapter(write(tmp_path), spec).parts[0]
    assert part.a.dtype == part.b.dtype == torch.bfloat16 and part.b.is_contiguous()


SCALES: list[tuple[dict[str, Any], float]] = [
    ({"lora_alpha": 7}, 3.5),
    ({"lora_alpha": 7, "use_rslora": True}, 7 / math.sqrt(2)),
    ({"alpha_pattern": {"q": 5}}, 2.5),
    ({"alpha_pattern": {"layers.0.q": 5, "q": 9}}, 2.5),
    ({"alpha_pattern": {"^layers.0.q$": 5}}, 2.5),
    ({"alpha_pattern": {"^q": 5}}, 1.5),
    ({"alpha_pattern": {"0.v": 5}}, 1.5),
    ({"r": 9, "rank_pattern": {r".*\.q": 2}}, 1.5),
    ({"init_lora_weights": "gaussian", "fan_in_fan_out": True}, 1.5),
]


@pytest.mark.parametrize(("changes", "scale"), SCALES, ids=[str(changes) for changes, _ in SCALES])
def test_scales(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    assert read_adapter(write(tmp_path, {**CONFIG, **changes}), SPEC).parts[0].scale == pytest.approx(scale)


def test_keys_say_what_the_files_hold(tmp_path: Path) -> None:
    tensors = pair()
    one = read_adapter(write(tmp_path / "1", tensors=tensors), SPEC)
    same = read_adapter(write(tmp_path / "2", tensors=tensors), SPEC)
    other_scale = read_adapter(write(tmp_path / "3", {**CONFIG, "lora_alpha": 4}, tensors), SPEC)
    other_weights = read_adapter(write(tmp_path / "4"), SPEC)
    assert one.key == same.key
    assert len({one.key, other_scale.key, other_weights.key}) == 3
    before = stamp(tmp_path / "1")
    assert stamp(tmp_path / "1") == before
    write(tmp_path / "1")
    assert stamp(tmp_path / "1") != before


CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"peft_type": "IA3"}, UnsupportedError, "peft_type is 'IA3'"),
    ({"peft_type": None}, UnsupportedError, "peft_type is None"),
    ({"use_dora": True}, UnsupportedError, "use_dora=True"),
    ({"bias": "all"}, UnsupportedError, "bias is 'all'"),
    ({"lora_bias": True}, UnsupportedError, "lora_bias=True"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save="),
    ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication="),
    ({"target_parameters": ["experts.down"]}, UnsupportedError, "target_parameters="),
    ({"trainable_token_indices": [3]}, UnsupportedError, "trainable_token_indices="),
    ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": 3}, UnsupportedError, "init_lora_weights is 3"),
    ({"something_new": {"a": 1}}, UnsupportedError, "something_new="),
    ({"alpha_pattern": {"(a+)+$": 2}}, UnsupportedError, "regular expression"),
    ({"alpha_pattern": {"q": "2"}}, AdapterError, r"alpha_pattern\['q'\] must be"),
    ({"alpha_pattern": [1]}, AdapterError, "alpha_pattern must map"),
    ({"rank_pattern": {"q": -1}}, AdapterError, r"rank_pattern\['q'\] must be"),
    ({"r": 0}, AdapterError, "r must be"),
    ({"r": "2"}, AdapterError, "r must be"),
    ({"r": True}, AdapterError, "r must be"),
    ({"lora_alpha": None}, AdapterError, "lora_alpha must be"),
    ({"lora_alpha": float("nan")}, AdapterError, "lora_alpha must be"),
    ({"use_rslora": "no"}, AdapterError, "use_rslora must be"),
    ({"r": 3}, AdapterError, "rank 2, adapter_config.json says r=3"),
]


@pytest.mark.parametrize(("changes", "kind", "text"), CONFIGS, ids=[str(changes) for changes, _, _ in CONFIGS])
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        read_adapter(write(tmp_path, {**CONFIG, **changes}), SPEC)


Q = "base_model.model.layers.0.q"
TENSORS: list[tuple[dict[str, torch.Tensor], type[Exception], str]] = [
    ({}, AdapterError, "holds no tensors"),
    ({f"{Q}.lora_A.weight": torch.ones(2, 6)}, AdapterError, "lacks lora_B"),
    ({f"{Q}.lora_B.weight": torch.ones(10, 2)}, AdapterError, "lacks lora_A"),
    (pair() | {f"{Q}.lora_magnitude_vector": torch.ones(10)}, UnsupportedError, "DoRA"),
    ({"base_model.model.embed.lora_embedding_A": torch.ones(2, 9)}, UnsupportedError, "embeddings"),
    (pair() | {f"{Q}.lora_B.bias": torch.ones(10)}, UnsupportedError, "no part of a plain LoRA adapter"),
    (pair() | {"base_model.model.lm_head.weight": torch.ones(9, 6)}, UnsupportedError, "no part of a plain LoRA"),
    ({"layers.0.q.lora_A.weight": torch.ones(2, 6)}, UnsupportedError, "no part of a plain LoRA adapter"),
    (pair("layers.7.q"), AdapterError, r"'layers.7.q', where.*layers.\*.q, layers.\*.v"),
    (pair(k=5), AdapterError, r"are \[2, 5\] and \[10, 2\]; the module takes \[r, 6\] and \[10, r\]"),
    (pair(n=9), AdapterError, "the module takes"),
    ({f"{Q}.lora_A.weight": torch.ones(6), f"{Q}.lora_B.weight": torch.ones(10)}, AdapterError, "module takes"),
    ({f"{Q}.lora_A.weight": torch.ones(0, 6), f"{Q}.lora_B.weight": torch.ones(10, 0)}, AdapterError, "module takes"),
    (pair(rank=5), AdapterError, "rank 5, max_lora_rank is 4"),
    ({k: v.to(torch.int8) for k, v in pair().items()}, AdapterError, "not floats"),
    ({k: v * math.inf for k, v in pair().items()}, AdapterError, "cannot hold"),
    ({k: v * math.nan for k, v in pair().items()}, AdapterError, "cannot hold"),
]


@pytest.mark.parametrize(("tensors", "kind", "text"), TENSORS, ids=[text for _, _, text in TENSORS])
def test_tensors_that_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        read_adapter(write(tmp_path, tensors=tensors), SPEC)


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


FILES: list[tuple[Callable[[Path], Any], type[Exception], str]] = [
    (_cut, AdapterError, "no valid safetensors file"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), AdapterError, "no valid safetensors file"),
    (lambda f: (f / "adapter_config.json").write_text("{"), AdapterError, "is no JSON"),
    (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), AdapterError, "is no JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[1]"), AdapterError, "no JSON object"),
    (lambda f: (f / "adapter_config.json").write_text("[" * 100000), AdapterError, "is no JSON"),
    (lambda f: (f / "adapter_config.json").write_text(" " * (1 << 20) + "{}"), AdapterError, "are allowed"),
    (lambda f: (f / "adapter_config.json").unlink(), AdapterError, "adapter_config.json cannot be read"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterError, "no folder of a PEFT adapter"),
    (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        UnsupportedError,
        "pickled weights",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "text"), FILES, ids=[f"{n} {row[2]}" for n, row in enumerate(FILES)])
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], Any], kind: type[Exception], text: str) -> None:
    folder = write(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(kind, match=text):
        read_adapter(folder, SPEC)


def test_a_name_with_a_null_byte(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no folder"):
        read_adapter(tmp_path / "a\0b", SPEC)


def test_the_pool_holds_what_was_read(tmp_path: Path) -> None:
    """A slot has A, and B transposed, of each target; another adapter replaces all that was there."""
    tensors = pair("layers.0.v", n=4) | pair("layers.1.q")
    first = read_adapter(write(tmp_path / "1", tensors=tensors), SPEC)
    pool = AdapterPool(SPEC)
    pool.load(1, first)
    memory, ranks, scales = pool.tensors
    assert ranks.tolist() == [[0, 0], [0, 2], [0, 2]]
    assert scales.tolist() == [[0, 0], [0, 1.5], [0, 1.5]]
    begin, behind = SPEC.offsets[1], SPEC.offsets[1] + 4 * 6
    loaded = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert torch.equal(memory[1, begin : begin + 12].view(2, 6), loaded["base_model.model.layers.0.v.lora_A.weight"])
    assert torch.equal(memory[1, behind : behind + 8].view(2, 4).T, loaded["base_model.model.layers.0.v.lora_B.weight"])
    pool.load(1, Adapter("other", {}))
    assert ranks.sum() == 0 and pool.num_loads == 2
    pool.load(1, Adapter("other", {}))
    assert pool.num_loads == 2, "it was there"
