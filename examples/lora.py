"""Two LoRA adapters and the model itself in one batch. The adapters are made here, at random, as PEFT would save them.

usage: python examples/lora.py
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import llmopt

MODEL = Path(__file__).parent / "models" / "target"


def make_adapter(folder: Path, seed: int, rank: int = 8) -> llmopt.LoRARequest:
    """An adapter of every query and output projection, in PEFT's format."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden = config["hidden_size"]
    width = config["num_attention_heads"] * config.get("head_dim", hidden // config["num_attention_heads"])
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, k, n in (("q_proj", hidden, width), ("o_proj", width, hidden)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * k**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return llmopt.LoRARequest(folder.name, folder)


def main() -> None:
    llm = llmopt.LLM(MODEL, dtype="float32", enable_lora=True, max_loras=2, max_lora_rank=8)
    greedy = llmopt.SamplingParams(temperature=0.0, max_tokens=16)
    with tempfile.TemporaryDirectory() as work:
        adapters = [None, make_adapter(Path(work) / "first", 1), make_adapter(Path(work) / "second", 2)]
        outputs = llm.generate(["def fib(n):"] * 3, greedy, lora_request=adapters)
    for adapter, output in zip(adapters, outputs, strict=True):
        print(f"--- {adapter.lora_name if adapter else 'without an adapter'}")
        print(f"{output.prompt}{output.outputs[0].text}")


if __name__ == "__main__":
    main()
