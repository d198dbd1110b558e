"""What every test of a pass does with a captured graph: run the passes before it, then it, and compare."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs.capturing import Caught, Function, catch
from torch import fx

from llmopt.compiler.graph import graph_text, is_tensor, placeholders, tensor, to_expr
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport, copy_graph, run_pipeline
from llmopt.compiler.verify import Level, check_graph, compare_graphs, sample_inputs
from llmopt.passes.pipeline import BACKEND

# The printed form of a captured graph differs between versions; what a pass does with it does not.
GOLDEN_VERSIONS = {"torch": "2.13", "transformers": "5.24"}


@dataclass
class Rewritten:
    """A graph before and after one pass, and what the pass reported."""

    before: fx.Graph
    after: fx.Graph
    report: PassReport

    def targets(self) -> list[str]:
        """The ops of the graph after the pass."""
        return [str(n.target).removesuffix(".default") for n in self.after.nodes if n.op == "call_function"]

    def count(self, target: str) -> int:
        """How often an op occurs after the pass."""
        return self.targets().count(target)


def passes_before(item: Pass) -> tuple[Pass, ...]:
    """The passes of the backend's pipeline that run before the first of this name."""
    return BACKEND[: [p.name for p in BACKEND].index(item.name)]


def prepared(item: Pass, function: Function, *args: Any, **how: Any) -> Caught:
    """`function` captured, after the passes that run before `item`."""
    caught = catch(function, *args, **how)
    run_pipeline(caught.graph, passes_before(item), Options())
    return caught


def run_alone(item: Pass, graph: fx.Graph) -> PassReport:
    """Runs one pass, unless LLMOPT_DISABLE switches it off: its tests must fail then (test_disable.py)."""
    options = Options.make(None)
    if item.name in options.disabled_passes and not item.required:
        return PassReport(item.name, disabled=True)
    return item.run(graph, PassContext(options))


def input_sizes(graph: fx.Graph) -> list[Any]:
    """The sizes of the inputs, as expressions; a symbol that was fixed meanwhile is its number."""
    return [list(map(to_expr, tensor(n).shape)) for n in placeholders(graph) if is_tensor(n)]


def rewrite(item: Pass, function: Function, *args: Any, **how: Any) -> Rewritten:
    """Runs one pass; checks that results stay equal on fresh inputs, and that a second run finds nothing."""
    caught = prepared(item, function, *args, **how)
    before = copy_graph(caught.graph)
    fixed = lambda: [[size.is_number for size in shape] for shape in input_sizes(caught.graph)]  # noqa: E731
    was_fixed = fixed()
    report = run_alone(item, caught.graph)
    assert fixed() == was_fixed, "a pass fixes no size at its present value"
    caught.graph.lint()
    check_graph(caught.graph, Level.CAPTURED if item.produces is None else item.produces, item.name)
    for seed in (1, 2):
        compare_graphs(before, caught.graph, sample_inputs(before, seed), item.name, item.budget)
    result = Rewritten(before, copy_graph(caught.graph), report)
    if report.matched == 0:
        assert graph_text(caught.graph) == graph_text(before), "a pass that matches nothing changes nothing"
    again = run_alone(item, caught.graph)
    assert again.matched == 0, f"{item.name} is not idempotent"
    assert graph_text(caught.graph) == graph_text(result.after)
    return result


def must_not_fire(item: Pass, reason: str | None, function: Function, *args: Any, **how: Any) -> None:
    """The pass leaves the graph as it is and reports why, once or more."""
    result = rewrite(item, function, *args, **how)
    assert result.report.matched == 0
    if reason is None:
        assert not result.report.skipped, "it does not even look like the pattern"
    else:
        assert result.report.skipped[reason] > 0, dict(result.report.skipped)


def ops_when_disabled(item: Pass, function: Function, *args: Any, **how: Any) -> list[str]:
    """The ops that the whole backend pipeline makes without one pass."""
    caught = catch(function, *args, **how)
    expected = caught.run()
    reports = run_pipeline(caught.graph, BACKEND, Options(disabled_passes=(item.name,)))
    assert all(report.disabled and report.matched == 0 for report in reports if report.name == item.name)
    torch.testing.assert_close(caught.run(), expected)
    return [str(n.target).removesuffix(".default") for n in caught.graph.nodes if n.op == "call_function"]


def assert_golden(result: Rewritten, expected: str) -> None:
    """Compares the printed graph before and after with the text in the test; `EXPECTTEST_ACCEPT=1` rewrites it."""
    for package, version in GOLDEN_VERSIONS.items():
        if not importlib.metadata.version(package).startswith(version):
            pytest.skip(f"goldens are held for {package} {version}")
    text = f"{graph_text(result.before)}\n---\n{graph_text(result.after)}"
    assert_expected_inline(text, expected, skip=1)
