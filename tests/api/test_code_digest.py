"""What a module would compute has one digest in every process, and another one once any of its code is replaced."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tqdm.std
from models.zoo import build
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from llmopt.code_digest import code_digest

FACTOR = 2.0
TABLE: dict[str, Any] = {"scale": lambda x: x * FACTOR}


def helper(x: torch.Tensor, bias: float = 1.0) -> torch.Tensor:
    return TABLE["scale"](x) + bias


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "twice")(helper(self.linear(x))) + self.eps

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * 2

    def unused(self) -> int:
        return 1


def _other(*_: Any, **__: Any) -> Any:
    return None


def _like_torch() -> Callable[..., Any]:
    """What takes a function's place often claims its name."""
    return functools.wraps(nn.functional.silu)(_other)


Patch = Callable[[pytest.MonkeyPatch, Inner], None]
CHANGES: dict[str, Patch] = {
    "forward": lambda patch, _: patch.setattr(Inner, "forward", _other),
    "method that a string names": lambda patch, _: patch.setattr(Inner, "twice", _other),
    "function": lambda patch, _: patch.setitem(globals(), "helper", _other),
    "default": lambda patch, _: patch.setattr(helper, "__defaults__", (3.0,)),
    "entry of a table": lambda patch, _: patch.setitem(TABLE, "scale", _other),
    "global number": lambda patch, _: patch.setitem(globals(), "FACTOR", 3.0),
    "function of torch": lambda patch, _: patch.setattr(nn.functional, "silu", _like_torch()),
    "class of torch": lambda patch, _: patch.setattr(nn.Linear, "forward", _other),
    "attribute": lambda _, module: setattr(module, "eps", 1e-6),
    "forward of the instance": lambda _, module: setattr(module, "forward", _other),
    "hook": lambda _, module: module.linear.register_forward_hook(_other) and None,
    "shape": lambda _, module: setattr(module, "linear", nn.Linear(4, 4, bias=False)),
    "dtype": lambda _, module: module.to(torch.bfloat16) and None,
    "training": lambda _, module: module.train(False) and None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest(Inner())
    changed = Inner()
    assert code_digest(changed) == before
    CHANGES[name](monkeypatch, changed)
    assert code_digest(changed) != before


def test_what_no_code_names_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest(Inner())
    monkeypatch.setattr(Inner, "unused", _other)
    assert code_digest(Inner()) == before


def test_where_a_model_was_read_from_has_no_part() -> None:
    here, there = build("llama"), build("llama")
    there.config._name_or_path = there.name_or_path = "/another/folder"
    assert code_digest(here) == code_digest(there)
    there.config.rms_norm_eps = 0.5
    assert code_digest(here) != code_digest(there)


def test_what_progress_bars_hold_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of all bars is made when the first is shown, which is between two loads of a model."""
    monkeypatch.setitem(TABLE, "scale", lambda x: tqdm.std.tqdm(x)._lock)
    monkeypatch.delattr(tqdm.std.tqdm, "_lock", raising=False)
    before = code_digest(Inner())
    tqdm.std.tqdm.get_lock()
    assert code_digest(Inner()) == before


def test_values_of_weights_have_no_part() -> None:
    module = Inner()
    before = code_digest(module)
    with torch.no_grad():
        module.linear.weight.add_(1)
    assert code_digest(module) == before


TRANSFORMERS: dict[str, tuple[Any, str]] = {
    "model": (modeling_llama.LlamaForCausalLM, "forward"),
    "layer": (modeling_llama.LlamaRMSNorm, "forward"),
    "function": (modeling_llama, "apply_rotary_pos_emb"),
    "masks": (modeling_llama, "create_causal_mask"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_patched_model_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = code_digest(model)
    owner, attribute = TRANSFORMERS[name]
    monkeypatch.setattr(owner, attribute, functools.wraps(getattr(owner, attribute))(_other))
    assert code_digest(model) != before


def test_a_patched_registry_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = code_digest(model)
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", _other)
    assert code_digest(model) != before


_PROCESS = """
import sys
from models.zoo import build
from llmopt.code_digest import code_digest
print(*(code_digest(build(name)) for name in sys.argv[1:]))
"""


def test_processes_agree() -> None:
    models, found = ("llama", "gemma2", "mixtral"), []
    for seed in ("1", "2"):  # of the hashes of strings, which order sets
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _PROCESS, *models]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(answer.stdout.split())
    assert found[0] == found[1] and len(set(found[0])) == len(models)
