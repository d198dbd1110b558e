"""Operands that kernels would misread: the planners refuse them, whatever computes them then is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs.one_op import run_compiled

from llmopt.codegen.cpu.templates import plan_template
from llmopt.codegen.densify import densify
from llmopt.compiler.graph import nodes_of
from llmopt.compiler.opspec import OPS
from llmopt.testing import one_op_graph

W, B = torch.randn(130), torch.randn(65, 3)
ROW = {"expanded": torch.randn(1).expand(65), "every other": W[::2], "column": B[:, 0]}  # entries are no neighbours
X = torch.randn(3, 65)


def _norms(values: torch.Tensor) -> dict[str, tuple[Any, ...]]:
    dense = torch.randn(65)
    return {
        "rms_norm": (X, values, 1e-6, 0.0, True),
        "layer_norm": (X, values, dense, 1e-5),
        "add_rms_norm": (X, X + 1, values, 1e-6, 1.0, False),
        "add_layer_norm": (X, X + 1, dense, values, 1e-5),
    }


@pytest.mark.parametrize("values", ROW.values(), ids=ROW)
@pytest.mark.parametrize("name", _norms(W))
def test_norms(name: str, values: torch.Tensor) -> None:
    check_refused(name, _norms(values)[name])


@pytest.mark.parametrize("values", ROW.values(), ids=ROW)
def test_linear_biases(values: torch.Tensor) -> None:
    weight = torch.randn(65, 65)
    for x in (X, torch.randn(70, 65)):
        check_refused("linear", (x, [weight, weight + 1], [None, values]))


def test_attention_shares_no_keys_between_sequences() -> None:
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 4, 16)
    rest = (None, False, 0.25, 0.0, 0, None, None)
    for keys, values in ((k[:1], k[:1]), (k, k[:1]), (k[:, :5], k)):
        graph, _ = one_op_graph(OPS["attention"], (q, k, k, *rest))
        (node,) = nodes_of(graph, torch.ops.llmopt.attention.default)
        mode = node.meta["val"].fake_mode
        for place, tensor in zip(node.args[1:3], (keys, values), strict=True):
            place.meta["val"] = mode.from_tensor(tensor)
        assert plan_template(node) == "queries, keys and values differ in batch, length or heads"


def check_refused(name: str, sample: tuple[Any, ...]) -> None:
    """No kernel takes `sample` as it is; with dense copies one does, and the result is right."""
    graph, _ = one_op_graph(OPS[name], sample)
    (node,) = nodes_of(graph, OPS[name].overload)
    assert isinstance(plan_template(node), str)
    densify(graph)
    (node,) = nodes_of(graph, OPS[name].overload)
    assert not isinstance(plan_template(node), str)
    expected = OPS[name].overload(*sample)
    actual, _ = run_compiled(OPS[name], sample)
    for one, other in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


NO_DIMENSIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, i: torch.softmax(x, -1),
    "cumsum": lambda x, i: x.cumsum(0),
    "topk": lambda x, i: x.topk(1, dim=0),
    "index_select": lambda x, i: x.index_select(0, i),
    "index_copy": lambda x, i: x.index_copy(0, i, x + 1),
}


@pytest.mark.parametrize("name", NO_DIMENSIONS)
def test_tensors_without_dimensions(name: str) -> None:
    function, x, i = NO_DIMENSIONS[name], torch.tensor(1.5), torch.tensor([0])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="llmopt")(x, i), function(x, i))


def test_topk_of_none() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(lambda x: x.topk(0), backend="llmopt")(x), x.topk(0))
