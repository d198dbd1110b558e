"""Graphs that an earlier process compiled: the same answers and reports, another entry for anything else."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import ZOO, build
from torch import fx, nn

import llmopt
from llmopt import backend, compilation, graph_cache
from llmopt.codegen.cpu import object_cache
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassContext, PassReport
from llmopt.compiler.report import GraphReport, Report


class Nothing(llmopt.Pass):
    """Changes nothing."""

    name = "change_nothing"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        return PassReport(self.name)


class Entries:
    """What a test has put into the cache, which keeps its kernels for other tests."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.files())

    def files(self) -> list[Path]:
        return sorted(object_cache.cache_folder().glob(f"{self.prefix}*"))


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Entries]:
    """No entries, and a cache that is in use."""
    found = Entries(f"test-{secrets.token_hex(8)}-")
    monkeypatch.setenv("LLMOPT_GRAPH_CACHE", "1")
    monkeypatch.setattr(graph_cache, "_file", lambda key: f"{found.prefix}{key}.graph")
    yield found
    for file in found.files():
        file.unlink()


def run(
    model: Callable[..., Any], *arguments: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, list[GraphReport]]:
    """As a new process would: result and graphs."""
    torch._dynamo.reset()
    report = Report()
    made = backend.make_backend(Options.make(options), report)
    with torch.no_grad():
        return torch.compile(model, backend=made, dynamic=dynamic)(*arguments), report.graphs


@pytest.mark.parametrize(("name", "dynamic"), [("llama", True), ("gemma2", False), ("gpt2", False)])
def test_a_second_process_compiles_nothing(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    ids = torch.randint(0, 100, (2, 13))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    first, (fresh,) = run(forward, ids, dynamic=dynamic)
    assert not fresh.from_cache
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "capture", lambda *_: pytest.fail("captured again"))
        second, (kept,) = run(forward, ids, dynamic=dynamic)
    assert kept.from_cache
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    for report in (fresh, kept):
        report.seconds.clear()
    assert kept.inputs == fresh.inputs and kept.kernels == fresh.kernels
    assert [(p.name, p.matched, p.skipped) for p in kept.passes] == [
        (p.name, p.matched, p.skipped) for p in fresh.passes
    ]
    # Costs are worked out by compiling after all; arguments are gone by then.
    assert kept.details is not None and fresh.details is not None
    assert [call.origin for call in kept.details.calls] == [call.origin for call in fresh.details.calls]
    assert "taken from the cache" in str(Report([kept]))


def test_another_length_is_served_by_the_kept_graph() -> None:
    model = build("llama")

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    run(forward, torch.randint(0, 100, (2, 13)), dynamic=True)
    torch._dynamo.reset()
    report = Report()
    compiled = torch.compile(forward, backend=backend.make_backend(Options.make(), report), dynamic=True)
    with torch.no_grad():
        for shape in ((2, 13), (3, 40), (4, 7)):
            ids = torch.randint(0, 100, shape)
            torch.testing.assert_close(compiled(ids), forward(ids), rtol=1e-4, atol=1e-4)
    assert [graph.from_cache for graph in report.graphs] == [True]


def test_weights_are_the_model_s_own() -> None:
    """Nothing of them is kept, and what is derived from them is derived anew."""
    first, second = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
    x = torch.randn(3, 8)
    run(first, x)
    result, (graph,) = run(second, x)
    assert graph.from_cache
    torch.testing.assert_close(result, second(x))


def test_writes_and_constants_come_back() -> None:
    def step(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        state.add_(x.sum())
        return x * torch.tensor([1.0, 2.0, 3.0]) + state

    x = torch.randn(3)
    for cached in (False, True):
        state, expected = torch.ones(3), torch.ones(3)
        result, (graph,) = run(step, x, state)
        assert graph.from_cache is cached
        torch.testing.assert_close(result, step(x, expected))
        torch.testing.assert_close(state, expected)


def _scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


OTHERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "number": (_scaled(3.0), torch.ones(4, 4)),
    "shape": (_scaled(2.0), torch.ones(4, 5)),
    "dtype": (_scaled(2.0), torch.ones(4, 4, dtype=torch.bfloat16)),
    "strides": (_scaled(2.0), torch.ones(4, 8)[:, ::2]),
    "op": (lambda x: x + 2.0, torch.ones(4, 4)),
    "further op": (lambda x: (x * 2.0).t(), torch.ones(4, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_graph_has_another_entry(name: str, entries: Entries) -> None:
    other, argument = OTHERS[name]
    run(_scaled(2.0), torch.ones(4, 4), dynamic=False)
    result, (graph,) = run(other, argument, dynamic=False)
    torch.testing.assert_close(result, other(argument))
    assert not graph.from_cache and len(entries) == 2


@pytest.mark.parametrize(
    "options",
    [{"graph_cache": False}, {"record_graphs": True}, {"verify": True}, {"fuel": 3}, {"rewrite_log": "log"}],
    ids=lambda options: next(iter(options)),
)
def test_who_watches_the_compilation_gets_one(
    options: dict[str, Any], entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(_scaled(2.0), torch.ones(4))
    _, (graph,) = run(_scaled(2.0), torch.ones(4), **options)
    assert not graph.from_cache and len(entries) == 1


def test_options_of_the_program_are_part_of_the_key(entries: Entries) -> None:
    run(_scaled(2.0), torch.ones(4))
    _, (graph,) = run(_scaled(2.0), torch.ones(4), disabled_passes=("normalize",))
    assert not graph.from_cache and len(entries) == 2
    assert run(_scaled(2.0), torch.ones(4), threads=1)[1][0].from_cache


def test_what_users_registered_is_not_kept(entries: Entries) -> None:
    run(_scaled(2.0), torch.ones(4))
    llmopt.register_pass(Nothing(), after="normalize")
    try:
        _, (graph,) = run(_scaled(2.0), torch.ones(4))
    finally:
        llmopt.unregister_pass(Nothing.name)
    assert not graph.from_cache and len(entries) == 1


def test_a_graph_on_aten_is_not_kept(entries: Entries) -> None:
    for _ in range(2):
        _, (graph,) = run(torch.linalg.inv, torch.eye(3))
        assert graph.fallbacks and not graph.from_cache
    assert len(entries) == 0


def test_a_graph_whose_compilation_assumes_something_is_not_kept(
    entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache Dynamo would not hear of it, and would run the graph where the assumption does not hold."""
    original = compilation.capture

    def assuming(gm: Any, example_inputs: Any) -> Any:
        captured = original(gm, example_inputs)
        size = next(n.meta["val"] for n in captured.graph.nodes if isinstance(n.meta["val"], torch.SymInt))
        assert size > 3  # a guard
        return captured

    monkeypatch.setattr(compilation, "capture", assuming)
    _, (graph,) = run(_scaled(2.0), torch.ones(5), dynamic=True)
    assert not graph.from_cache and len(entries) == 0


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"x" + content[1:]])
def test_a_damaged_entry_is_compiled_again(
    damage: Callable[[bytes], bytes], entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    run(_scaled(2.0), torch.ones(4))
    (entry,) = entries.files()
    entry.write_bytes(damage(entry.read_bytes()))
    with caplog.at_level(logging.WARNING):
        result, (graph,) = run(_scaled(2.0), torch.ones(4))
    assert not graph.from_cache and "damaged" in caplog.text
    assert result.tolist() == [2.0] * 4


@pytest.mark.parametrize("foreign", [[["os.system", 1]], [["float32", [3], "00000000"]]], ids=["call", "constant"])
@pytest.mark.parametrize("path", [("program", "steps"), ("weights", "calls"), ("constants",), ("report", "passes")])
def test_a_whole_entry_of_foreign_content_is_compiled_again(
    path: tuple[str, ...], foreign: list[Any], entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    run(_scaled(2.0), torch.ones(4))
    (entry,) = entries.files()
    data = json.loads(object_cache.read(entry.name) or b"")
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = foreign
    object_cache.write(entry.name, json.dumps(data).encode())
    with caplog.at_level(logging.WARNING):
        _, (graph,) = run(_scaled(2.0), torch.ones(4))
    assert not graph.from_cache and "cannot be used" in caplog.text


def test_a_cache_that_takes_nothing_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_cache.object_cache, "write", full)
    result, (graph,) = run(_scaled(2.0), torch.ones(4))
    assert result.tolist() == [2.0] * 4 and not graph.from_cache


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_comes_back_from_the_cache(name: str) -> None:
    model = build(name)
    ids = torch.randint(0, 100, (2, 13))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    first, _ = run(forward, ids, dynamic=True)
    second, (kept,) = run(forward, ids, dynamic=True)
    assert kept.from_cache
    torch.testing.assert_close(second, first, rtol=0, atol=0)
