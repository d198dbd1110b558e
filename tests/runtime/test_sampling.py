"""Sampling parameters are checked before any work; the sampler draws from the distribution that they describe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.errors import OptionError
from llmopt.runtime.sampling import SamplingParams, choose

DRAWS = 4000
LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.3, 1.9, -4.0, 0.0, 1.1])


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("temperature", v) for v in (-0.1, 101, math.nan, math.inf, "1", True, None)),
        *(("top_p", v) for v in (0, -1, 1.01, math.nan, "0.5", True)),
        *(("min_p", v) for v in (-0.1, 1.5, math.nan, False)),
        *(("top_k", v) for v in (-1, 1.5, True, "3", 1 << 40)),
        *(("max_tokens", v) for v in (0, -1, 2.0, None, True)),
        *(("min_tokens", v) for v in (-1, 17, 0.5)),
        *(("seed", v) for v in (-1, 1.5, "1", True)),
        *(("stop", v) for v in ("", ["a", ""], [3], 3, None)),
        *(("stop_token_ids", v) for v in ([-1], ["a"], [1.5], [True])),
        *(("ignore_eos", v) for v in (1, "yes", None)),
        *(("skip_special_tokens", v) for v in (0, None)),
    ],
)
def test_bad_values_name_option_value_and_what_is_allowed(name: str, bad: object) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: bad})  # type: ignore[arg-type]
    assert caught.value.option == name
    shown = (bad,) if name == "stop" and isinstance(bad, str) else bad
    assert repr(caught.value.value) in (repr(bad), repr(shown), repr(tuple(bad) if isinstance(bad, list) else bad))
    assert caught.value.allowed
    assert name in str(caught.value)


def test_good_values() -> None:
    params = SamplingParams(0.7, 0.9, 40, 0.05, max_tokens=9, min_tokens=9, stop="end", stop_token_ids=[3], seed=0)
    assert params.stop == ("end",) and params.stop_token_ids == (3,)
    assert not params.is_greedy
    assert params.replace(temperature=0).is_greedy
    with pytest.raises(OptionError):
        params.replace(max_tokens=8)
    with pytest.raises(TypeError):
        SamplingParams(top_q=1)  # type: ignore[call-arg]


def reference(params: SamplingParams) -> Tensor:
    """The distribution, written down from the definitions: the k likeliest, then the nucleus of those, and a floor."""
    p = (LOGITS.double() / params.temperature).softmax(0)
    if params.top_k:
        p = torch.where(torch.tensor([(p > own).sum() < params.top_k for own in p]), p, 0)
    p = p / p.sum()
    kept = [own > 0 and p[p > own].sum() < params.top_p and own >= params.min_p * p.max() for own in p]
    p = torch.where(torch.tensor(kept), p, 0)
    return p / p.sum()


def chi_squared(draw: Callable[[torch.Generator], int], expected: Tensor) -> float:
    """Pearson's statistic over its 0.9999 quantile (by Wilson and Hilferty); above 1 is a wrong sampler."""
    rng = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.tensor([draw(rng) for _ in range(DRAWS)]), minlength=len(LOGITS)).double()
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return math.inf
    freedom = int(possible.sum()) - 1
    wanted = expected[possible] * DRAWS
    statistic = float(((counts[possible] - wanted).square() / wanted).sum())
    if freedom == 0:
        return statistic
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.85},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: dict[str, Any]) -> None:
    params = SamplingParams(**case)
    assert chi_squared(lambda rng: choose(LOGITS, params, rng), reference(params)) < 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"temperature": 1.0}, {"temperature": 1.3}),
        ({"top_k": 4}, {"top_k": 3}),
        ({"top_k": 2}, {"top_k": 3}),
        ({"top_p": 0.8}, {"top_p": 0.6}),
        ({"min_p": 0.4}, {"min_p": 0.5}),
        ({}, {"min_p": 0.05}),
    ],
)
def test_a_wrong_sampler_is_noticed(wrong: dict[str, Any], right: dict[str, Any]) -> None:
    params = SamplingParams(**wrong)
    assert chi_squared(lambda rng: choose(LOGITS, params, rng), reference(SamplingParams(**right))) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_first_of_the_best(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.5, 3.0, 3.0, -1.0], dtype=dtype)
    assert choose(logits, SamplingParams(temperature=0), None) == 1


def test_seed_repeats() -> None:
    params = SamplingParams(temperature=2.0)
    flat = torch.zeros(1000)
    first, second, third = (
        [choose(flat, params, rng) for _ in range(20)] for rng in (torch.Generator().manual_seed(s) for s in (4, 4, 5))
    )
    assert first == second != third
