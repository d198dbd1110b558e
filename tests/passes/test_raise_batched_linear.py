"""Products of two computed tensors, whatever PyTorch calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.passes.raise_batched_linear import RaiseBatchedLinear

A, B, C = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 7), torch.randn(6, 5, 7)

PRODUCTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "matmul": (lambda a, b, c: a.cos() @ b.cos(), "batched_linear"),
    "transposed": (lambda a, b, c: a.cos() @ b.mT.contiguous().cos().mT, "batched_linear"),
    "broadcast": (lambda a, b, c: a.cos() @ b[:, :1].cos(), "batched_linear"),
    "vector": (lambda a, b, c: a.cos() @ b[0, 0, :, 0].cos(), "linear"),
    "from a vector": (lambda a, b, c: a[0, 0, 0].cos() @ b.cos(), "batched_linear"),
    "two vectors": (lambda a, b, c: a[0, 0, 0].cos() @ b[0, 0, :, 0].cos(), "linear"),
    "matrix": (lambda a, b, c: a.cos() @ b[0, 0].cos(), "linear"),
    "bmm": (lambda a, b, c: torch.bmm(a.flatten(0, 1), b.flatten(0, 1)), "batched_linear"),
    "baddbmm": (lambda a, b, c: torch.baddbmm(c, a.flatten(0, 1), b.flatten(0, 1)), "batched_linear"),
    "scaled": (
        lambda a, b, c: torch.baddbmm(c, a.flatten(0, 1), b.flatten(0, 1), beta=0.5, alpha=3.0),
        "batched_linear",
    ),
    "without addend": (
        lambda a, b, c: torch.baddbmm(c, a.flatten(0, 1), b.flatten(0, 1), beta=0.0),
        "batched_linear",
    ),
    "einsum": (lambda a, b, c: torch.einsum("bhsd,bhdn->bnhs", a, b), "batched_linear"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dynamic: bool) -> None:
    function, op = PRODUCTS[name]
    result = rewrite(RaiseBatchedLinear(), function, A, B, C, dynamic=dynamic)
    assert result.report.matched == 1 and result.count(f"llmopt.{op}") == 1
    assert not {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"} & set(result.targets())


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseBatchedLinear(), lambda a, c: torch.baddbmm(c, a, a.mT, alpha=2), A[0], torch.randn(3, 5, 5)),
        """\
arg_0: f32[3, 5, 8]
arg_1: f32[3, 5, 5]
transpose: f32[3, 8, 5] = aten.transpose.int(arg_0, -2, -1)
baddbmm: f32[3, 5, 5] = aten.baddbmm.default(arg_1, arg_0, transpose, alpha=2)
return [baddbmm]
---
arg_0: f32[3, 5, 8]
arg_1: f32[3, 5, 5]
batched_linear: f32[3, 5, 5] = llmopt.batched_linear.default(arg_0, arg_0)
mul: f32[3, 5, 5] = aten.mul.Tensor(batched_linear, 2)
add: f32[3, 5, 5] = aten.add.Tensor(mul, arg_1)
return [add]""",
    )


def test_disabled() -> None:
    assert "llmopt.batched_linear" not in ops_when_disabled(RaiseBatchedLinear(), lambda a, b: a @ b, A, B)


def test_outer_products_are_left_to_loops() -> None:
    must_not_fire(RaiseBatchedLinear(), "an outer product", lambda a, b: a[..., :1] @ b[..., :1, :], A, B)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    must_not_fire(RaiseBatchedLinear(), f"no product of {dtype} and {dtype}", torch.matmul, A.to(dtype), B.to(dtype))
