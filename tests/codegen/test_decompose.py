"""Ops that no kernel computes whole are computed by their parts, or left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import catch
from graphs.rewriting import input_sizes

from llmopt.backend import REPORT
from llmopt.codegen.decompose import decompose
from llmopt.compiler.decompose import expand_op
from llmopt.compiler.graph import Rewriter, aten, graph_text, nodes_of

PARTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "composite": lambda x: torch.take_along_dim(x, x.abs().to(torch.int64) % 3, 1),
    "composite of composites": lambda x: F.pairwise_distance(x, x.cos()),
    "decomposition": lambda x: F.glu(x),
    "of one op": lambda x: x.frac(),
    "of mixed types": lambda x: x.round().count_nonzero(1),
    "reduction": lambda x: x.logsumexp(1),
    "a sum along another dimension": lambda x: x.cumsum(0),
    "a sum along another dimension, viewed": lambda x: x.cumsum(0).transpose(0, 1) * 1,
    "a sum along another dimension, returned as a view": lambda x: x.cumsum(1).transpose(0, 1),
    "a sum along the first of two": lambda x: (x[0] * 9).to(torch.int64).cumsum(0),
}


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_parts_are_computed_here(name: str) -> None:
    torch._dynamo.reset()
    function = PARTS[name]
    compiled = torch.compile(function, backend="llmopt", dynamic=True, options={"fallback": "error"})
    for sizes in [(5, 7, 12), (3, 9, 6)]:
        x = torch.randn(sizes)
        torch.testing.assert_close(compiled(x), function(x))
    assert all(graph.refused is None and not graph.fallbacks for graph in REPORT.graphs)


@pytest.mark.parametrize(
    "function", [lambda x: x.sort(-1).values, lambda x: torch.linalg.inv(x), lambda x: x.cumprod(0)]
)
def test_what_has_no_parts_here_stays_whole(function: Callable[..., Any]) -> None:
    caught = catch(function, torch.randn(4, 4))
    before = graph_text(caught.graph)
    decompose(caught.graph)
    assert graph_text(caught.graph) == before


def test_values_stay_equal() -> None:
    caught = catch(lambda x: F.cosine_similarity(x, x.flip(0)) + F.glu(x, 0).sum(), torch.randn(4, 6), dynamic=True)
    expected = caught.run()
    decompose(caught.graph)
    torch.testing.assert_close(caught.run(), expected)


def test_symbolic_sizes_stay_symbolic() -> None:
    """PyTorch composes padding in C++, which asks for numbers."""
    caught = catch(lambda x: x * 2, torch.randn(4, 6), marked=[(0, 0), (0, 1)])
    sizes = input_sizes(caught.graph)
    (node,) = nodes_of(caught.graph, aten.mul.Tensor)
    rewriter = Rewriter(caught.graph)
    with rewriter.before(node):
        padded = expand_op(rewriter, node, lambda x, factor: torch.constant_pad_nd(x, [3, 0]) * factor)
    assert padded is not None and input_sizes(caught.graph) == sizes
