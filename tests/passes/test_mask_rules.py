"""Rules of masks: found from formulas without building the mask, refused where no rule explains every sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs.capturing import catch
from torch import Tensor
from torch.fx.node import Node

from llmopt.compiler.graph import outputs
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.eliminate_common import EliminateCommon
from llmopt.passes.mask_rules import Mask as Term
from llmopt.passes.mask_rules import MaskRule, infer_rule
from llmopt.passes.normalize import Normalize
from llmopt.passes.point_values import PointValues

HEADS = 4
Mask = Callable[[int], Tensor]


def masks_of(*formulas: Mask, length: int = 9) -> list[Node]:
    """The nodes of masks over a symbolic length."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(formula(x.shape[0]) for formula in formulas)

    graph = catch(model, torch.randn(length), marked=[(0, 0)]).graph
    run_pipeline(graph, (Normalize(), EliminateCommon()), Options())
    return outputs(graph)


def rule_of(*formulas: Mask, heads: int = HEADS) -> MaskRule | str:
    return infer_rule([Term(mask) for mask in masks_of(*formulas)], heads)


def pair(length: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(length)
    return i[:, None], i[None, :]


def causal(length: int) -> Tensor:
    i, j = pair(length)
    return j <= i


def low(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


CAUSAL: dict[str, Mask] = {
    "comparison": causal,
    "four dimensions": lambda n: causal(n)[None, None].expand(1, HEADS, n, n),
    "tril": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "additive": lambda n: low(causal(n)),
    "additive, infinite": lambda n: torch.zeros(n, n).masked_fill(~causal(n), -torch.inf),
    "triu of minima": lambda n: torch.full((n, n), torch.finfo(torch.float32).min).triu(1),
    "ge": lambda n: pair(n)[0] >= pair(n)[1],
    "difference": lambda n: pair(n)[0] - pair(n)[1] > -1,
    "positions from a running sum": lambda n: (p := torch.ones(n, dtype=torch.int64).cumsum(0))[None, :] <= p[:, None],
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    assert rule_of(CAUSAL[name]) == MaskRule(True)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16, 17, 100, 1023, 4096])
def test_windows(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 4096 needs neither a mask of 4096 by 4096 nor many smaller ones."""
    (mask,) = masks_of(lambda n: causal(n) & (pair(n)[1] > pair(n)[0] - window))
    sizes: list[int] = []

    def record(name: str) -> None:
        original = getattr(PointValues, name)

        def wrapped(self: PointValues, *args: Any) -> Tensor:
            found: Tensor = original(self, *args)
            sizes.append(found.numel())
            return found

        monkeypatch.setattr(PointValues, name, wrapped)

    record("at")
    record("whole")
    assert infer_rule([Term(mask)], HEADS) == MaskRule(True, window)
    assert sizes and max(sizes) < 1 << 20 and sum(sizes) < 1 << 24


@pytest.mark.parametrize(
    ("formula", "rule"),
    [
        (lambda n: torch.ones(n, n, dtype=torch.bool), MaskRule(False)),
        (lambda n: torch.zeros(1, 1, n, n), MaskRule(False)),
        (lambda n: causal(n) & (pair(n)[0] - pair(n)[1] < 5), MaskRule(True, 5)),
        (lambda n: causal(n) & (pair(n)[0] - pair(n)[1] <= 5), MaskRule(True, 6)),
        (lambda n: low(causal(n) & ~torch.ones(n, n, dtype=torch.bool).tril(-5)), MaskRule(True, 5)),
        (lambda n: pair(n)[1] > pair(n)[0] - 5, MaskRule(False, 5)),
        (lambda n: causal(n) & ((pair(n)[0] - pair(n)[1]).float() < 100.0), MaskRule(True, 100)),
        (lambda n: causal(n) & (pair(n)[0] / 0.01 - pair(n)[1] / 0.01 < 2e4), MaskRule(True, 200)),
        (lambda n: low(causal(n) & ~torch.ones(n, n, dtype=torch.bool).tril(-4096)), MaskRule(True, 4096)),
        (lambda n: (causal(n) & (pair(n)[1] > pair(n)[0] - 5)).flip(0).flip(0), MaskRule(True, 5)),
        (lambda n: causal(n) & (pair(n)[1] > pair(n)[0] - min(n, 4096)), MaskRule(True, 4096)),
    ],
)
def test_full_and_window_in_other_words(formula: Mask, rule: MaskRule) -> None:
    assert rule_of(formula) == rule


def test_several_terms_are_one_rule() -> None:
    window = lambda n: low(pair(n)[1] > pair(n)[0] - 6)  # noqa: E731
    assert rule_of(causal, window) == MaskRule(True, 6)


@pytest.mark.parametrize("longest", [20, 256])
def test_a_bias_out_of_a_table_of_the_longest_sequence(longest: int) -> None:
    """Whether table and scores are of one length shows only at lengths that the table has."""

    def bias(n: int) -> Tensor:
        table = torch.arange(1 - longest, 1) * 0.5 ** torch.arange(1, HEADS + 1)[:, None, None]
        return table[:, :, max(0, longest - n) :]

    rule = rule_of(bias, causal)
    assert isinstance(rule, MaskRule), rule
    assert rule.causal and rule.alibi_slopes == pytest.approx([0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_alibi_slopes(heads: int) -> None:
    def bias(n: int) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        return slopes[None, :, None, None] * torch.arange(n)

    def relative(n: int) -> Tensor:
        """The same up to what softmax ignores."""
        i, j = pair(n)
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        return -slopes[:, None, None] * (i - j)

    for formula in (bias, relative):
        rule = rule_of(formula, lambda n: low(causal(n)), heads=heads)
        assert isinstance(rule, MaskRule), rule
        assert (rule.causal, rule.window) == (True, 0)
        assert rule.alibi_slopes == pytest.approx([0.5**k for k in range(1, heads + 1)])


def test_packed_sequences_of_counted_positions_are_one_sequence() -> None:
    """transformers traces the detection of packed sequences into every graph; over plain positions it finds none."""

    def packed(n: int) -> Tensor:
        positions = torch.arange(n)
        first = positions[:1] - 1
        sequence = (torch.diff(positions, prepend=first) != 1).cumsum(0)
        return causal(n) & (sequence[:, None] == sequence[None, :])

    assert rule_of(packed) == MaskRule(True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slopes_of_a_rounded_bias(dtype: torch.dtype) -> None:
    def bias(n: int) -> Tensor:
        slopes = 2.0 ** -(8 / 6 * torch.arange(1, 7))
        return (slopes[:, None, None] * torch.arange(n)).to(dtype)

    rule = rule_of(bias, lambda n: low(causal(n)), heads=6)
    assert isinstance(rule, MaskRule), rule
    assert rule.alibi_slopes == pytest.approx([2.0 ** -(8 / 6 * i) for i in range(1, 7)], rel=torch.finfo(dtype).eps)


def test_a_window_of_another_size_is_no_rule() -> None:
    """However many rows there were at capture."""

    def model(x: Tensor, other: Tensor) -> Tensor:
        window = torch.arange(other.shape[0]).max() + 1
        return causal(x.shape[0]) & (pair(x.shape[0])[1] > pair(x.shape[0])[0] - window)

    graph = catch(model, torch.randn(9), torch.ones(5), marked=[(0, 0), (1, 0)]).graph
    run_pipeline(graph, (Normalize(), EliminateCommon()), Options())
    rule = infer_rule([Term(mask) for mask in outputs(graph)], HEADS)
    assert isinstance(rule, str) and "no rule" in rule, rule


def test_the_batch_is_no_part_of_a_rule() -> None:
    def model(x: Tensor, seen: Tensor) -> Tensor:
        rows = torch.arange(seen.shape[0])[:, None, None, None]
        return causal(x.shape[0]) & (rows < 2)

    def plain(x: Tensor, seen: Tensor) -> Tensor:
        return causal(x.shape[0]).expand(seen.shape[0], 1, -1, -1)

    for function, expected in ((model, "differs within the batch"), (plain, MaskRule(True))):
        graph = catch(function, torch.randn(9), torch.ones(5), marked=[(0, 0), (1, 0)]).graph
        run_pipeline(graph, (Normalize(), EliminateCommon()), Options())
        rule = infer_rule([Term(mask) for mask in outputs(graph)], HEADS)
        assert rule == expected if isinstance(expected, MaskRule) else expected in str(rule), rule


REFUSED: dict[str, tuple[tuple[Mask, ...], str]] = {
    "prefix": ((lambda n: causal(n) | (pair(n)[1] < 5),), "no rule"),
    "chunks": ((lambda n: causal(n) & (pair(n)[0] // 4 == pair(n)[1] // 4),), "no rule"),
    "dilated": ((lambda n: causal(n) & ((pair(n)[0] - pair(n)[1]) % 2 == 0),), "no rule"),
    "window with a sink": ((lambda n: causal(n) & ((pair(n)[0] - pair(n)[1] < 8) | (pair(n)[1] < 4)),), "no rule"),
    "half the length": ((lambda n: causal(n) | (pair(n)[1] < n // 2),), "no rule"),
    "two packed sequences": (
        (lambda n: causal(n) & ((pair(n)[0] >= 20) == (pair(n)[1] >= 20)),),
        "no rule",
    ),
    "strictly before": ((lambda n: pair(n)[1] < pair(n)[0],), "does not see its own position"),
    "other lengths": ((lambda n: torch.arange(n + 1)[None, :] <= torch.arange(n)[:, None],), "differ in number"),
    "a square bias": ((causal, lambda n: -0.1 * (pair(n)[0] - pair(n)[1]) ** 2), "not linear"),
    "a bias that grows with the query": ((causal, lambda n: pair(n)[0] * pair(n)[1] * 0.01), "not linear"),
    "heads differ": (
        (lambda n: causal(n) & (torch.arange(HEADS)[:, None, None] * 4 + 3 > (pair(n)[0] - pair(n)[1])),),
        "no rule",
    ),
    "random": ((lambda n: torch.rand(n, n) > 0.5,), "is random"),
    "a window out of sight": (
        (lambda n: (causal(n) & (pair(n)[1] > pair(n)[0] - 2000)).flip(0).flip(0),),
        "too large to be computed whole",
    ),
    "random slopes": ((causal, lambda n: torch.rand(HEADS, 1, 1) * torch.arange(n)), "is random"),
    "chunks by a quotient": (
        (lambda n: causal(n) & ((pair(n)[0] / 100.0).floor() == (pair(n)[1] / 100.0).floor()),),
        "no rule",
    ),
    "blocks of blocks": (
        (lambda n: causal(n) & ((pair(n)[0] // 8) % 40 == (pair(n)[1] // 8) % 40),),
        "no rule",
    ),
    "a window of half the length": ((lambda n: causal(n) & (pair(n)[1] > pair(n)[0] - n // 2),), "no rule"),
    "a window for long sequences": ((lambda n: causal(n) & (pair(n)[1] > pair(n)[0] - (n // 500 + 2000)),), "no rule"),
    "a bias by the length": ((causal, lambda n: pair(n)[1] / n), "not linear"),
    "a bias that ends": ((causal, lambda n: (pair(n)[1] * 0.1).clamp(max=20.0)), "not linear"),
    "a small bias of every other key": ((causal, lambda n: (pair(n)[1] % 2) * 9e-4), "not linear"),
    "a small bias beside a slope": ((causal, lambda n: pair(n)[1] * 0.5 + (pair(n)[1] % 2) * 9e-4), "not linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    formulas, reason = REFUSED[name]
    rule = rule_of(*formulas)
    assert isinstance(rule, str), rule
    assert reason in rule


def test_data_is_not_evaluated() -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        return causal(x.shape[0]) & keep

    graph = catch(model, torch.randn(9), torch.ones(9).bool(), marked=[(0, 0), (1, 0)]).graph
    rule = infer_rule([Term(mask) for mask in outputs(graph)], HEADS)
    assert isinstance(rule, str) and "is data" in rule
