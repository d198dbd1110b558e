"""Random programs of pointwise ops, views, concatenations and reductions, fused, against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.loop_programs import VARIANTS, check

from llmopt.codegen.cpu.toolchain import host_level

Step = Callable[[list[torch.Tensor]], torch.Tensor]

# Bounded functions only, so that an error does not grow from step to step.
UNARY: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.tanh,
    torch.sigmoid,
    torch.sin,
    lambda x: -x,
    lambda x: x * 0.5,
    lambda x: x.clamp(-1, 1),
    lambda x: x.softmax(-1),
    lambda x: x.softmax(-2),
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1),
    lambda x: x.amax(-1, keepdim=True) - x,
    lambda x: torch.where(x > 100, x, x.cos()),
    lambda x: x.to(torch.bfloat16).to(torch.float32) * 0.1 + x,
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: x.flip(-1),
    lambda x: torch.cat([x[..., 3:], x[..., :3]], -1),
    lambda x: torch.cat([-x[..., 6:], x[..., :6]], -1),
    lambda x: x.reshape(x.shape[0], -1).reshape(x.shape),
    lambda x: x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2),
    lambda x: torch.stack([x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    lambda x: x.sum(0, keepdim=True).tanh().expand_as(x),
    lambda x: x[:, :1].expand_as(x),
]
BINARY: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: (x * y).tanh(),
    torch.maximum,
    lambda x, y: torch.where(x * 0 == 0, y, x),
    lambda x, y: torch.cat([x, y], 1)[:, : x.shape[1]],
    lambda x, y: x - y.amax(-1, keepdim=True),
]
FLAT: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x,
    lambda x: x.sum(-1),
    lambda x: x.amax((0, 1)),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.transpose(1, 2),
]


def _check(data: st.DataObject, variant: str) -> None:
    steps: list[Step] = []
    for count in range(data.draw(st.integers(1, 9))):
        pick = st.integers(0, count)
        if data.draw(st.booleans()):
            f, a = data.draw(st.sampled_from(UNARY)), data.draw(pick)
            steps.append(lambda v, f=f, a=a: f(v[a]))
        else:
            g, a, b = data.draw(st.sampled_from(BINARY)), data.draw(pick), data.draw(pick)
            steps.append(lambda v, g=g, a=a, b=b: g(v[a], v[b]))
    ends = [(data.draw(st.sampled_from(FLAT)), data.draw(st.integers(0, len(steps)))) for _ in range(2)]

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for step in steps:
            values.append(step(values))
        return [f(values[n]) for f, n in [*ends, (FLAT[0], len(values) - 1)]]

    torch.manual_seed(0)
    check(
        function, torch.randn(3, 5, 12), again=[[torch.randn(2, 9, 12)]], static=[-1], tolerance=2e-2, variant=variant
    )


def _settings(examples: int) -> settings:
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


@_settings(25)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    _check(data, "host")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("host", host_level().name)])
@_settings(25)
@given(data=st.data())
def test_random_programs_on_every_instruction_set(variant: str, data: st.DataObject) -> None:
    _check(data, variant)
