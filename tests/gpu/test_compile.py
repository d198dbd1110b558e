"""Every Triton kernel compiled to machine code for three generations of GPUs. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
from gpu.devices import lower_for_cuda, planned_launches
from graphs.one_op import one_op_graph

from llmopt.codegen.triton.launch import Launch, compile_for
from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)
from llmopt.compiler.opspec import OPS

pytest.importorskip("triton", reason="GPU kernels need triton")

CAPABILITIES = {80: "ampere", 90: "hopper", 100: "blackwell"}
FAST = ["linear", "add_rms_norm", "paged_attention"]


def launches_of(name: str, dtype: torch.dtype, samples: int) -> list[Launch]:
    """The launches of an op's samples, one for each kernel and set of compile-time arguments."""
    spec = OPS[name]
    made: dict[object, Launch] = {}
    for number, sample in enumerate(spec.samples(dtype, torch.Generator().manual_seed(0))):
        if number == samples:
            break
        graph, tensors = one_op_graph(spec, sample)
        for launch in planned_launches(lower_for_cuda(graph), tensors):
            made[launch.kernel, tuple(launch.constants.items()), launch.source] = launch
    return list(made.values())


def check(launches: list[Launch], capability: int) -> None:
    assert launches
    for launch in launches:
        binary = compile_for(launch, capability)
        assert f"sm_{capability}" in binary.asm["ptx"], launch.kernel
        assert len(binary.asm["cubin"]) > 1000


@pytest.mark.parametrize("name", FAST)
def test_kernels_of_often_used_ops(name: str) -> None:
    check(launches_of(name, torch.bfloat16, 1), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITIES.get)
@pytest.mark.parametrize("name", [name for name in OPS if name != "constant"])
def test_every_kernel(name: str, capability: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(launches_of(name, dtype, 20), capability)
