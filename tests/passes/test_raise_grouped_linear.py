"""Grouped products that no mixture of experts explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor
from transformers.integrations import moe as _registers_the_op  # noqa: F401

from llmopt.compiler.graph import nodes_of
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.raise_grouped_linear import RaiseGroupedLinear

ROWS, K, N, EXPERTS = 7, 12, 5, 3
X, ENDS = torch.randn(ROWS, K), torch.tensor([2, 2, ROWS], dtype=torch.int32)
STORED = {"[E, N, K]": torch.randn(EXPERTS, N, K), "[E, K, N]": torch.randn(EXPERTS, K, N)}


def product(x: Tensor, weights: Tensor, ends: Tensor) -> Any:
    turned = weights.mT if weights.shape[-1] == K else weights
    return torch.ops.transformers.grouped_mm_fallback(x.cos(), turned, ends).relu()


# Random ends would be none, so they are an input of the graph only where nothing is compared.
def with_ends(x: Tensor, weights: Tensor) -> Any:
    return product(x, weights, torch.arange(1, EXPERTS + 1, dtype=torch.int32) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORED)
def test_either_storage(name: str, dtype: torch.dtype) -> None:
    result = rewrite(RaiseGroupedLinear(), with_ends, X.to(dtype), STORED[name].to(dtype))
    assert result.report.matched == 1
    (node,) = nodes_of(result.after, llmopt_ops.grouped_linear.default)
    assert (node.args[1].op == "placeholder") == (name == "[E, N, K]"), "a copy only where one is needed"


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseGroupedLinear(), with_ends, X, STORED["[E, N, K]"]),
        """\
arg_0: f32[3, 5, 12]
arg_1: f32[7, 12]
arange: i32[3] = aten.arange.start(1, 4, dtype=torch.int32, device=cpu, pin_memory=False)
mul: i32[3] = aten.mul.Tensor(arange, 2)
transpose: f32[3, 12, 5] = aten.transpose.int(arg_0, -2, -1)
cos: f32[7, 12] = aten.cos.default(arg_1)
grouped_mm_fallback: f32[7, 5] = transformers.grouped_mm_fallback.default(cos, transpose, mul)
relu: f32[7, 5] = aten.relu.default(grouped_mm_fallback)
return [relu]
---
arg_0: f32[3, 5, 12]
arg_1: f32[7, 12]
arange: i32[3] = aten.arange.start(1, 4, dtype=torch.int32, device=cpu, pin_memory=False)
mul: i32[3] = aten.mul.Tensor(arange, 2)
cos: f32[7, 12] = aten.cos.default(arg_1)
grouped_linear: f32[7, 5] = llmopt.grouped_linear.default(cos, arg_0, mul)
relu: f32[7, 5] = aten.relu.default(grouped_linear)
return [relu]""",
    )


def test_disabled() -> None:
    targets = ops_when_disabled(RaiseGroupedLinear(), with_ends, X, STORED["[E, N, K]"])
    assert "llmopt.grouped_linear" not in targets and [t for t in targets if "grouped_mm" in t]


@pytest.mark.parametrize("name", STORED)
@torch.no_grad()
def test_through_the_backend(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(product, backend="llmopt", dynamic=True, options={"fallback": "error"})
    for ends in ([2, 2, 7], [0, 0, 0], [7, 7, 7], [1, 4, 6]):
        where = torch.tensor(ends, dtype=torch.int32)
        torch.testing.assert_close(compiled(X, STORED[name], where), product(X, STORED[name], where))


def test_products_that_are_not_grouped() -> None:
    must_not_fire(RaiseGroupedLinear(), None, lambda x, w: x @ w[0].mT, X, STORED["[E, N, K]"])
