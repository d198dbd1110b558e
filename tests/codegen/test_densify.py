"""Operands that a template cannot read are copied; everything else is left alone."""

from __future__ import annotations

import torch
from graphs.capturing import Function, catch

from llmopt.codegen.cpu.templates import plan_template
from llmopt.codegen.densify import densify
from llmopt.compiler.graph import graph_text, nodes_of

aten = torch.ops.aten


def densified(function: Function, *args: torch.Tensor) -> tuple[int, bool]:
    """Copies that were inserted, and whether the templates take all of the graph's lookups and sums then."""
    caught = catch(function, *args, dynamic=True)
    before = len(list(nodes_of(caught.graph, aten.clone.default)))
    densify(caught.graph)
    nodes = nodes_of(caught.graph, aten.embedding.default, aten.cumsum.default)
    taken = all(not isinstance(plan_template(n), str) for n in nodes)
    torch.testing.assert_close(caught.run()[0], function(*args))
    return len(list(nodes_of(caught.graph, aten.clone.default))) - before, taken


def test_strided_ids_are_copied() -> None:
    table = torch.randn(9, 4)
    assert densified(lambda ids: torch.embedding(table, ids[:, ::2]), torch.randint(0, 9, (3, 8))) == (1, True)


def test_dense_operands_are_not_copied() -> None:
    table = torch.randn(9, 4)
    assert densified(lambda ids: torch.embedding(table, ids), torch.randint(0, 9, (3, 8))) == (0, True)


def test_rows_that_are_no_rows_are_copied() -> None:
    assert densified(lambda x: x.transpose(0, 1).cumsum(-1), torch.randn(3, 5, 7)) == (1, True)


def test_a_copy_that_does_not_help_is_taken_back() -> None:
    """No kernel sums over another dimension, dense or not."""
    caught = catch(lambda x: x.transpose(1, 2).cumsum(0), torch.randn(3, 5, 7), dynamic=True)
    before = graph_text(caught.graph)
    densify(caught.graph)
    assert graph_text(caught.graph) == before
