"""Rotations written with complex numbers, and what else is done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs.capturing import catch
from graphs.rewriting import must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.compiler.graph import is_tensor, tensor
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND
from llmopt.passes.split_complex import SplitComplex

X, ANGLE = torch.randn(2, 7, 3, 16), torch.randn(2, 7, 8)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def rotation(x: Tensor, angle: Tensor) -> Tensor:
    """How Llama 4 and DeepSeek-V2 apply their rotary embeddings."""
    turn = torch.polar(torch.ones_like(angle), angle) * 1.5
    return torch.view_as_real(pairs(x) * turn[:, :, None, :]).flatten(3)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rotation": rotation,
    "radius": lambda x, a: torch.view_as_real(pairs(x)[..., 0, :] * torch.polar(a.abs(), a)),
    "made of two": lambda x, a: torch.view_as_real(torch.complex(a, a.cos()).unsqueeze(2) * pairs(x)),
    "times a real": lambda x, a: torch.view_as_real(a[:, :, None] * pairs(x) * 2.0),
    "conjugate": lambda x, a: torch.view_as_real((pairs(x).conj() * pairs(x)[..., :1, :]).transpose(1, 2)),
    "beside a real": lambda x, a: torch.view_as_real(torch.cat([pairs(x), x[..., :8]], 1)),
    "spread": lambda x, a: torch.view_as_real(torch.complex(a[..., :1], a[:1])),
    "an angle spread": lambda x, a: torch.view_as_real(torch.polar(torch.ones(2, 7, 1), a[:1, :1])),
    "moved": lambda x, a: torch.view_as_real(torch.cat([pairs(x)[:, 1:], pairs(x)[:, :2]], 1).reshape(2, -1, 8)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_complex_number_is_left(name: str) -> None:
    result = rewrite(SplitComplex(), FUNCTIONS[name], X, ANGLE)
    assert result.report.matched == 1
    assert not [n for n in result.after.nodes if is_tensor(n) and tensor(n).dtype.is_complex]


def test_a_rotation_becomes_rope() -> None:
    caught = catch(rotation, X, ANGLE, marked=[(0, 0), (0, 1), (1, 0), (1, 1)])
    run_pipeline(caught.graph, BACKEND, Options())
    targets = [str(n.target) for n in caught.graph.nodes if n.op == "call_function"]
    assert targets.count("llmopt.rope.default") == 1
    torch.testing.assert_close(caught.run(), [rotation(X, ANGLE)])


def test_disabled() -> None:
    assert "aten.view_as_complex" in ops_when_disabled(SplitComplex(), rotation, X, ANGLE)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, a: pairs(x), "a result of the graph is complex"),
        (lambda x, a: pairs(x).abs(), "aten.abs.default is complex"),
        (lambda x, a: torch.view_as_real(pairs(x) * 1j), "a Python number is complex"),
        (lambda x, a: x * a[..., :1, None], None),
    ],
)
def test_near_misses(function: Callable[..., Any], reason: str | None) -> None:
    must_not_fire(SplitComplex(), reason, function, X, ANGLE)
