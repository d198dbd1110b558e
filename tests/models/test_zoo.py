"""The zoo itself: its models are no pushovers, and each feature it names can be seen in the logits."""

from __future__ import annotations

import pytest
import torch
from models.zoo import (
    ENTRIES,
    FEATURES,
    ZOO,
    build,
    eager_logits,
    margin_mismatches,
    prompts,
    reference_generate,
    without,
)


@pytest.mark.parametrize("name", ZOO)
def test_greedy_tokens_vary(name: str) -> None:
    """Equal tokens prove little where every prompt ends in one repeated token."""
    rows = reference_generate(name, prompts([1, 40]), 16)
    assert [len(row) for row in rows] == [16, 16]
    assert min(len(set(row)) for row in rows) >= 5
    assert rows[0] != rows[1]


@pytest.mark.parametrize("name", ZOO)
def test_logits_are_spread_and_reproducible(name: str) -> None:
    (tokens,) = prompts([40])
    logits = eager_logits(build(name), tokens)
    assert logits.isfinite().all()
    assert logits.std() > 0.3
    assert torch.equal(logits, eager_logits(build(name), tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ZOO)
def test_low_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    """Weights this wild must not make rounding chaotic, or bf16 comparisons would mean nothing."""
    (tokens,) = prompts([40])
    model = build(name, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact, rounded = eager_logits(build(name), tokens), eager_logits(model, tokens)
    assert (exact - rounded).square().mean().sqrt() < 0.15 * exact.std()


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_a_removed_feature_shows(name: str, feature: str) -> None:
    (tokens,) = prompts([40])
    whole, maimed = eager_logits(build(name), tokens), eager_logits(without(name, feature), tokens)
    # At the last position: windows and positions only matter late in the prompt.
    assert (whole[-1] - maimed[-1]).abs().max() > 0.05 * whole.std()


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "window" in entry.removals])
def test_the_window_is_not_seen_by_short_prompts(name: str) -> None:
    (tokens,) = prompts([8])
    assert torch.allclose(eager_logits(build(name), tokens), eager_logits(without(name, "window"), tokens), atol=1e-5)


def test_soft_caps_are_reached() -> None:
    (tokens,) = prompts([40])
    cap = build("gemma2").config.final_logit_softcapping
    assert eager_logits(build("gemma2"), tokens).abs().max() > 0.9 * cap


def test_margins() -> None:
    eager = torch.tensor([[5.0, 4.9, 0.0], [5.0, 4.0, 0.0], [5.0, 4.9, 4.8], [1.0, 0.0, 0.0]])
    same, second, third = torch.tensor([9.0, 0, 0]), torch.tensor([0, 9.0, 0]), torch.tensor([0, 0, 9.0])
    assert margin_mismatches(eager, eager.clone(), 0.0) == []
    assert margin_mismatches(eager, torch.stack([second, second, third, same]), 0.15) == [1, 2]
    assert margin_mismatches(eager, torch.stack([second, second, third, same]), 0.05) == [0, 1, 2]
    assert margin_mismatches(eager, torch.full_like(eager, torch.nan), 100.0) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="one shape"):
        margin_mismatches(eager, eager[:2], 0.1)
