"""The pass manager: order, switches, fuel, levels and reports."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from graphs.capturing import catch, randomise
from torch import Tensor, fx, nn

from llmopt.compiler.errors import OptionError, UnsupportedError, VerificationError
from llmopt.compiler.graph import Rewriter, aten, graph_text, nodes_of
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import ALL_PASS_NAMES, Pass, PassContext, PassReport, run_pipeline
from llmopt.compiler.report import GraphReport
from llmopt.compiler.report_text import graph_text as report_text
from llmopt.compiler.verify import Level
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.pipeline import BACKEND, step_pipeline


@dataclass(frozen=True)
class CosToSin(Pass):
    """Before: `cos(x)`. After: `sin(x)`."""

    name = "cos_to_sin_for_test"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.cos.default):
            if not context.burn():
                report.skipped["no fuel"] += 1
                continue
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(aten.sin.default, node.args[0]))
            report.matched += 1
        return report


@dataclass(frozen=True)
class RequiredCosToSin(CosToSin):
    """The same, but it cannot be switched off."""

    name = "required_for_test"
    required = True


@dataclass(frozen=True)
class LosesValues(Pass):
    """Breaks the graph: a node without a value."""

    name = "loses_values_for_test"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        for node in nodes_of(graph, aten.cos.default):
            del node.meta["val"]
        return PassReport(self.name)


@dataclass(frozen=True)
class RaisesTooEarly(Pass):
    """Inserts an op of the vocabulary but says that it keeps the level."""

    name = "raises_too_early_for_test"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.cos.default):
            with rewriter.before(node):
                new = rewriter.call(llmopt_ops.rms_norm.default, node.args[0], None, 1e-5, 0.0, True)
            rewriter.replace(node, new)
        return PassReport(self.name)


def cosines(x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.cos(x)
    return x


def graph_of_cosines() -> fx.Graph:
    return catch(cosines, torch.randn(2, 3)).graph


def count(graph: fx.Graph) -> tuple[int, int]:
    return len(list(nodes_of(graph, aten.cos.default))), len(list(nodes_of(graph, aten.sin.default)))


def test_reports_are_in_order_and_timed() -> None:
    graph = graph_of_cosines()
    reports = run_pipeline(graph, (CosToSin(), RequiredCosToSin()), Options())
    assert [(r.name, r.matched, r.disabled) for r in reports] == [
        ("cos_to_sin_for_test", 5, False),
        ("required_for_test", 0, False),
    ]
    assert all(report.seconds > 0 and report.max_error is None for report in reports)
    assert count(graph) == (0, 5)


def test_disabling() -> None:
    graph = graph_of_cosines()
    before = graph_text(graph)
    (report,) = run_pipeline(graph, (CosToSin(),), Options(disabled_passes=("cos_to_sin_for_test",)))
    assert report.disabled and report.matched == 0
    assert graph_text(graph) == before


def test_a_required_pass_runs_although_it_is_disabled() -> None:
    graph = graph_of_cosines()
    (report,) = run_pipeline(graph, (RequiredCosToSin(),), Options(disabled_passes=("required_for_test",)))
    assert not report.disabled and report.matched == 5


def test_an_unknown_pass_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        run_pipeline(graph_of_cosines(), BACKEND, Options(disabled_passes=("raise_ropes",)))
    assert (caught.value.option, caught.value.value) == ("disabled_passes", "raise_ropes")
    assert "'raise_rope'" in caught.value.allowed


def test_every_pass_of_every_pipeline_can_be_named_everywhere() -> None:
    """Disabling a pass of the step pipeline must not fail in the backend's, which lacks it."""
    assert {item.name for item in (*BACKEND, *step_pipeline(16))} <= ALL_PASS_NAMES
    run_pipeline(graph_of_cosines(), BACKEND, Options(disabled_passes=("insert_kv_cache",)))


@pytest.mark.parametrize("fuel", [0, 1, 3, 5, 9])
def test_fuel_is_exactly_the_number_of_rewrites(fuel: int) -> None:
    graph = graph_of_cosines()
    reports = run_pipeline(graph, (CosToSin(), RequiredCosToSin()), Options(fuel=fuel))
    used = min(fuel, 5)
    assert count(graph) == (5 - used, used)
    assert sum(report.matched for report in reports) == used
    assert reports[0].skipped["no fuel"] == 5 - used


class Projections(nn.Module):
    """Five rewrites of the real pipeline: three linears, one merge, one gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_fuel_bisects_the_real_pipeline() -> None:
    counted = ("eliminate_common", "raise_linear", "raise_gated_act", "merge_linears")
    matched = []
    for fuel in range(7):
        caught = catch(randomise(Projections()), torch.randn(3, 8))
        expected = caught.run()
        reports = run_pipeline(caught.graph, BACKEND, Options(fuel=fuel))
        matched.append(sum(report.matched for report in reports if report.name in counted))
        torch.testing.assert_close(caught.run(), expected)
    assert matched == [0, 1, 2, 3, 4, 5, 5]


def test_a_broken_graph_is_blamed_on_the_pass_that_broke_it() -> None:
    with pytest.raises(VerificationError, match="after loses_values_for_test"):
        run_pipeline(graph_of_cosines(), (CosToSin(), LosesValues(), CosToSin()), Options(fuel=1))


def test_a_pass_must_declare_the_level_it_produces() -> None:
    with pytest.raises(VerificationError, match="after raises_too_early_for_test"):
        run_pipeline(graph_of_cosines(), (CosToSin(), RaisesTooEarly()), Options(fuel=1))
    assert {item.produces for item in BACKEND} == {None, Level.RAISED}


def test_explain_shows_matches_near_misses_and_switched_off_passes() -> None:
    options = Options(disabled_passes=("raise_rope",))
    reports = run_pipeline(catch(randomise(Projections()), torch.randn(3, 8)).graph, BACKEND, options)
    text = report_text(0, GraphReport("backend", ["x"], reports))
    rows = [row.split() for row in text.splitlines()]
    assert ["raise_linear", "3"] in rows and ["raise_rope", "disabled"] in rows
    assert "raise_norms 0" in " ".join(next(row for row in rows if row[:1] == ["raise_norms"]))


def test_every_pass_shows_before_and_after() -> None:
    for item in (*BACKEND, *step_pipeline(16)):
        text = type(item).__doc__ or ""
        assert "Before:" in text and "After:" in text, item.name


# ---- revert mode ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongFrom(Pass):
    """Replaces `cos(x)` by `cos(x) * 1`, and from rewrite number `harmful` on by `sin(x)`."""

    harmful: int = 0
    name = "wrong_from_for_test"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for number, node in enumerate(nodes_of(graph, aten.cos.default)):
            if not context.burn():
                break
            with rewriter.after(node):
                if number < self.harmful:
                    new = rewriter.call(aten.mul.Tensor, node, 1)
                    node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                else:
                    rewriter.replace(node, rewriter.call(aten.sin.default, node.args[0]))
            report.matched += 1
        return report


@pytest.mark.parametrize("harmful", [0, 1, 3, 5])
def test_revert_keeps_the_rewrites_before_the_first_harmful_one(harmful: int) -> None:
    caught = catch(cosines, torch.randn(2, 3))
    expected = caught.run()
    passes = (WrongFrom(harmful), CosToSin())  # the second is wrong, too, and has nothing to keep
    wrong, sines = run_pipeline(caught.graph, passes, Options(verify="revert"))
    torch.testing.assert_close(caught.run(), expected)
    assert wrong.matched == harmful and sines.matched == 0
    assert sines.reverted is not None and "rewrite 1: cos_to_sin_for_test changed output 0" in sines.reverted
    if harmful == 5:
        assert wrong.reverted is None
    else:
        assert wrong.reverted is not None and wrong.reverted.startswith(f"rewrite {harmful + 1}: ")
    assert wrong.max_error == 0.0 and wrong.budget == 1.0
    assert [len(list(nodes_of(caught.graph, target))) for target in (aten.mul.Tensor, aten.sin.default)] == [harmful, 0]


def test_without_revert_mode_the_harmful_pass_is_named() -> None:
    with pytest.raises(VerificationError, match="wrong_from_for_test changed output 0"):
        run_pipeline(graph_of_cosines(), (WrongFrom(2),), Options(verify=True))


def test_a_pass_that_breaks_the_graph_is_undone_as_a_whole() -> None:
    graph = graph_of_cosines()
    before = graph_text(graph)
    (report,) = run_pipeline(graph, (LosesValues(),), Options(verify="revert"))
    assert report.reverted is not None and "loses_values_for_test" in report.reverted
    assert graph_text(graph) == before
    text = report_text(0, GraphReport("backend", ["x"], [report]))
    assert "undone: after loses_values_for_test" in text


@dataclass(frozen=True)
class Widens(Pass):
    """Before: `cos(x)`. After: `sin(x)` once, then `sin(x)` of another type, or an op with operands that do not fit."""

    operands: bool = False
    name = "widens_for_test"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        rewriter = Rewriter(graph)
        for number, node in enumerate(nodes_of(graph, aten.cos.default)):
            context.burn()
            with rewriter.before(node):
                new = rewriter.call(aten.sin.default, node.args[0])
                if number and self.operands:
                    row = rewriter.call(aten.select.int, new, 0, 0)
                    weight = rewriter.call(aten.slice.Tensor, row, 0, 0, 1)
                    rewriter.call(llmopt_ops.rms_norm.default, new, weight, 1e-6, 0.0, True)
                elif number:
                    new = rewriter.call(aten._to_copy.default, new, dtype=torch.float64)
            rewriter.replace(node, new)
        return PassReport(self.name)


@pytest.mark.parametrize("operands", [False, True])
def test_a_pass_stops_at_a_rewrite_of_another_type(operands: bool) -> None:
    why = r"rms_norm: weight is \[1\], not \[3\]" if operands else r"from f32\[2, 3\] on cpu to f64\[2, 3\] on cpu"
    caught = catch(cosines, torch.randn(2, 3))
    (report,) = run_pipeline(caught.graph, (Widens(operands),), Options())
    assert report.matched == 1 and report.reverted is not None
    assert re.search(f"^stopped at rewrite 2: .*{why}", report.reverted)
    assert "undone: stopped" in report_text(0, GraphReport("backend", ["x"], [report]))
    counts = {target: len(list(nodes_of(caught.graph, target))) for target in (aten.cos.default, aten.sin.default)}
    assert counts == {aten.cos.default: 4, aten.sin.default: 1}, "what was rewritten stays, the rest as it was"
    with pytest.raises(VerificationError, match=f"widens_for_test: .*{why}"):
        run_pipeline(graph_of_cosines(), (Widens(operands),), Options(verify=True))
    required = type("Required", (Widens,), {"required": True})(operands)
    with pytest.raises(UnsupportedError, match=f"widens_for_test: .*{why}"):
        run_pipeline(graph_of_cosines(), (required,), Options())


def test_revert_mode_shares_the_fuel() -> None:
    graph = graph_of_cosines()
    reports = run_pipeline(graph, (WrongFrom(2), WrongFrom(9)), Options(verify="revert", fuel=4))
    assert [report.matched for report in reports] == [2, 2]


def test_a_required_pass_is_not_undone() -> None:
    with pytest.raises(VerificationError, match="required_for_test"):
        run_pipeline(graph_of_cosines(), (RequiredCosToSin(),), Options(verify="revert"))


def test_real_passes_have_measured_errors_and_stay() -> None:
    caught = catch(randomise(Projections()), torch.randn(3, 8))
    reports = run_pipeline(caught.graph, BACKEND, Options(verify="revert"))
    assert sum(report.matched for report in reports) >= 5
    assert all(report.reverted is None and report.max_error is not None for report in reports)


def test_graphs_are_recorded_only_on_demand() -> None:
    for record in (False, True):
        graph = graph_of_cosines()
        reports = run_pipeline(graph, (CosToSin(), RequiredCosToSin()), Options(record_graphs=record, fuel=2))
        if not record:
            assert all(report.graph is None for report in reports)
            continue
        texts = [report.graph or "" for report in reports]
        assert texts[0] == graph_text(graph, renumber=False) == texts[1]
        assert texts[0].count("aten.sin.default") == 2 and "cos_4: f32[2, 3] = aten.cos.default(cos_3)" in texts[0]
