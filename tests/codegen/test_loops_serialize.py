"""The JSON form of loop kernels: equal after a round trip, and nothing malformed gets through."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.loop_programs import compiled

from llmopt.codegen.loops import LoopKernel, kernel_from_json, kernel_to_json
from llmopt.codegen.loops.ir import Constant, Nest, Store, Sweep
from llmopt.compiler.errors import ProgramFileError


def sample() -> LoopKernel:
    """A kernel with every kind of value: two sweeps, an accumulator, a cast, an index and constants."""

    def function(x: torch.Tensor) -> torch.Tensor:
        low = torch.where(torch.arange(x.shape[1]) < 3, x.float(), float("-inf"))
        return (low - low.amax(-1, keepdim=True)).exp().to(torch.bfloat16)

    (group,) = compiled(function, torch.randn(5, 7).bfloat16()).plan.groups
    return group.kernel


def test_round_trip() -> None:
    kernel = sample()
    text = json.dumps(kernel_to_json(kernel), allow_nan=False)
    kinds = {value[0] for nest in json.loads(text)["nests"] for s in nest["sweeps"] for value in s["values"]}
    assert kinds == {"load", "constant", "index", "local", "call", "cast"}
    again = kernel_from_json(json.loads(text))
    assert again == kernel
    assert hash(again) == hash(kernel)


@pytest.mark.parametrize("value", [0.1, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38])
def test_floats_are_exact(value: float) -> None:
    sweep = Sweep((), (Constant(value, "float32"),), (), (Store(0, 0, 0),))
    kernel = LoopKernel("k", (), ("float32",), 0, (Nest((), (), (sweep,)),))
    assert kernel_from_json(json.loads(json.dumps(kernel_to_json(kernel), allow_nan=False))) == kernel


def edit(path: str, value: Any) -> Callable[[Any], None]:
    """Replaces the item at a dotted path; `...` deletes it."""

    def apply(data: Any) -> None:
        *parents, last = [int(p) if p.lstrip("-").isdigit() else p for p in path.split(".")]
        for parent in parents:
            data = data[parent]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


V = "nests.0.sweeps.0.values"


@pytest.mark.parametrize(
    "change",
    [
        edit("name", "a b"),
        edit("name", 'x"\n#include "/etc/passwd'),
        edit("name", 3),
        edit("name", ...),
        edit("symbols", ["s0", "s0"]),
        edit("symbols.0", "s0; int x"),
        edit("symbols.0", "main"),
        edit("symbols", "s0"),
        edit("buffers.0", "float8"),
        edit("buffers.0", "int64"),
        edit("buffers", []),
        edit("num_inputs", -1),
        edit("num_inputs", 99),
        edit("num_inputs", True),
        edit("nests", {}),
        edit("nests.0.sizes.0", "t"),
        edit("nests.0.sizes.0", ["+", "i0", 1]),
        edit("nests.0.accumulators.0.0", "median"),
        edit("nests.0.accumulators.0.1", "bfloat16"),
        edit("nests.0.accumulators.0", ["max"]),
        edit("nests.0.accumulators", []),
        edit("nests.0.sweeps.0.sizes.0", "j0"),
        edit("nests.0.sweeps.0.accumulates.0.0", 7),
        edit("nests.0.sweeps.0.accumulates.0.1", 999),
        edit("nests.0.sweeps.-1.stores.0.0", 0),
        edit("nests.0.sweeps.-1.stores.0.1", "i9"),
        edit("nests.0.sweeps.-1.stores.0.2", -1),
        edit("nests.0.sweeps.-1.stores.0.2", 0),
        edit("nests.0.sweeps.-1.extra", 1),
        edit(f"{V}.0", ["load", "float32"]),
        edit(f"{V}.0", ["exec", "float32", 1]),
        edit(f"{V}.0", ["load", "float32", 0, "i0", 0]),
        edit(f"{V}.0", ["load", "float32", 1, 0, -1]),
        edit(f"{V}.0", ["load", "int64", 0, 0, -1]),
        edit(f"{V}.0", ["local", "float32", 0]),
        edit(f"{V}.0", ["local", "float32", 4]),
        edit(f"{V}.0", ["call", "float32", "system", []]),
        edit(f"{V}.0", ["call", "float32", "exp", [0]]),
        edit(f"{V}.0", ["call", "float32", "exp", []]),
        edit(f"{V}.0", ["cast", "float32", -1]),
        edit(f"{V}.0", ["constant", "float32", "1.0f); abort("]),
        edit(f"{V}.0", ["constant", "float32", 1.0]),
        edit(f"{V}.0", ["constant", "int8", 128]),
        edit(f"{V}.0", ["constant", "bool", 1]),
        edit(f"{V}.0", ["index", "float32", 0]),
        edit(f"{V}.0", None),
    ],
)
def test_malformed_kernels_are_refused(change: Callable[[Any], None]) -> None:
    data = copy.deepcopy(kernel_to_json(sample()))
    change(data)
    with pytest.raises(ProgramFileError):
        kernel_from_json(data)


@pytest.mark.parametrize("data", [None, [], "kernel", {}, 3])
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(ProgramFileError):
        kernel_from_json(data)


def test_a_call_of_other_types_is_refused() -> None:
    data = kernel_to_json(sample())
    values = data["nests"][0]["sweeps"][0]["values"]
    at = next(n for n, v in enumerate(values) if v[0] == "call" and v[2] == "lt")
    values[at][2] = "add"
    with pytest.raises(ProgramFileError, match="add"):
        kernel_from_json(data)
