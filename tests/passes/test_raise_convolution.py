"""Convolutions of image encoders, audio encoders and state space models, and those that stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from graphs.rewriting import must_not_fire, ops_when_disabled, rewrite
from torch import Tensor

from llmopt.passes.raise_convolution import RaiseConvolution

SEQUENCE, IMAGE, VIDEO = torch.randn(2, 6, 19), torch.randn(2, 3, 16, 24), torch.randn(2, 3, 4, 8, 8)
# Parameters, whose sizes are numbers under `dynamic=True`, too.
weight = lambda *sizes: torch.nn.Parameter(torch.randn(sizes), requires_grad=False)  # noqa: E731
BIAS, DEPTHWISE, WINDOW = weight(6), weight(6, 1, 4), weight(6, 6, 3)
PATCH, TUBE = weight(6, 3, 4, 8), weight(6, 3, 2, 4, 4)

# Function of the input, input, op that computes it (None: fused loops)
CONVOLUTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str | None]] = {
    "depthwise, causal": (lambda x: F.conv1d(x, DEPTHWISE, BIAS, padding=3, groups=6)[..., :-3], SEQUENCE, None),
    "depthwise, strided": (lambda x: F.conv1d(x, DEPTHWISE, None, 2, 1, 2, groups=6), SEQUENCE, None),
    "windows": (lambda x: F.conv1d(x, WINDOW, BIAS, padding=1), SEQUENCE, "llmopt.linear"),
    "windows, strided": (lambda x: F.conv1d(x, WINDOW, BIAS, stride=2, padding=1), SEQUENCE, "llmopt.linear"),
    "windows, dilated": (lambda x: F.conv1d(x, WINDOW, dilation=3), SEQUENCE, "llmopt.linear"),
    "patches of a sequence": (lambda x: F.conv1d(x, WINDOW, BIAS, stride=3), SEQUENCE, "llmopt.linear"),
    "patches": (lambda x: F.conv2d(x, PATCH, BIAS, stride=(4, 8)).flatten(2).transpose(1, 2), IMAGE, "llmopt.linear"),
    "patches, with a rest": (lambda x: F.conv2d(x[..., :-1], PATCH, stride=(4, 8)), IMAGE, "llmopt.linear"),
    "patches in time": (lambda x: F.conv3d(x, TUBE, BIAS, stride=(2, 4, 4)), VIDEO, "llmopt.linear"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dynamic: bool) -> None:
    function, x, op = CONVOLUTIONS[name]
    marked = [(0, 0), *([(0, 2)] if x.ndim == 3 else [])] if dynamic else []
    result = rewrite(RaiseConvolution(), function, x, marked=marked)
    assert result.report.matched == 1 and not [t for t in result.targets() if "conv" in t]
    assert op is None or result.count(op) == 1


def test_half_precision_is_summed_in_float32() -> None:
    layer = torch.nn.Conv1d(6, 6, 4, padding=3, groups=6).bfloat16()
    result = rewrite(RaiseConvolution(), layer, SEQUENCE.bfloat16())
    assert result.report.matched == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["depthwise, causal", "windows, strided", "patches"])
def test_through_the_backend(name: str) -> None:
    torch._dynamo.reset()
    function, x, _ = CONVOLUTIONS[name]
    run = torch.compile(function, backend="llmopt", dynamic=True, options={"fallback": "error"})
    for like in (x, torch.randn(3, *x.shape[1:])):
        torch.testing.assert_close(run(like), function(like), rtol=1e-4, atol=1e-4)


def test_disabled() -> None:
    function, x, _ = CONVOLUTIONS["windows"]
    assert "aten.conv1d" in ops_when_disabled(RaiseConvolution(), function, x)


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (lambda x: F.conv1d(x, torch.ones(6, 3, 3), groups=2), SEQUENCE, "channels in groups"),
        (
            lambda x: F.conv2d(x, torch.ones(6, 3, 3, 3), padding=1),
            IMAGE,
            "windows that overlap in several dimensions, or long ones",
        ),
        (lambda x: F.conv1d(x[0], WINDOW), SEQUENCE, "the input has no batch"),
    ],
)
def test_near_misses(function: Callable[..., Any], x: Tensor, reason: str) -> None:
    must_not_fire(RaiseConvolution(), reason, function, x)


def test_padding_leaves_the_length_symbolic() -> None:
    """A length that became a number would compile anew for every other one."""
    model = torch.nn.Conv1d(4, 4, 3, padding=2)
    compiled = torch.compile(model, backend="llmopt", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(2, 4, 17))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (9, 33):
                x = torch.randn(3, 4, length)
                torch.testing.assert_close(compiled(x), model(x))
