"""`torch.compile(model.forward, backend="llmopt", dynamic=True)` against eager, with masks and caches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.config
from models.zoo import VOCABULARY, ZOO, build, cases, decided_rows, margin_mismatches, without
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmopt.backend import REPORT

# Of logits of order 1; see test_generate.
FLOAT_TOLERANCE = 2e-4
# Largest distance at which two tokens count as tied in bfloat16, in standard deviations of the logits.
BFLOAT_MARGIN = 0.15
# Which models run always: among the tests each kind has its turn, rope with grouped heads (llama), learned positions
# (gpt2, opt), ALiBi with its own mask (bloom), windows with soft caps (gemma2), experts (mixtral, qwen3-moe).
# Every model runs always in test_generate.
LOW_PRECISION = ("llama", "gpt2", "mixtral")


def compiled(model: PreTrainedModel, **options: Any) -> Any:
    """The model's forward through the backend, by the name that a user would give it."""
    return torch.compile(model.forward, backend="llmopt", dynamic=True, options={"fallback": "error", **options})


def ids_of(batch: int, length: int) -> Tensor:
    """Random tokens, other ones for each shape."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(97 * batch + length))


def assert_logits(actual: Tensor, expected: Tensor) -> None:
    """float32 by torch's measure, scaled for two or three layers; less precise types by margins and by size."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
        return
    flat = (actual.flatten(0, -2).float(), expected.flatten(0, -2).float())
    spread = float(flat[1].std())
    assert margin_mismatches(flat[1], flat[0], BFLOAT_MARGIN * spread) == []
    assert (flat[0] - flat[1]).square().mean().sqrt() < 0.05 * spread


def assert_compiled(count: int | None = None) -> None:
    """Everything ran on llmopt's kernels, in `count` graphs."""
    assert REPORT.graphs and all(g.refused is None and g.native_calls > 0 for g in REPORT.graphs)
    assert count is None or len(REPORT.graphs) == count


@contextmanager
def no_recompilation() -> Iterator[None]:
    """Any further compilation is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("name", cases(ZOO, "llama"))
@torch.no_grad()
def test_four_graphs_serve_every_batch_and_length(name: str) -> None:
    model = build(name)
    forward = compiled(model)
    shapes = [(1, 17), (3, 17), (1, 1), (3, 1)]
    for batch, length in shapes:
        ids = ids_of(batch, length)
        assert_logits(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert_compiled()
    assert len(REPORT.graphs) <= 4
    with no_recompilation():
        for batch, length in [(1, 40), (3, 40), (2, 5), (5, 1), (1, 2), (2, 33)]:
            ids = ids_of(batch, length)
            assert_logits(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", cases(ZOO, "gpt2", "gpt-neox", "opt", "phi3", "qwen3-moe"))
@torch.no_grad()
def test_logits_equal_eager(name: str) -> None:
    model = build(name)
    forward = compiled(model)
    for batch, length in [(3, 17), (2, 40)]:
        ids = ids_of(batch, length)
        assert_logits(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert_compiled(1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in LOW_PRECISION),
        ("llama", torch.float16),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in ZOO if name not in LOW_PRECISION),
    ],
)
@torch.no_grad()
def test_low_precision_logits_equal_eager(name: str, dtype: torch.dtype) -> None:
    model, exact = build(name, dtype), build(name)
    forward = compiled(model)
    for batch, length in [(3, 17), (2, 40)]:
        ids = ids_of(batch, length)
        # With experts, only the rows before the first near tie of a router can be compared.
        decided = torch.tensor([decided_rows(exact, row, BFLOAT_MARGIN) for row in ids.tolist()])
        keep = torch.arange(length) < decided[:, None]
        assert keep.any()
        assert_logits(forward(ids, use_cache=False).logits[keep], model(ids, use_cache=False).logits[keep])
    assert_compiled(1)


@pytest.mark.parametrize("name", cases(ZOO, "gpt2", "gemma2", "bloom"))
@torch.no_grad()
def test_left_padding(name: str) -> None:
    model = build(name)
    forward = compiled(model)
    for length in (17, 40):
        ids, mask = ids_of(3, length), torch.ones(3, length, dtype=torch.int64)
        mask[1, :5], mask[2, : length - 1] = 0, 0
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        actual = forward(ids, attention_mask=mask, use_cache=False).logits
        assert_logits(actual[mask.bool()], expected[mask.bool()])
        # The mask is data: all ones gives something else behind the padding (a window may not reach it from the end),
        # from the same graph.
        whole = forward(ids, attention_mask=torch.ones_like(mask), use_cache=False).logits
        assert_logits(whole, model(ids, use_cache=False).logits)
        assert (whole[1, 5] - actual[1, 5]).abs().max() > 50 * FLOAT_TOLERANCE
    assert_compiled(1)


def static_cache(model: PreTrainedModel, batch: int, length: int = 48) -> StaticCache:
    """An empty cache with its tensors allocated, so that no graph has to do it."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(batch, heads, size, model.dtype, torch.device("cpu"))
    return cache


# Bloom and GPT-2 count their past from the cache's Python state.
@pytest.mark.parametrize("name", cases(("llama", "gemma2", "qwen3"), "gemma2"))
@torch.no_grad()
def test_static_cache(name: str) -> None:
    """Prefill and decode write the same cache as eager does; decode steps do not recompile."""
    model = build(name)
    # The sliding layers' caches write by index_put, which has no kernel yet.
    forward = compiled(model, fallback="silent" if name == "gemma2" else "error")
    ours, theirs = static_cache(model, 2), static_cache(model, 2)
    ids = ids_of(2, 24)
    position = 0
    for step, count in enumerate([17, 1, 1, 1, 1, 1]):
        chunk = ids[:, position : position + count]
        place = torch.arange(position, position + count)
        arguments = {"position_ids": place[None].expand(2, -1), "use_cache": True}
        if step >= 3:
            with no_recompilation():
                actual = forward(chunk, past_key_values=ours, **arguments).logits
        else:
            actual = forward(chunk, past_key_values=ours, **arguments).logits
        assert_logits(actual, model(chunk, past_key_values=theirs, **arguments).logits)
        position += count
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
            torch.testing.assert_close(mine.values, other.values, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    assert ours.layers[0].keys.abs().sum() > 0
    assert_compiled()


@pytest.mark.parametrize("name", cases(("llama", "gpt2", "bloom", "gpt-neox"), "llama"))
@torch.no_grad()
def test_dynamic_cache(name: str) -> None:
    model = build(name)
    forward = compiled(model)
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids = ids_of(2, 22)
    position = 0
    for count in [17, 1, 1, 1, 1]:
        chunk = ids[:, position : position + count]
        result = forward(chunk, past_key_values=ours, use_cache=True)
        assert result.past_key_values is ours
        assert_logits(result.logits, model(chunk, past_key_values=theirs, use_cache=True).logits)
        position += count
        assert ours.get_seq_length() == theirs.get_seq_length() == position
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    assert_compiled()


@torch.no_grad()
def test_model_output_and_a_new_cache_are_returned() -> None:
    model = build("llama")
    ids = ids_of(2, 9)
    result = compiled(model)(ids, output_hidden_states=True)
    expected = model(ids, output_hidden_states=True)
    assert type(result) is CausalLMOutputWithPast
    assert isinstance(result.past_key_values, DynamicCache)
    assert len(result.hidden_states) == len(expected.hidden_states) == 3
    for mine, other in zip(result.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    ours, theirs = (output.past_key_values.layers[1].values for output in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    as_tuple = compiled(model)(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert_logits(as_tuple[0], expected.logits)


class Pair(NamedTuple):
    """A container of a user."""

    first: Tensor
    second: dict[str, Tensor]


class Containers(nn.Module):
    """Takes and gives nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs: dict[str, Any], scale: float = 2.0) -> dict[str, Any]:
        x, (y, more) = inputs["x"], inputs["pair"]
        pair = Pair(self.linear(x) * scale, {"sum": x + y, "same": y})
        return {"pair": pair, "list": [more[0] - 1, None, (x.shape[0], "text")]}


@torch.no_grad()
def test_nested_containers() -> None:
    model = Containers()
    for rows in (3, 5):
        inputs = {"x": torch.randn(rows, 8), "pair": (torch.randn(rows, 8), [torch.randn(2)])}
        actual = torch.compile(model, backend="llmopt", dynamic=True)(inputs)
        expected = model(inputs)
        assert isinstance(actual["pair"], Pair)
        torch.testing.assert_close(actual["pair"].first, expected["pair"].first)
        torch.testing.assert_close(actual["pair"].second["sum"], expected["pair"].second["sum"])
        assert actual["pair"].second["same"] is inputs["pair"][0]
        torch.testing.assert_close(actual["list"][0], expected["list"][0])
        assert actual["list"][1:] == [None, (rows, "text")]
    assert_compiled(1)


class Breaks(nn.Module):
    """Leaves the graph in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 16), nn.Linear(16, 8)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.before(x))
        self.note(hidden)
        return self.after(hidden) + x

    @torch._dynamo.disable
    def note(self, hidden: Tensor) -> None:
        """Python that Dynamo must not trace."""
        self.seen.append(float(hidden.sum()))


@torch.no_grad()
def test_several_graphs_after_a_break() -> None:
    model = Breaks()
    forward = torch.compile(model, backend="llmopt", dynamic=True)
    for rows in (3, 5, 7):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(forward(x), model(x))
    assert_compiled(2)
    assert model.seen[0::2] == pytest.approx(model.seen[1::2], rel=1e-5)


def rename_submodules(model: nn.Module) -> int:
    """Renames every submodule but list items to a random name; the model's code finds them through properties."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) or not module._modules:
            continue
        names = {path: f"zq{random.randrange(1 << 40):x}" for path in module._modules}
        found = {path: property(lambda self, name=name: self._modules[name]) for path, name in names.items()}
        vars(module)["_modules"] = {names[path]: child for path, child in module._modules.items()}
        module.__class__ = type("Renamed", (type(module),), found)
        count += len(names)
    return count


@pytest.mark.parametrize("name", cases(("llama", "gpt2"), "llama"))
@torch.no_grad()
def test_renamed_submodules_change_no_match(name: str) -> None:
    """Passes see computation, never names."""
    ids = ids_of(2, 9)
    matched = []
    for renamed in (False, True):
        torch._dynamo.reset()
        model = build(name)
        expected = model(ids, use_cache=False).logits
        assert not renamed or rename_submodules(model) > 20
        assert_logits(compiled(model)(ids, use_cache=False).logits, expected)
        matched.append([(p.name, p.matched) for p in REPORT.graphs[0].passes])
    assert matched[0] == matched[1]
    assert sum(count for _, count in matched[0]) > 20


@torch.no_grad()
def test_a_lost_feature_would_be_noticed() -> None:
    """The comparison above tells a model from its maimed twin."""
    ids = ids_of(3, 40)
    with pytest.raises(AssertionError):
        assert_logits(without("gemma2", "window")(ids).logits, build("gemma2")(ids).logits)
    with pytest.raises(AssertionError):
        maimed, whole = without("llama", "grouped heads", torch.bfloat16), build("llama", torch.bfloat16)
        assert_logits(maimed(ids).logits, whole(ids).logits)
