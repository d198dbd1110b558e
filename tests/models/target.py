"""The trained model that ships with the examples, with its tokenizer; compiled once for all tests."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmopt import LLM, LoRARequest

FOLDER = Path(__file__).parents[2] / "examples" / "models" / "target"
PROMPT = "def fibonacci(n):\n"


@functools.cache
def target_llm() -> LLM:
    """An LLM over the trained model, in float32 so that its tokens can be compared exactly."""
    return LLM(FOLDER, dtype="float32", max_model_len=256)


def write_adapter(path: Path, seed: int = 0) -> LoRARequest:
    """A random LoRA adapter of the trained model's gates, large enough to change its tokens, in PEFT's format."""
    config = json.loads((FOLDER / "config.json").read_text())
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
