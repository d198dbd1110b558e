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
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have
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
        assert binary.metadata.shared <= SHARED_MEMORY[capability], (launch.kernel, launch.constants)


@pytest.mark.parametrize("name", FAST)
def test_kernels_of_often_used_ops(name: str) -> None:
    check(launches_of(name, torch.bfloat16, 1), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITIES.get)
@pytest.mark.parametrize("name", [name for name in OPS if name != "constant"])
def test_every_kernel(name: str, capability: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(launches_of(name, dtype, 20), capability)


def sized(dtype: torch.dtype) -> list[tuple[str, tuple[object, ...]]]:
    """Calls with the widths of real models, in which tiles are as large as they get."""
    make = lambda *shape: torch.zeros(shape, dtype=dtype)  # noqa: E731
    found: list[tuple[str, tuple[object, ...]]] = []
    qkv = [make(n, 2048) for n in (2048, 512, 512)]
    found += [("linear", (make(1, rows, 2048), qkv, [None] * 3)) for rows in (1, 4, 16, 33, 256)]
    found.append(("linear", (make(1, 1, 8192), [make(2048, 8192)], [None])))
    for heads, groups, size in [(32, 8, 64), (32, 8, 128), (8, 4, 256), (32, 1, 64)]:
        for tokens in (1, 300):
            q, k = make(1, tokens, heads, size), make(1, tokens, groups, size)
            found.append(("attention", (q, k, k, None, True, size**-0.5, 0.0, 0, None, None)))
            caches = [make(40, groups, 16, size) for _ in range(2)]
            table, slots = torch.zeros(1, 40, dtype=torch.int32), torch.arange(tokens)
            starts, lengths = (torch.tensor(n, dtype=torch.int32) for n in ([0, tokens], [tokens + 9]))
            rest = (size**-0.5, 0.0, 0, None, None)
            found.append(("paged_attention", (q, k, k, *caches, slots, table, starts, lengths, *rest)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITIES.get)
def test_the_sizes_of_models_fit_into_shared_memory(capability: int) -> None:
    made: dict[object, Launch] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, sample in sized(dtype):
            graph, tensors = one_op_graph(OPS[name], sample)
            for launch in planned_launches(lower_for_cuda(graph), tensors):
                made[launch.kernel, dtype, tuple(launch.constants.items())] = launch
    check(list(made.values()), capability)
