"""Random LoRA adapters in PEFT's documented format, and models with such an adapter merged by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# How large a merged adapter is beside the weights: large enough to change tokens.
STRENGTH = 0.5


@dataclass
class Folder:
    """An adapter as PEFT saves it: the configuration, and A `[r, in]` and B `[out, r]` of each module."""

    path: Path
    config: dict[str, Any]
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def scale(self, module: str) -> float:
        """What multiplies B @ A, as PEFT's documentation has it."""
        alpha, rank = self.config["lora_alpha"], len(self.pairs[module][0])
        for name, value in self.config.get("alpha_pattern", {}).items():
            if module == name or module.endswith("." + name):
                alpha = value
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def save(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        tensors = {}
        for module, (a, b) in self.pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        save_file(tensors, self.path / "adapter_model.safetensors")
        return self.path


def _projections(model: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """Every linear layer, also GPT-2's that keep their weights turned: (module, in, out)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module, module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":
            found[name] = module, *module.weight.shape
    return found


def make_adapter(
    path: Path,
    model: nn.Module,
    endings: tuple[str, ...],
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Folder:
    """A saved adapter on the layers whose names end so; `ranks` by ending where they differ from `rank`."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(endings), "bias": "none"}
    folder = Folder(path, {**settings, "lora_dropout": 0.1, "rank_pattern": dict(ranks or {}), **config})
    for name, (module, k, n) in _projections(model).items():
        if not name.endswith(endings):
            continue
        r = next((value for ending, value in (ranks or {}).items() if name.endswith(ending)), rank)
        folder.pairs[name] = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
        # B @ A has entries of the size of the weight's, whatever rank and scale are.
        size = float(module.weight.detach().float().std()) * STRENGTH / (math.sqrt(r) * folder.scale(name))
        folder.pairs[name] = folder.pairs[name][0] * math.sqrt(size), folder.pairs[name][1] * math.sqrt(size)
    assert folder.pairs, f"no layer ends in {endings}"
    folder.save()
    return folder


@torch.no_grad()
def merged(model: nn.Module, folder: Folder) -> Any:
    """The model with `W + scale * B @ A` in place of W."""
    result = copy.deepcopy(model)
    projections = _projections(result)
    for name, (a, b) in folder.pairs.items():
        module, delta = projections[name][0], folder.scale(name) * (b @ a)
        if isinstance(module, nn.Linear) and name == "lm_head":
            module.weight = nn.Parameter(module.weight + delta)  # untied: PEFT changes the product, not the embedding
        else:
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    return result
