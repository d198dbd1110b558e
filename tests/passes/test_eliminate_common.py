"""Equal calls are computed once; random, mutating and separately returned ones are not."""

from __future__ import annotations

import torch
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.passes.eliminate_common import EliminateCommon

X = torch.randn(3, 5)


def twice(x: Tensor) -> Tensor:
    return torch.cos(x) * torch.sin(x) + torch.cos(x)


def test_equal_calls_become_one() -> None:
    result = rewrite(EliminateCommon(), twice, X)
    assert result.report.matched == 1 and result.count("aten.cos") == 1 and result.count("aten.sin") == 1
    assert ops_when_disabled(EliminateCommon(), twice, X).count("aten.cos") == 2


def test_chains_of_equal_calls() -> None:
    result = rewrite(EliminateCommon(), lambda x: (x + 1).exp() / ((x + 1).exp() + 2), X)
    assert result.report.matched == 2 and result.count("aten.exp") == 1


def test_golden() -> None:
    assert_golden(
        rewrite(EliminateCommon(), twice, X),
        """\
arg_0: f32[3, 5]
cos: f32[3, 5] = aten.cos.default(arg_0)
sin: f32[3, 5] = aten.sin.default(arg_0)
mul: f32[3, 5] = aten.mul.Tensor(cos, sin)
cos_1: f32[3, 5] = aten.cos.default(arg_0)
add: f32[3, 5] = aten.add.Tensor(mul, cos_1)
return [add]
---
arg_0: f32[3, 5]
cos: f32[3, 5] = aten.cos.default(arg_0)
sin: f32[3, 5] = aten.sin.default(arg_0)
mul: f32[3, 5] = aten.mul.Tensor(cos, sin)
add: f32[3, 5] = aten.add.Tensor(mul, cos)
return [add]""",
    )


def test_numbers_of_different_types_are_different() -> None:
    """1, 1.0 and True are equal in Python, but give results of different dtypes."""
    ints = torch.arange(4)
    must_not_fire(EliminateCommon(), None, lambda x: [(x + 1) * 2, (x + 1.0) * 3], ints)


def test_zeros_of_different_signs_are_different() -> None:
    one_over = lambda x, zero: 1 / torch.full_like(x, zero)  # noqa: E731
    must_not_fire(EliminateCommon(), None, lambda x: one_over(x, 0.0) - one_over(x, -0.0) + x, X)


def test_results_that_the_caller_may_write_to_stay_apart() -> None:
    must_not_fire(EliminateCommon(), "the caller sees both", lambda x: (x.exp(), x.exp()), X)


def test_random_numbers_are_drawn_twice() -> None:
    """Each call has its own: the comparison draws the same numbers for both graphs, so that one draw would differ."""
    must_not_fire(EliminateCommon(), None, lambda x: [torch.rand_like(x) - torch.rand_like(x) + x], X)
