"""The trained model that ships with the examples, with its tokenizer, and the first layers of it; compiled once."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmopt import LLM, LoRARequest

FOLDER = Path(__file__).parents[2] / "examples" / "models" / "target"
PROMPT = "def fibonacci(n):\n"


@functools.cache
def target_llm() -> LLM:
    """An LLM over the trained model, in float32 so that its tokens can be compared exactly."""
    return LLM(FOLDER, dtype="float32", max_model_len=256)


def write_shallow(path: Path, layers: int = 2) -> Path:
    """A folder like `FOLDER` with the model's first layers only: compiled in a third of the time, and no nonsense.

    For tests of what surrounds a model. Its tokens depend on their prompt as those of the whole model do.
    """
    path.mkdir(parents=True)
    for file in FOLDER.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, path)
    config = json.loads((FOLDER / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    tensors = load_file(FOLDER / "model.safetensors")
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in tensors}
    kept = {name: tensors[name] for name, found in numbers.items() if found is None or int(found[1]) < layers}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


def write_adapter(path: Path, seed: int = 0, base: Path = FOLDER) -> LoRARequest:
    """A random LoRA adapter of the gates of `base`'s model, large enough to change its tokens, in PEFT's format."""
    config = json.loads((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.gate_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, config["hidden_size"], generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(config["intermediate_size"], 4, generator=generator)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(path.name, path)
