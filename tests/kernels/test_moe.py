"""moe.h against a loop over rows and experts in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.harness import CPP_TYPE, run_kernel

from llmopt.codegen.cpu.native import KernelError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest value of a row: a few roundings of each intermediate value to the storage type.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Silu": torch.nn.functional.silu,
    "GeluErf": torch.nn.functional.gelu,
    "GeluTanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "Relu": torch.relu,
}
GUARD = 64


class Layer:
    """Random operands of one call."""

    def __init__(
        self,
        rows: int,
        hidden: int,
        inner: int,
        experts: int,
        k: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        self.x = torch.randn(rows, hidden + 3).to(dtype)[:, :hidden]
        self.ids = torch.stack([torch.randperm(experts)[:k] for _ in range(rows)])
        self.weights = torch.rand(rows, k).to(weight_dtype or dtype)
        self.gate_up = (torch.randn(experts, 2 * inner, hidden) * hidden**-0.5 * 2).to(dtype)
        self.down = (torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype)

    def run(self, act: str = "Silu", *, threads: int = 2, variant: str = "host") -> torch.Tensor:
        rows, hidden = self.x.shape
        experts, _, inner = self.down.shape
        k = self.ids.shape[1]
        out = torch.full((rows, hidden + 5), float("nan"), dtype=self.x.dtype)
        size = 128 + 4 * (2 * rows * k + experts + 1) + rows * k * (2 * inner + hidden) * self.x.element_size()
        workspace = torch.full((size + GUARD,), 0xA5, dtype=torch.uint8)
        try:
            run_kernel(
                "moe.h",
                f"moe<{CPP_TYPE[self.x.dtype]}, {CPP_TYPE[self.weights.dtype]}, llmopt::{act}>",
                [self.x, self.ids, self.weights, self.gate_up, self.down, out, workspace],
                [rows, hidden, inner, experts, k, self.x.stride(0), out.stride(0)],
                threads=threads,
                variant=variant,
            )
        finally:
            assert (workspace[size:] == 0xA5).all(), "wrote beyond the workspace"
            assert out[:, hidden:].isnan().all(), "wrote beyond the row"
        return out[:, :hidden]

    def expected(self, act: str = "Silu") -> torch.Tensor:
        inner = self.down.shape[2]
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for row in range(self.x.shape[0]):
            for expert, weight in zip(self.ids[row].tolist(), self.weights[row].double(), strict=True):
                both = self.gate_up[expert].double() @ self.x[row].double()
                out[row] += weight * (self.down[expert].double() @ (ACTIVATIONS[act](both[:inner]) * both[inner:]))
        return out

    def check(self, act: str = "Silu", *, threads: int = 2, variant: str = "host") -> None:
        expected = self.expected(act)
        error = (self.run(act, threads=threads, variant=variant).double() - expected).abs().amax(1)
        assert (error <= TOLERANCE[self.x.dtype] * expected.abs().amax(1).clamp_min(1e-2)).all(), error.max()


@pytest.mark.parametrize("variant", ["host", "portable", "avx512_bf16_emulated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_definition(dtype: torch.dtype, variant: str) -> None:
    for rows, hidden, inner, experts, k in [
        (1, 40, 24, 4, 2),
        (5, 33, 17, 3, 3),
        (64, 48, 35, 8, 2),
        (301, 20, 9, 5, 1),
    ]:
        for threads in (1, 2):
            Layer(rows, hidden, inner, experts, k, dtype).check(threads=threads, variant=variant)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    layer = Layer(7, 30, 21, 4, 2, torch.float32)
    layer.check(act)
    others = [layer.run(other) for other in ACTIVATIONS if other != act]
    assert not any(torch.equal(layer.run(act), other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_weights(dtype: torch.dtype) -> None:
    Layer(9, 32, 16, 4, 2, dtype, torch.float32).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_on_one_expert(dtype: torch.dtype) -> None:
    # 90 rows meet the blocked product, the experts that are not hit are not numbers and must not be read.
    layer = Layer(90, 40, 30, 6, 1, dtype)
    layer.ids.fill_(4)
    layer.gate_up[[0, 1, 2, 3, 5]] = float("nan")
    layer.down[[0, 1, 2, 3, 5]] = float("nan")
    layer.check()


def test_one_expert_twice_in_a_row() -> None:
    layer = Layer(6, 24, 12, 4, 2, torch.float32)
    layer.ids.fill_(1)
    layer.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_where_the_layers_round(dtype: torch.dtype) -> None:
    layer = Layer(30, 64, 32, 4, 2, dtype)
    inner = layer.down.shape[2]
    terms = []
    for j in range(layer.ids.shape[1]):
        both = torch.stack(
            [
                (layer.gate_up[e].float() @ row.float()).to(dtype)
                for e, row in zip(layer.ids[:, j], layer.x, strict=True)
            ]
        )
        hidden = ACTIVATIONS["Silu"](both[:, :inner]) * both[:, inner:]
        result = torch.stack(
            [(layer.down[e].float() @ row.float()).to(dtype) for e, row in zip(layer.ids[:, j], hidden, strict=True)]
        )
        terms.append((result * layer.weights[:, j, None]).float())
    eager = torch.stack(terms).sum(0).to(dtype)
    # Only the order of the float additions differs, so all but a few values are the same to the last bit.
    if dtype == torch.float32:
        torch.testing.assert_close(layer.run(), eager, rtol=1e-4, atol=1e-5)
    else:
        assert (layer.run() == eager).double().mean() > 0.97


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    layer = Layer(37, 70, 33, 5, 2, dtype)
    assert torch.equal(layer.run(threads=1), layer.run(threads=2))


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
@pytest.mark.parametrize("threads", [1, 2])
def test_id_out_of_range(bad: int, threads: int) -> None:
    layer = Layer(5, 16, 8, 4, 2, torch.float32)
    layer.ids[3, 1] = bad
    with pytest.raises(KernelError, match="index out of range"):
        layer.run(threads=threads)
    layer.ids[3, 1] = 0
    layer.check(threads=threads)


def test_no_rows() -> None:
    layer = Layer(1, 16, 8, 4, 2, torch.float32)
    layer.x, layer.ids, layer.weights = layer.x[:0], layer.ids[:0], layer.weights[:0]
    assert layer.run().shape == (0, 16)
