"""Every Triton kernel compiled to machine code for three generations of GPUs. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from gpu.devices import is_refused, lower_for_cuda, planned_launches
from graphs.one_op import one_op_graph
from kernels.loop_programs import compiled, trace

from llmopt.codegen.loops import LoopKernel
from llmopt.codegen.triton.launch import Launch, compile_for
from llmopt.codegen.triton.loops import loop_launches
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
        if is_refused(sample):
            continue
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


def launches_of_loop(kernel: LoopKernel) -> list[Launch]:
    """The launches of a fused loop for sizes of 64 elements."""
    tensors = [torch.empty(1, dtype=getattr(torch, name)) for name in kernel.buffers]
    return loop_launches(kernel, tensors, [64] * len(kernel.symbols), torch.zeros(1, dtype=torch.int32))


def loops_of(function: Callable[..., object]) -> list[Launch]:
    """The launches of the fused loops of a function of one tensor, in bfloat16."""
    groups = compiled(function, torch.randn(3, 5, 12, dtype=torch.bfloat16), static=[-1]).plan.groups
    return [launch for group in groups for launch in launches_of_loop(group.kernel)]


def test_a_fused_loop() -> None:
    check(loops_of(lambda x: (x.softmax(-1) * x.tanh()).to(torch.float32)), 90)


def narrow(launch: Launch) -> list[str]:
    """The accesses to global memory of less than 8 bytes."""
    ptx = compile_for(launch, 90).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert accesses
    return [access for access in accesses if ".v2.b32" not in access and ".v4" not in access and ".b64" not in access]


def test_accesses_of_a_loop_are_wide() -> None:
    x = torch.zeros(64, 4096, dtype=torch.bfloat16)
    lowered = lower_for_cuda(trace(lambda x: [torch.nn.functional.gelu(x) * 2], x, static=[-1]).graph)
    (launch,) = planned_launches(lowered, [x])
    assert narrow(launch) == []


def test_stores_of_a_product_are_wide() -> None:
    inputs = [torch.zeros(size, dtype=torch.bfloat16) for size in ((1, 256, 2048), (2048, 2048), (1, 256, 2048))]
    for function in (with_residual, lambda x, w, _: [torch.ops.llmopt.linear(x, [w], [None])]):
        lowered = lower_for_cuda(trace(function, *inputs, static=[-1, -2]).graph)
        (launch,) = planned_launches(lowered, inputs)
        assert [access for access in narrow(launch) if access.startswith("st")] == []


def with_residual(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
    return [residual + torch.ops.llmopt.linear(x, [w], [None])]


def test_a_product_with_an_epilogue() -> None:

    made: dict[str, Launch] = {}
    for rows in (1, 5, 70):
        inputs = [torch.zeros(size, dtype=torch.bfloat16) for size in ((1, rows, 2048), (64, 2048), (1, rows, 64))]
        lowered = lower_for_cuda(trace(with_residual, *inputs, static=[-1, -2]).graph)
        made |= {launch.kernel: launch for launch in planned_launches(lowered, inputs)}
    assert made.keys() == {"gemv", "gemm", "merge_splits"}
    check(list(made.values()), 90)


LOOPS: dict[str, Callable[[torch.Tensor], object]] = {
    "functions": lambda x: [f(x) for f in (torch.sin, torch.tan, torch.erf, torch.expm1, torch.log1p, torch.round)],
    "half types": lambda x: x.to(torch.float16).to(torch.float32) * 0.1 + x,
    "powers": lambda x: [x.pow(1.5), x.to(torch.int64).pow(5), x.fmod(0.7), x.remainder(0.7)],
    "integers": lambda x: [x.to(torch.int64) // 3, x.to(torch.int32) % 5, x.to(torch.int64) << 2],
    "conditions": lambda x: [torch.where(x > 0, x, -x), (x > 0).any(-1), (x > 0).all(0), x.isnan().logical_not()],
    "reductions": lambda x: [x.sum(-1), x.amax((0, 1)), x.prod(-1), x.to(torch.int64).amin(0), x.mean()],
    "layouts": lambda x: [torch.cat([x[..., 3:], -x[..., :3]], -1), x.transpose(-1, -2).contiguous(), x.flip(-1)],
    "gathers": lambda x: [x[:, x[0, :, 0].to(torch.int64).clamp(0, 4)], x.gather(-1, x.to(torch.int64).clamp(0, 11))],
    "float64": lambda x: x.to(torch.float64).exp().sum(-1),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITIES.get)
@pytest.mark.parametrize("name", LOOPS)
def test_fused_loops(name: str, capability: int) -> None:
    check(loops_of(LOOPS[name]), capability)
