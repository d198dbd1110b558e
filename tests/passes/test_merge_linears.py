"""Projections of one input become one product over several weights, which are listed and never copied."""

from __future__ import annotations

import torch
from graphs.capturing import randomise
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor, nn

from llmopt.compiler.graph import nodes_of
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.merge_linears import MergeLinears

X = torch.randn(2, 3, 8)


class Projections(nn.Module):
    """Query, key and value of grouped heads; the key alone has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12, bias=False), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x) + 1, self.k(x) * 2, self.v(x) - 1]


def test_three_projections_become_one() -> None:
    model = randomise(Projections())
    result = rewrite(MergeLinears(), model, X)
    assert result.report.matched == 1 and result.count("llmopt.linear") == 1
    (node,) = nodes_of(result.after, llmopt_ops.linear.default)
    assert [w.op for w in node.args[1]] == ["placeholder"] * 3, "weights are listed, not concatenated"
    assert [b is None for b in node.args[2]] == [True, False, True]
    assert ops_when_disabled(MergeLinears(), model, X).count("llmopt.linear") == 3


def test_results_that_the_caller_sees_keep_memory_of_their_own() -> None:
    class Seen(Projections):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.q(x), self.k(x).view(-1, 4), self.v(x) - 1]

    must_not_fire(MergeLinears(), "the caller sees its memory", randomise(Seen()), X)


def test_a_symbolic_number_of_rows() -> None:
    result = rewrite(MergeLinears(), randomise(Projections()), X, marked=[(0, 0), (0, 1)])
    assert result.count("llmopt.linear") == 1


def test_golden() -> None:
    assert_golden(
        rewrite(MergeLinears(), randomise(Projections()), X),
        """\
arg_0: f32[12, 8]
arg_1: f32[2, 3, 8]
arg_2: f32[4, 8]
arg_3: f32[4]
arg_4: f32[4, 8]
linear: f32[2, 3, 12] = llmopt.linear.default(arg_1, [arg_0], [None])
add: f32[2, 3, 12] = aten.add.Tensor(linear, 1)
linear_1: f32[2, 3, 4] = llmopt.linear.default(arg_1, [arg_2], [arg_3])
mul: f32[2, 3, 4] = aten.mul.Tensor(linear_1, 2)
linear_2: f32[2, 3, 4] = llmopt.linear.default(arg_1, [arg_4], [None])
sub: f32[2, 3, 4] = aten.sub.Tensor(linear_2, 1)
return [add, mul, sub]
---
arg_0: f32[12, 8]
arg_1: f32[2, 3, 8]
arg_2: f32[4, 8]
arg_3: f32[4]
arg_4: f32[4, 8]
linear: f32[2, 3, 20] = llmopt.linear.default(arg_1, [arg_0, arg_2, arg_4], [None, arg_3, None])
slice: f32[2, 3, 12] = aten.slice.Tensor(linear, 2, 0, 12)
slice_1: f32[2, 3, 4] = aten.slice.Tensor(linear, 2, 12, 16)
slice_2: f32[2, 3, 4] = aten.slice.Tensor(linear, 2, 16, 20)
add: f32[2, 3, 12] = aten.add.Tensor(slice, 1)
mul: f32[2, 3, 4] = aten.mul.Tensor(slice_1, 2)
sub: f32[2, 3, 4] = aten.sub.Tensor(slice_2, 1)
return [add, mul, sub]""",
    )


class Chain(nn.Module):
    """Two products, one after the other: not of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_products_of_different_inputs_stay_apart() -> None:
    must_not_fire(MergeLinears(), None, randomise(Chain()), X)
