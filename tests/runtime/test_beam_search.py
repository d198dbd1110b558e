"""Beam search against transformers' on tiny models, and its edges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from models.zoo import VOCABULARY, build, prompts
from torch import Tensor
from transformers import PreTrainedModel

from llmopt.errors import OptionError, SamplingError
from llmopt.runtime.beam_search import Beam, BeamSearch, BeamSearchParams, beam_search

# One token in three ends a beam: rarer ends would seldom tell one rule of stopping from another.
EOS = tuple(range(3, VOCABULARY, 3))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Everything here is small: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return build(name)


def stepper(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[Tensor, Callable[..., Tensor]]:
    """The prompt's logits, and a step without a cache: each beam's whole text is computed again."""
    rows: list[list[int]] = [list(prompt)]

    @torch.no_grad()
    def logits() -> Tensor:
        return model(torch.tensor(rows)).logits[:, -1]

    def step(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        nonlocal rows
        rows = [[*rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return logits()

    return logits(), step


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "case",
    [
        {"beam_width": 1, "max_tokens": 7, "ignore_eos": True},
        {"beam_width": 4, "max_tokens": 1},
        {"beam_width": 3, "max_tokens": 12},
        {"beam_width": 5, "max_tokens": 12, "early_stopping": True},
        {"beam_width": 4, "max_tokens": 12, "early_stopping": "never"},
        {"beam_width": 2, "max_tokens": 12, "length_penalty": 2.0},
        {"beam_width": 2, "max_tokens": 12, "length_penalty": 2.0, "early_stopping": "never"},
        {"beam_width": 3, "max_tokens": 12, "length_penalty": 1.5, "early_stopping": True},
        {"beam_width": 4, "max_tokens": 12, "length_penalty": 0.0, "early_stopping": "never"},
        {"beam_width": 3, "max_tokens": 12, "length_penalty": -1.0},
        {"beam_width": 4, "max_tokens": 6, "ignore_eos": True},
    ],
)
def test_beams_are_those_of_transformers(name: str, case: dict[str, Any]) -> None:
    model, params = model_of(name), BeamSearchParams(**case)
    eos: list[int] | None = None if params.ignore_eos else list(EOS)
    ended = 0
    for prompt in prompts((1, 5, 9, 14, 20, 31), seed=1):
        first, step = stepper(model, prompt)
        beams = beam_search(step, first, params, EOS)
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                num_beams=params.beam_width,
                num_return_sequences=params.beam_width,
                max_new_tokens=params.max_tokens,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                eos_token_id=eos,
                pad_token_id=VOCABULARY - 1,
                return_dict_in_generate=True,
                output_scores=True,
            )
        rows = [row[len(prompt) :] for row in expected.sequences.tolist()]
        assert len(beams) == len(rows)
        for beam, row in zip(beams, rows):
            assert list(beam.tokens) == row[: len(beam.tokens)]
            assert all(token == VOCABULARY - 1 for token in row[len(beam.tokens) :])
            ended += len(beam.tokens) < params.max_tokens
        if params.beam_width > 1:
            assert [beam.score for beam in beams] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
    # A penalty of 2 favours the longest: there an end is met on the way, and left.
    idle_by_design = params.ignore_eos or params.max_tokens == 1 or params.length_penalty == 2.0
    assert ended or idle_by_design, "no beam met an end: the case tests little"


def test_the_best_of_all_continuations_is_found() -> None:
    """A search as wide as the tree finds what trying everything finds."""
    torch.manual_seed(0)
    table = torch.randn(4, 4, 4) * 2  # logits after the last two tokens

    def score(tokens: Sequence[int]) -> float:
        context, total = [0, 0], 0.0
        for token in tokens:
            total += float(table[context[-2], context[-1]].log_softmax(0)[token])
            context.append(token)
        return total

    texts: list[list[int]] = [[]]

    def step(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        nonlocal texts
        texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return torch.stack([table[([0, 0, *text])[-2], ([0, 0, *text])[-1]] for text in texts])

    params = BeamSearchParams(beam_width=4, max_tokens=2, length_penalty=0.0)
    beams = beam_search(step, table[0, 0].unsqueeze(0), params)
    everything = sorted(([a, b] for a in range(4) for b in range(4)), key=lambda text: -score(text))
    assert [list(beam.tokens) for beam in beams] == everything[:4]
    assert [beam.score for beam in beams] == pytest.approx([score(text) for text in everything[:4]], abs=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"beam_width": 0},
        {"beam_width": 1 << 20},
        {"beam_width": 2.0},
        {"beam_width": 2, "max_tokens": 0},
        {"beam_width": 2, "length_penalty": float("nan")},
        {"beam_width": 2, "early_stopping": "always"},
        {"beam_width": 2, "early_stopping": None},
        {"beam_width": 2, "ignore_eos": 1},
    ],
)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        BeamSearchParams(**bad)


def test_bad_logits() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3))
    with pytest.raises(SamplingError, match="NaN"):
        search.advance(torch.full((1, 9), float("nan")))
    with pytest.raises(SamplingError, match="fewer than beam_width = 3"):
        search.advance(torch.zeros(1, 2))
    with pytest.raises(SamplingError, match="2 rows of logits for 1 beams"):
        search.advance(torch.zeros(2, 9))


def test_it_stops_when_the_finished_are_better() -> None:
    """With an end that is nearly certain, nothing else is followed for long."""
    logits = torch.zeros(2, 9)
    logits[:, 0] = 20.0
    calls = 0

    def step(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        nonlocal calls
        calls += 1
        return logits

    (best, *_) = beam_search(step, logits[:1], BeamSearchParams(beam_width=2, max_tokens=100), (0,))
    assert best == Beam((0,), pytest.approx(0.0, abs=1e-6)) and calls < 4
