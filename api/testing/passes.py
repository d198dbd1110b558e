"""Checks a pass on captured functions: equal results, idempotence, and where it must not fire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.compiler.errors import VerificationError
from llmopt.compiler.graph import graph_text
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport, copy_graph, run_pipeline
from llmopt.compiler.verify import Level, check_graph, compare_graphs, sample_inputs
from llmopt.passes.pipeline import backend_pipeline
from llmopt.testing.graphs import capture_call


@dataclass
class Rewritten:
    """A graph before and after one pass, and what the pass reported."""

    before: fx.Graph
    after: fx.Graph
    report: PassReport

    def targets(self) -> list[str]:
        """The ops of the graph after the pass."""
        return [str(n.target).removesuffix(".default") for n in self.after.nodes if n.op == "call_function"]

    def text(self) -> str:
        """Both graphs, printed, for a golden test."""
        return f"{graph_text(self.before)}\n---\n{graph_text(self.after)}"


def check_pass(
    item: Pass,
    function: Callable[..., Any],
    *args: Any,
    after: str | None = None,
    dynamic: bool | None = None,
    seeds: Sequence[int] = (1, 2),
) -> Rewritten:
    """Runs a pass on `function(*args)` and checks what every pass owes.

    That is: the graph stays valid at its level; results on fresh random inputs stay within the pass's budget; a pass
    that reports no match changes nothing; and a second run finds nothing more.

    Args:
        after: run the backend's passes up to the last of this name first; None for the pass's own registered place, or
            no passes where it has none.
        dynamic: as for torch.compile.

    Raises VerificationError for the first of these that does not hold.
    """
    call = capture_call(function, *args, dynamic=dynamic)
    run_pipeline(call.graph, _passes_before(item, after), Options())
    before = copy_graph(call.graph)
    report = item.run(call.graph, PassContext(Options()))
    call.graph.lint()
    check_graph(call.graph, Level.CAPTURED if item.produces is None else item.produces, item.name)
    for seed in seeds:
        compare_graphs(before, call.graph, sample_inputs(before, seed), item.name, item.budget)
    result = Rewritten(before, copy_graph(call.graph), report)
    if report.matched == 0 and graph_text(call.graph) != graph_text(before):
        raise VerificationError(f"{item.name} reports no match but changed the graph")
    again = item.run(call.graph, PassContext(Options()))
    if again.matched or graph_text(call.graph) != graph_text(result.after):
        raise VerificationError(f"{item.name} is not idempotent: a second run made {again.matched} rewrites")
    return result


def check_must_not_fire(
    item: Pass, reason: str | None, function: Callable[..., Any], *args: Any, **how: Any
) -> Rewritten:
    """`check_pass`, and: the pass matches nothing and reports `reason` as a near miss (None: nothing at all).

    Raises VerificationError when it fires, or has another reason.
    """
    result = check_pass(item, function, *args, **how)
    if result.report.matched:
        raise VerificationError(f"{item.name} fired {result.report.matched} times")
    skipped = dict(result.report.skipped)
    if (reason is None and skipped) or (reason is not None and not skipped.get(reason)):
        raise VerificationError(f"{item.name} should report {reason!r}, it reports {skipped}")
    return result


def _passes_before(item: Pass, after: str | None) -> tuple[Pass, ...]:
    passes = backend_pipeline()
    names = [p.name for p in passes]
    if after is not None:
        if after not in names:
            raise VerificationError(f"no pass is named {after!r}; there are {names}")
        return passes[: len(names) - names[::-1].index(after)]
    return passes[: names.index(item.name)] if item.name in names else ()
