"""Each option leaves the same tokens, with the same scores, as transformers' logits processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from llmopt.runtime.sampling import Constraints, SamplingParams, SamplingState, truncation
from llmopt.runtime.sampling.adjustments import adjust
from llmopt.runtime.sampling.blocks import Workspace

Words = tuple[tuple[int, ...], ...]
VOCABS = (37, 1500)
ROWS = 5


def random_logits(vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def left_by(params: SamplingParams, logits: Tensor) -> Tensor:
    """Which tokens have a chance, bool `[R, V]`: found by looking at the weights that a draw would use."""
    found = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(len(logits)):
        rows = truncation._Rows.of(logits[row : row + 1], logits[row].max().unsqueeze(0), [params])
        limited = params.num_likeliest or params.top_p < 1
        threshold = truncation._threshold(rows, truncation._sorted(rows.scores), Workspace()) if limited else None
        found[row] = (rows.weights(rows.scores, threshold) > 0)[0]
    return found


WARPERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
    ({"top_k": 20}, [hf.TopKLogitsWarper(20)]),
    ({"top_p": 0.3}, [hf.TopPLogitsWarper(0.3)]),
    ({"top_p": 0.95}, [hf.TopPLogitsWarper(0.95)]),
    ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
    ({"typical_p": 0.3}, [hf.TypicalLogitsWarper(0.3)]),
    ({"typical_p": 0.95}, [hf.TypicalLogitsWarper(0.95)]),
    (
        {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        [
            hf.TemperatureLogitsWarper(0.7),
            hf.TopKLogitsWarper(30),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.02),
            hf.TypicalLogitsWarper(0.8),
        ],
    ),
    (
        {"temperature": 1.7, "top_p": 0.8, "typical_p": 0.6},
        [hf.TemperatureLogitsWarper(1.7), hf.TopPLogitsWarper(0.8), hf.TypicalLogitsWarper(0.6)],
    ),
]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("case", range(len(WARPERS)))
def test_the_same_tokens_stay(case: int, vocab: int) -> None:
    given, warpers = WARPERS[case]
    logits = random_logits(vocab, case)
    # In float64, so that a token at the edge is decided by mathematics and not by transformers' rounding.
    expected = hf.LogitsProcessorList(warpers)(torch.zeros(ROWS, 1, dtype=torch.int64), logits.double())
    left = left_by(SamplingParams(**given), logits)
    assert torch.equal(left, expected > float("-inf"))
    assert 0 < left.sum() < left.numel()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("case", range(len(WARPERS)))
def test_draws_stay_within_them(case: int, vocab: int) -> None:
    """The way that draws really take, over the few largest logits."""
    given, warpers = WARPERS[case]
    logits = random_logits(vocab, case)
    expected = hf.LogitsProcessorList(warpers)(torch.zeros(ROWS, 1, dtype=torch.int64), logits.double())
    allowed = expected > float("-inf")
    for uniform in (1e-12, 0.2, 0.7, 1 - 1e-12):
        tokens = truncation.choose(
            logits,
            logits.amax(-1),
            [SamplingParams(**given)] * ROWS,
            torch.full((ROWS,), uniform, dtype=torch.float64),
            Workspace(),
        )
        assert allowed[torch.arange(ROWS), tokens].all()


def adjusted(logits: Tensor, states: list[SamplingState], eos: tuple[int, ...] = ()) -> Tensor:
    scores = logits.clone()
    adjust(scores, states, eos)
    return scores


def state_with(prompt: list[int], generated: list[int], words: Words = (), **given: Any) -> SamplingState:
    state = SamplingState(SamplingParams(**given), prompt, constraints=Constraints(bad_words=words))
    for token in generated:
        state.accept(token)
    return state


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = random_logits(60, 1)
    ids = torch.randint(0, 60, (ROWS, 25))
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    states = [state_with(row[:10], row[10:], repetition_penalty=penalty) for row in ids.tolist()]
    assert torch.equal(adjusted(logits, states), expected)
    assert not torch.equal(expected, logits)


def test_presence_and_frequency_penalties() -> None:
    """As OpenAI defines them: over what was generated, once and once for each time; the prompt does not count."""
    logits = random_logits(30, 2)
    ids = torch.randint(0, 30, (ROWS, 40))
    states = [state_with(row[:20], row[20:], presence_penalty=0.7, frequency_penalty=-0.3) for row in ids.tolist()]
    times = torch.stack([torch.bincount(row[20:], minlength=30) for row in ids]).float()
    torch.testing.assert_close(adjusted(logits, states), logits - 0.7 * (times > 0) + 0.3 * times)


def test_penalties_come_in_vllm_s_order() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5]])
    state = state_with([0], [1], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 3.0})
    # The bias first (-1 + 3 = 2), then repetition (2 / 2 = 1), then presence (1 - 1 = 0).
    torch.testing.assert_close(adjusted(logits, [state]), torch.tensor([[0.5, 0.0, 0.5]]))


def test_logit_bias() -> None:
    logits = random_logits(40, 3)
    bias = {3: 2.5, 7: -100.0, 39: 1.0}
    expected = hf.SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()})(
        torch.zeros(ROWS, 3, dtype=torch.int64), logits.clone()
    )
    states = [state_with([1], [], logit_bias=bias) for _ in range(ROWS)]
    torch.testing.assert_close(adjusted(logits, states), expected)


def test_bad_words() -> None:
    words = ((4,), (1, 2), (2, 2, 3), (0, 1, 2, 5))
    logits = random_logits(6, 4)
    ids = torch.tensor([[0, 0, 1, 0], [0, 1, 2, 1], [0, 2, 2, 2], [3, 0, 1, 2], [0, 0, 0, 2]])
    processor = hf.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    expected = processor(ids, logits.clone())
    states = [state_with([], row, words) for row in ids.tolist()]
    assert torch.equal(adjusted(logits, states), expected)


def test_allowed_tokens() -> None:
    logits = random_logits(20, 5)
    allowed = [[1, 5], [2], [0, 19], [7, 8, 9], [3, 4]]
    processor = hf.PrefixConstrainedLogitsProcessor(lambda row, _: allowed[row], num_beams=1)
    expected = processor(torch.zeros(ROWS, 1, dtype=torch.int64), logits.clone())
    states = [state_with([1], [], allowed_token_ids=ids) for ids in allowed]
    assert torch.equal(adjusted(logits, states), expected)


def test_minimum_length() -> None:
    logits = random_logits(20, 6)
    ids = torch.randint(0, 20, (ROWS, 3))
    for generated in (0, 1, 2, 3):
        processor = hf.MinNewTokensLengthLogitsProcessor(3 - generated, 2, torch.tensor([4, 5]))
        expected = processor(ids, logits.clone())
        states = [state_with(row[: 3 - generated], row[3 - generated :], min_tokens=2) for row in ids.tolist()]
        assert torch.equal(adjusted(logits, states, (4, 5)), expected)


def test_every_row_has_parameters_of_its_own() -> None:
    """All kinds together change each row as they do alone."""
    logits = random_logits(50, 7)
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.7, "frequency_penalty": 1.0},
        {"allowed_token_ids": [1, 2, 3], "logit_bias": {2: 5.0}},
        {"min_tokens": 9, "stop_token_ids": [11]},
        {"presence_penalty": -1.0, "words": ((5,), (6, 7))},
    ]
    ids = [[1, 2, 6], [6, 6, 6], [5], [7, 1], [4, 6]]
    together = adjusted(logits, [state_with([2], row, **kind) for row, kind in zip(ids, kinds)], (8,))
    assert torch.equal(together[0], logits[0])
    for row, (tokens, kind) in enumerate(zip(ids, kinds)):
        alone = adjusted(logits[row : row + 1], [state_with([2], tokens, **kind)], (8,))
        assert torch.equal(together[row : row + 1], alone)
