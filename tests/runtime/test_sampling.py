"""The sampler draws from the distribution that the parameters describe, and each row by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.codegen.cpu.largest import largest_kernel
from llmopt.errors import SamplingError, ToolchainError
from llmopt.runtime.sampling import Constraints, Sampled, Sampler, SamplingParams, SamplingState, blocks, truncation
from llmopt.runtime.sampling.blocks import Workspace, draw, largest, several_largest

DRAWS = 6000
# A short vocabulary, and one that is longer than the first look at the largest logits.
SHORT = torch.tensor([2.0, -1.0, 1.5, 0.3, 1.9, -4.0, 0.0, 1.1])
LONG = torch.linspace(-1.0, 1.0, 301)[torch.randperm(301, generator=torch.Generator().manual_seed(0))] * 2.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Everything here is small: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens_of(sampler: Sampler, logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One step of all rows, none of which may fail."""
    results = sampler(logits, states)
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.token for result in results if isinstance(result, Sampled)]


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution, written down from the definitions: each option on what the one before it left."""
    p = (logits.double() / params.temperature).softmax(0)

    def only(kept: list[bool]) -> Tensor:
        left = torch.where(torch.tensor(kept), p, 0)
        return left / left.sum()

    if params.top_k > 0:
        p = only([int((p > own).sum()) < params.top_k for own in p])
    p = only([bool(own > 0 and p[p > own].sum() < params.top_p) for own in p])
    p = only([bool(own >= params.min_p * p.max()) for own in p])
    if params.typical_p < 1:
        surprise = -p.log()
        distance = (surprise - (p * surprise).nansum()).abs()
        # A token stays if those that are more typical do not hold the mass yet.
        p = only([bool(own > 0 and p[distance < d].sum() < params.typical_p) for own, d in zip(p, distance)])
    return p


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic over its 0.9999 quantile (by Wilson and Hilferty); above 1 is a wrong sampler.

    Tokens that are expected fewer than 8 times are counted together.
    """
    counts, wanted = counts.double(), expected * counts.sum()
    if counts[expected == 0].sum() > 0:
        return math.inf
    often = wanted >= 8
    cells = torch.cat([counts[often], counts[~often].sum().unsqueeze(0)])
    means = torch.cat([wanted[often], wanted[~often].sum().unsqueeze(0)])
    if means[-1] < 8:
        cells, means = cells[:-1], means[:-1]
    freedom = len(cells) - 1
    statistic = float(((cells - means).square() / means).sum())
    if freedom == 0:
        return statistic
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


def statistic(logits: Tensor, case: dict[str, Any], right: Tensor) -> float:
    """Draws once from each of many streams of one request, all in one batch."""
    params = SamplingParams(**case, seed=7)
    states = [SamplingState(params, [0], stream) for stream in range(DRAWS)]
    tokens = tokens_of(Sampler(len(logits)), logits.expand(DRAWS, -1), states)
    return chi_squared(torch.bincount(torch.tensor(tokens), minlength=len(logits)), right)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 200},
    {"top_k": 2000},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"typical_p": 0.4},
    {"typical_p": 0.9},
    {"top_k": 4, "top_p": 0.85},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.3, "typical_p": 0.7},
]


@pytest.mark.parametrize("logits", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: dict[str, Any], logits: Tensor) -> None:
    assert statistic(logits, case, reference(logits, SamplingParams(**case))) < 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"temperature": 1.0}, {"temperature": 1.2}),
        ({"top_k": 4}, {"top_k": 3}),
        ({"top_k": 2}, {"top_k": 3}),
        ({"top_p": 0.8}, {"top_p": 0.6}),
        ({"min_p": 0.4}, {"min_p": 0.5}),
        ({"typical_p": 0.4}, {"typical_p": 0.6}),
        ({}, {"min_p": 0.05}),
    ],
)
def test_another_parameter_is_noticed(wrong: dict[str, Any], right: dict[str, Any]) -> None:
    assert statistic(SHORT, wrong, reference(SHORT, SamplingParams(**right))) > 1


def _next_token(weights: Tensor, uniforms: Tensor) -> Tensor:
    return (draw(weights, uniforms) + 1) % weights.shape[1]


def _one_more(rows: truncation._Rows, values: Tensor, work: Workspace) -> Tensor:
    return THRESHOLD(rows._replace(k=rows.k + 1), values, work)


def _no_nucleus(rows: truncation._Rows, values: Tensor, work: Workspace) -> Tensor:
    return THRESHOLD(rows._replace(p=torch.ones_like(rows.p)), values, work)


THRESHOLD, UNIFORM = truncation._threshold, SamplingState.uniform


@pytest.mark.parametrize(
    ("where", "name", "maimed", "case"),
    [
        (truncation, "draw", _next_token, {}),
        (truncation, "draw", lambda w, u: draw(w, u * 0.95), {}),
        (truncation, "draw", lambda w, u: draw(w.sqrt(), u), {"min_p": 0.1}),
        (truncation, "_threshold", _one_more, {"top_k": 3}),
        (truncation, "_threshold", _no_nucleus, {"top_p": 0.6}),
        (truncation, "_untypical", lambda w, m: torch.zeros_like(w, dtype=torch.bool), {"typical_p": 0.4}),
        (SamplingState, "uniform", lambda self: UNIFORM(self) ** 1.3, {}),
        (SamplingState, "uniform", lambda self: 0.5, {}),
    ],
)
def test_a_maimed_sampler_is_noticed(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, maimed: Callable[..., Any], case: dict[str, Any]
) -> None:
    right = reference(SHORT, SamplingParams(**case))
    assert statistic(SHORT, case, right) < 1
    monkeypatch.setattr(where, name, maimed)
    assert statistic(SHORT, case, right) > 1


PROMPT, HISTORY = [0, 3, 3], [4, 4, 0]
WORDS = Constraints(bad_words=((2,), (0, 4)))

ADJUSTED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.5},
    {"logit_bias": {1: 1.5, 4: -1.0}},
    {"allowed_token_ids": [0, 2, 5, 7]},
    {"bad_words": ("c", "ae")},
    {"min_tokens": 4, "stop_token_ids": (0, 7)},
    {
        "logit_bias": {7: 1.5},
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "top_p": 0.9,
    },
]


def adjusted(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits after the options that change them, one token at a time, by their definitions."""
    scores = logits.double().tolist()
    for token in range(len(scores)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            scores[token] = -math.inf
        if params.bad_words and token in (2, 4):  # the word (2,), and (0, 4) after the 0 that ends HISTORY
            scores[token] = -math.inf
        if len(HISTORY) < params.min_tokens and token in params.stop_token_ids:
            scores[token] = -math.inf
        scores[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in PROMPT + HISTORY:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        times = HISTORY.count(token)
        scores[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return torch.tensor(scores, dtype=torch.float64)


def adjusted_statistic(case: dict[str, Any], right: dict[str, Any]) -> float:
    """Draws once after HISTORY from each of many streams, against what `right` should give."""
    params, wanted = SamplingParams(**case, seed=11), SamplingParams(**right)
    states = []
    for stream in range(DRAWS):
        state = SamplingState(params, PROMPT, stream, constraints=WORDS if params.bad_words else None)
        for token in HISTORY:
            state.accept(token)
        states.append(state)
    tokens = tokens_of(Sampler(len(SHORT)), SHORT.expand(DRAWS, -1), states)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(SHORT))
    return chi_squared(counts, reference(adjusted(SHORT, wanted), wanted.replace(temperature=1.0)))


@pytest.mark.parametrize("case", ADJUSTED)
def test_draws_from_changed_logits_follow_the_distribution(case: dict[str, Any]) -> None:
    assert adjusted_statistic(case, case) < 1


@pytest.mark.parametrize("case", ADJUSTED)
def test_a_sampler_that_ignores_an_option_is_noticed(case: dict[str, Any]) -> None:
    name = next(iter(case))
    assert adjusted_statistic({key: value for key, value in case.items() if key != name}, case) > 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.6}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.8}),
        # What was generated once and twice: one penalty taken for the other.
        ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {1: 1.5}}, {"logit_bias": {1: 1.2}}),
        ({"allowed_token_ids": [0, 2, 5]}, {"allowed_token_ids": [0, 2, 5, 7]}),
    ],
)
def test_another_strength_of_an_option_is_noticed(wrong: dict[str, Any], right: dict[str, Any]) -> None:
    assert adjusted_statistic(wrong, right) > 1


def test_successive_draws_of_one_stream_are_independent() -> None:
    sampler, state = Sampler(4), SamplingState(SamplingParams(seed=3), [0])
    logits = torch.zeros(1, 4)
    tokens = [tokens_of(sampler, logits, [state])[0] for _ in range(4000)]
    pairs = torch.bincount(torch.tensor([4 * a + b for a, b in zip(tokens[::2], tokens[1::2])]), minlength=16)
    assert chi_squared(pairs, torch.full((16,), 1 / 16, dtype=torch.float64)) < 1
    lag = torch.bincount(torch.tensor([(b - a) % 4 for a, b in itertools.pairwise(tokens)]), minlength=4)
    assert chi_squared(lag, torch.full((4,), 1 / 4, dtype=torch.float64)) < 1


# ---- each row by itself --------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_k": 130, "top_p": 0.99},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.02, "temperature": 1.5},
    {"typical_p": 0.8, "top_k": 300},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 3},
    {"allowed_token_ids": [1, 5, 9, 40], "logit_bias": {5: 1.0}},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1999, 20011])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_the_same_alone_and_in_any_batch(dtype: torch.dtype, vocab: int, threads: int) -> None:
    """Tokens and log probabilities, to the last bit, over several steps; rounding to bfloat16 makes many ties."""
    torch.set_num_threads(threads)
    steps, sampler = 2, Sampler(vocab, (3,))
    logits = (torch.randn(steps, len(KINDS), vocab) * 3).to(dtype)

    def states() -> list[SamplingState]:
        return [SamplingState(SamplingParams(**kind, seed=i), [1, 2, 3, 2], i) for i, kind in enumerate(KINDS)]

    together = states()
    expected = [sampler(logits[step], together) for step in range(steps)]
    for row, state in enumerate(states()):
        assert [sampler(logits[step, row : row + 1], [state])[0] for step in range(steps)] == [
            result[row] for result in expected
        ], KINDS[row]
    order = torch.randperm(len(KINDS)).tolist()
    shuffled = [states()[row] for row in order]
    for step in range(steps):
        assert sampler(logits[step, order], shuffled) == [expected[step][row] for row in order]


def test_rows_that_are_settled_at_different_widths_are_not_mixed_up() -> None:
    """The first is looked at and left, the second comes in later: then all rows are, in another order."""
    logits = torch.zeros(2, 3000)
    logits[0] = torch.randn(3000) * 0.1  # its nucleus is wider than the first look
    logits[1, 2000:2500] = 9.0
    pair = [SamplingParams(top_p=0.9, seed=1), SamplingParams(top_k=500, seed=1)]
    together = tokens_of(Sampler(3000), logits, [SamplingState(params, [1]) for params in pair])
    alone = [tokens_of(Sampler(3000), logits[row : row + 1], [SamplingState(pair[row], [1])])[0] for row in range(2)]
    assert together == alone and 2000 <= together[1] < 2500


def test_seeds_and_streams() -> None:
    flat = torch.zeros(1, 1000)

    def run(seed: int | None, stream: int = 0) -> list[int]:
        state = SamplingState(SamplingParams(temperature=2.0, seed=seed), [1], stream)
        return [tokens_of(Sampler(1000), flat, [state])[0] for _ in range(20)]

    assert run(4) == run(4)
    assert len({tuple(run(seed, stream)) for seed in (4, 5) for stream in (0, 1)}) == 4
    assert run(None) != run(None)
    torch.manual_seed(5)
    first = run(None)
    torch.manual_seed(5)
    assert run(None) == first


def test_the_random_stream_is_philox_and_does_not_change() -> None:
    """A seed promises the same text in the next version too."""
    state = SamplingState(SamplingParams(seed=42), [1], stream=3)
    drawn = []
    for token in range(3):
        drawn += [state.uniform(), state.uniform()]
        state.accept(token)
    assert [round(number, 12) for number in drawn[::2]] == FIRST_UNIFORMS
    assert drawn[::2] == drawn[1::2], "a number is the next token's until there is one"


FIRST_UNIFORMS = [0.712214296032, 0.070506618028, 0.393977748996]


def test_one_bad_row_fails_alone() -> None:
    params = SamplingParams(seed=1)
    logits = torch.randn(6, 50)
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    logits[4, 3] = math.inf
    for extra in ({}, {"logit_bias": {2: 1.0}}, {"temperature": 0.0}, {"allowed_token_ids": [1, 2]}):
        states = [SamplingState(params.replace(**extra), [1], i) for i in range(6)]
        results = Sampler(50)(logits, states)
        assert [isinstance(r, SamplingError) for r in results] == [False, True, True, False, True, False], extra
        assert "NaN" in str(results[1]) and "-inf" in str(results[2]) and "infinity" in str(results[4])
        assert [len(state.generated) for state in states] == [1, 0, 0, 1, 0, 1]
        alone = SamplingState(params.replace(**extra), [1], 5)
        assert Sampler(50)(logits[5:], [alone])[0] == results[5]


def test_ids_beyond_the_logits_touch_no_other_row() -> None:
    states = [SamplingState(SamplingParams(temperature=0), [1]) for _ in range(3)]
    bad = [
        SamplingParams(temperature=0, logit_bias={10: 100.0}),
        SamplingParams(temperature=0, allowed_token_ids=[12]),  # type: ignore[arg-type]
        SamplingParams(temperature=0, stop_token_ids=[15], min_tokens=2),  # type: ignore[arg-type]
    ]
    logits = torch.randn(6, 10)
    mixed = [state for pair in zip((SamplingState(p, [1]) for p in bad), states) for state in pair]
    results = Sampler(10)(logits, mixed)
    assert [isinstance(result, SamplingError) for result in results] == [True, False] * 3
    assert [state.generated for state in states] == [[row] for row in logits[1::2].argmax(-1).tolist()]


@pytest.mark.parametrize("shape", [(2, 10), (1, 9), (10,), (1, 1, 10)])
def test_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(SamplingError, match="for 1 sequences over 10 token ids"):
        Sampler(10)(torch.zeros(shape), [SamplingState(SamplingParams(), [1])])


def test_logits_that_require_gradients() -> None:
    logits = torch.randn(2, 2000, requires_grad=True)
    for params in (SamplingParams(top_p=0.9999), SamplingParams(logit_bias={1: 2.0}), SamplingParams(temperature=0)):
        tokens_of(Sampler(2000), logits, [SamplingState(params, [1]) for _ in range(2)])


# ---- greedy, minimum length, what may not follow ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [4, 511, 512, 513, 1300, 128256])
@pytest.mark.parametrize("compiler", [True, False])
def test_greedy_is_the_first_of_the_best(
    dtype: torch.dtype, vocab: int, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr(blocks, "largest_kernel", lambda dtype: None)
    logits = torch.randn(3, vocab + 8).to(dtype)
    logits[:, vocab:] = 99.0  # padding of the vocabulary
    logits[1, vocab // 2] = logits[1, vocab - 1] = 50.0
    logits[2, vocab - 1] = 50.0
    given = logits.clone()
    states = [SamplingState(SamplingParams(temperature=0), [1]) for _ in range(3)]
    assert tokens_of(Sampler(vocab), logits, states) == [
        int(logits[0, :vocab].float().argmax()),
        vocab // 2,
        vocab - 1,
    ]
    assert torch.equal(logits, given), "the caller's logits are left as they are"


@pytest.mark.parametrize("width", [40, 1300])
@pytest.mark.parametrize("compiler", [True, False])
def test_the_largest_by_the_bits_of_bfloat16(width: int, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order of bits is not that of numbers: negative rows, zeros of both signs, NaN of both signs."""
    if not compiler:
        monkeypatch.setattr(blocks, "largest_kernel", lambda dtype: None)
    rows = torch.randn(8, width).bfloat16()
    rows[1] = -rows[1].abs() - 1
    rows[2] = rows[3] = -1.0
    rows[2, 9], rows[2, 12] = -0.0, 0.0
    rows[3, 7] = rows[3, 20] = 0.0
    rows[4, 5] = -math.inf
    rows[5, 6], rows[5, 30] = math.inf, math.inf
    for group in ([0, 4, 5], [1], [2], [3], list(range(6))):
        values, places = largest(rows[group])
        exact = rows[group].float()
        assert values.dtype == torch.float32 and values.tolist() == exact.amax(-1).tolist()
        assert places.tolist() == [row.index(max(row)) for row in exact.tolist()]
    for bits in (0x7FC0, -0x40):  # the second is 0xFFC0, which a processor makes of inf - inf
        rows[7].view(torch.int16)[11] = bits
        for kind in (torch.bfloat16, torch.float32):
            values, places = largest(rows[[0, 7]].to(kind))
            assert values.isnan().tolist() == [False, True] and places[1] == 11


def test_without_a_compiler_the_largest_are_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ToolchainError("no C++ compiler found")

    monkeypatch.setattr("llmopt.codegen.cpu.largest.build_library", missing)
    monkeypatch.setattr(blocks, "largest_kernel", largest_kernel.__wrapped__)
    logits = torch.randn(3, 700)
    states = [SamplingState(SamplingParams(temperature=0), [1]) for _ in range(3)]
    assert blocks.largest_numbers(logits, 700) is None
    assert tokens_of(Sampler(700), logits, states) == logits.argmax(-1).tolist()
    assert [state.generated for state in states] == [[token] for token in logits.argmax(-1).tolist()]


def test_several_largest_are_those_of_topk() -> None:
    for vocab, count in ((70, 5), (5000, 1), (5000, 19), (5000, 700), (64 * 40, 8)):
        rows = torch.randn(3, vocab)
        values, places = several_largest(rows, count)
        assert torch.equal(values, rows.topk(count).values)
        assert torch.equal(rows.gather(1, places), values)
        assert torch.equal(largest(rows)[1], rows.argmax(-1))
    tied = torch.zeros(1, 1000).index_fill_(1, torch.tensor([3, 500, 900]), 1.0)
    assert several_largest(tied, 4)[1][0, :3].tolist() == [3, 500, 900]


def test_ends_do_not_come_early() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 4], logits[0, 2], logits[0, 5] = 9.0, 8.0, 7.0
    state = SamplingState(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(2,)), [1])
    assert [tokens_of(Sampler(6, (4,)), logits, [state])[0] for _ in range(3)] == [5, 5, 4]


def test_bad_words_are_not_completed() -> None:
    words = Constraints(bad_words=((3,), (4, 5), (1, 4, 2)))
    state = SamplingState(SamplingParams(temperature=0, bad_words=("a", "b", "c")), [4], constraints=words)
    sampler = Sampler(6)

    def step(*order: int) -> int:
        logits = torch.zeros(1, 6)
        for value, token in enumerate(reversed(order)):
            logits[0, token] = value + 1.0
        return tokens_of(sampler, logits, [state])[0]

    assert step(3, 5, 1) == 5, "the prompt's 4 is not what was generated"
    assert [step(3, 1), step(3, 4), step(2, 5, 0)] == [1, 4, 0]
    assert [step(4), step(2)] == [4, 2]


def test_an_impossible_choice_is_an_error_of_its_row() -> None:
    state = SamplingState(SamplingParams(allowed_token_ids=(4,), min_tokens=1), [1])
    (result,) = Sampler(6, (4,))(torch.zeros(1, 6), [state])
    assert isinstance(result, SamplingError) and "no token may follow" in str(result)


def test_logprobs() -> None:
    """Of the model's own distribution, whatever else the parameters do."""
    logits = torch.randn(3, 3000) * 2
    expected = logits.double().log_softmax(-1)
    params = SamplingParams(seed=1, temperature=2.0, top_k=50, logit_bias={7: 50.0}, logprobs=4)
    counts = (4, 0, None)
    states = [SamplingState(params.replace(logprobs=count), [1], i) for i, count in enumerate(counts)]
    results = Sampler(3000)(logits, states)
    for row, (result, count, state) in enumerate(zip(results, counts, states)):
        assert isinstance(result, Sampled) and result.token == 7
        if count is None:
            assert result.logprob is None and result.top_logprobs is None
            continue
        assert result.logprob == pytest.approx(float(expected[row, 7]), abs=1e-5)
        assert state.cumulative_logprob == result.logprob
        assert result.top_logprobs is not None
        assert list(result.top_logprobs) == [*expected[row].topk(count).indices.tolist(), 7]
        for token, value in result.top_logprobs.items():
            assert value == pytest.approx(float(expected[row, token]), abs=1e-5)


def test_best_of_ranks_by_log_probability() -> None:
    state = SamplingState(SamplingParams(n=1, best_of=2, seed=0), [1])
    (result,) = Sampler(50)(torch.randn(1, 50), [state])
    assert isinstance(result, Sampled) and result.logprob is not None and result.top_logprobs is None


def test_prompt_logprobs_in_chunks() -> None:
    from llmopt.runtime.sampling import token_logprobs

    logits, prompt = torch.randn(70, 900), torch.randint(0, 900, (71,)).tolist()
    whole = token_logprobs(logits, prompt[1:], 3)
    chunked = [e for s in range(0, 70, 13) for e in token_logprobs(logits[s : s + 13], prompt[s + 1 : s + 14], 3)]
    assert chunked == whole and len(whole) == 70
    expected = logits.double().log_softmax(-1)
    for row, entry in enumerate(whole):
        token = prompt[row + 1]
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert list(entry.top_logprobs)[:3] == expected[row].topk(3).indices.tolist() and token in entry.top_logprobs
