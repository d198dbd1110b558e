"""`llmopt.testing`, registration, bisection and repros; every check with a subject that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import llmopt
from llmopt import testing
from llmopt.cli import app
from llmopt.codegen.cpu.templates import PLANNERS, REGISTERED_SOURCES
from llmopt.compiler.errors import InputError, OptionError, VerificationError
from llmopt.compiler.graph import Rewriter, aten, nodes_of
from llmopt.compiler.opspec import OPS, Cost, nbytes, numel
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassContext, PassReport
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.pipeline import BACKEND, backend_pipeline, step_pipeline
from llmopt.passes.raise_gated_act import RaiseGatedAct
from llmopt.testing.reproduction import minifying

ROOT = Path(__file__).resolve().parent.parent.parent

# A pass as a user would have it in a module of their own, wrong in one way: it takes tanh for sigmoid.
BROKEN_PASS = '''
from dataclasses import dataclass
import llmopt
from llmopt.compiler.graph import Rewriter, aten, nodes_of
from llmopt.compiler.pass_manager import PassReport

@dataclass(frozen=True)
class TanhToSigmoid(llmopt.Pass):
    """Before: `tanh(x)`. After: `sigmoid(x)`."""
    name = "tanh_to_sigmoid"
    produces = None
    def run(self, graph, context):
        report, rewriter = PassReport(self.name), Rewriter(graph)
        for node in nodes_of(graph, aten.tanh.default):
            if not context.burn():
                break
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(aten.sigmoid.default, node.args[0]))
            report.matched += 1
        return report

llmopt.register_pass(TanhToSigmoid(), after="raise_linear")
'''


@dataclass(frozen=True)
class Swap(llmopt.Pass):
    """Before: `tanh(x)`. After: `new(x)`."""

    new: Any = aten.sigmoid.default
    counts: bool = True
    name = "swap_for_test"
    produces = None

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for node in nodes_of(graph, aten.tanh.default):
            if not context.burn():
                break
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(self.new, node.args[0]))
            report.matched += self.counts
        return report


@pytest.fixture
def registered() -> Iterator[Swap]:
    item = Swap()
    llmopt.register_pass(item, after="raise_linear")
    yield item
    llmopt.unregister_pass(item.name)


class Net(nn.Module):
    """Rewrites of the real passes around one of the registered pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(nn.functional.silu(self.a(x)) * self.b(x)))


# ---- registration --------------------------------------------------------------------------------------------------


def test_a_registered_pass_has_its_place_in_both_pipelines(registered: Swap) -> None:
    for pipeline in (backend_pipeline(), step_pipeline(16)):
        names = [item.name for item in pipeline]
        assert names.index("swap_for_test") == names.index("raise_linear") + 1
    assert registered not in BACKEND


def test_before_after_and_order() -> None:
    first, second = Swap(), type("Other", (Swap,), {"name": "other_for_test"})()
    llmopt.register_pass(first, after="simplify_views")
    llmopt.register_pass(second, after="simplify_views")
    third = type("Third", (Swap,), {"name": "third_for_test"})()
    llmopt.register_pass(third, before="insert_kv_cache")
    try:
        names = [item.name for item in step_pipeline(16)]
        last = len(names) - names[::-1].index("simplify_views") - 1
        assert names[last + 1 : last + 3] == ["swap_for_test", "other_for_test"]
        assert names.index("third_for_test") == names.index("insert_kv_cache") - 1
        assert "third_for_test" not in [item.name for item in backend_pipeline()]
    finally:
        for item in (first, second, third):
            llmopt.unregister_pass(item.name)
    assert backend_pipeline() == BACKEND


def test_mistakes_of_registration(registered: Swap) -> None:
    with pytest.raises(InputError, match="exists already"):
        llmopt.register_pass(Swap(), after="normalize")
    with pytest.raises(OptionError, match=r"'after'.*'nothing'"):
        llmopt.register_pass(type("N", (Swap,), {"name": "n_for_test"})(), after="nothing")
    with pytest.raises(OptionError, match="exactly one"):
        llmopt.register_pass(type("N", (Swap,), {"name": "n_for_test"})())
    with pytest.raises(InputError, match=r"llmopt\.Pass"):
        llmopt.register_pass(Swap, after="normalize")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no registered pass"):
        llmopt.unregister_pass("normalize")
    with pytest.raises(InputError, match="declared already"):
        llmopt.register_op("rope(Tensor x) -> Tensor", fake=id, cost=id, samples=id)(id)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kernel of llmopt"):
        llmopt.register_kernel(aten.tanh.default, "linear", "", lambda node: "no")
    with pytest.raises(InputError, match="lower case"):
        llmopt.register_kernel(aten.tanh.default, "a; b", "", lambda node: "no")


def test_kernels_come_and_go_in_any_order() -> None:
    op, other = llmopt_ops.gated_act.default, llmopt_ops.linear.default
    built_in = dict(PLANNERS)
    first, second = (lambda node: "first"), (lambda node: "second")
    llmopt.register_kernel(op, "first_for_test", "a", first)
    llmopt.register_kernel(op, "second_for_test", "b", second)
    assert PLANNERS[op] is second
    with pytest.raises(InputError, match="choose another name"):
        llmopt.register_kernel(other, "first_for_test", "c", second)
    with pytest.raises(InputError, match="is named"):
        llmopt.unregister_kernel(other, "first_for_test")
    assert PLANNERS[other] is built_in[other]
    assert REGISTERED_SOURCES["first_for_test"] == "a"
    llmopt.unregister_kernel(op, "first_for_test")
    assert PLANNERS[op] is second
    llmopt.register_kernel(op, "first_for_test", "a", first)
    llmopt.unregister_kernel(op, "first_for_test")
    assert PLANNERS[op] is second
    llmopt.unregister_kernel(op, "second_for_test")
    assert built_in == PLANNERS
    assert not REGISTERED_SOURCES.keys() & {"first_for_test", "second_for_test"}


def test_a_registered_pass_obeys_the_switches(registered: Swap) -> None:
    model, x = Net().eval(), torch.randn(3, 8)
    matched = {}
    for name, options in (
        ("on", {}),
        ("off", {"disabled_passes": ("swap_for_test",)}),
        ("undone", {"verify": "revert"}),
    ):
        report = llmopt.explain(model, x, options=options)
        (found,) = [p for p in report.graphs[0].passes if p.name == "swap_for_test"]
        matched[name] = (found.matched, found.disabled, found.reverted is not None)
    assert matched == {"on": (1, False, False), "off": (0, True, False), "undone": (0, False, True)}


# ---- check_op, check_pass ------------------------------------------------------------------------------------------


def test_check_op_accepts_the_ops_of_llmopt() -> None:
    assert testing.check_op("gated_act", [torch.float32, torch.bfloat16], kernel="gated_act") > 20
    with pytest.raises(InputError, match="no op is named"):
        testing.check_op("gated_ac")


def test_check_op_finds_a_wrong_kernel() -> None:
    spec = OPS["gated_act"]
    wrong = type(spec)(**{**vars(spec), "reference": lambda gate, up, act: spec.reference(gate, up, act) * 1.01})
    with pytest.raises(VerificationError, match=r"llmopt::gated_act, sample 0 in torch.float32, 1 threads, result 0"):
        testing.check_op(wrong, [torch.float32])
    other = type(spec)(**{**vars(spec), "reference": lambda gate, up, act: spec.reference(gate, up, act).double()})
    with pytest.raises(VerificationError, match="the reference gives torch"):
        testing.check_op(other, [torch.float32])
    negative = type(spec)(**{**vars(spec), "cost": lambda gate, up, act: Cost(-numel(gate), nbytes(up), nbytes(gate))})
    with pytest.raises(VerificationError, match="flops = -"):
        testing.check_op(negative, [torch.float32])
    with pytest.raises(VerificationError, match="not by rope"):
        testing.check_op("gated_act", [torch.float32], kernel="rope")


def test_check_pass() -> None:
    gated = lambda x: nn.functional.silu(x) * (x + 1)  # noqa: E731
    result = testing.check_pass(RaiseGatedAct(), gated, torch.randn(3, 8))
    assert result.report.matched == 1 and "llmopt.gated_act" in result.targets() and "\n---\n" in result.text()
    several = lambda x: (nn.functional.silu(x) * x, nn.functional.silu(x))  # noqa: E731
    testing.check_must_not_fire(
        RaiseGatedAct(), "the activation is not a factor", lambda x: nn.functional.silu(x) + 1, torch.randn(3)
    )
    with pytest.raises(VerificationError, match="fired 1 times"):
        testing.check_must_not_fire(RaiseGatedAct(), None, gated, torch.randn(3, 8))
    with pytest.raises(VerificationError, match="should report 'x'"):
        testing.check_must_not_fire(RaiseGatedAct(), "x", several, torch.randn(3))


def test_check_pass_finds_broken_passes() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(VerificationError, match="changed output 0 by"):
        testing.check_pass(Swap(), torch.tanh, x)
    with pytest.raises(VerificationError, match="reports no match but changed"):
        testing.check_pass(Swap(aten.clone.default, counts=False), lambda x: torch.tanh(x * 0), x)
    endless = type("Endless", (Swap,), {"run": lambda self, graph, context: PassReport("e", 1)})()
    with pytest.raises(VerificationError, match="not idempotent"):
        testing.check_pass(endless, torch.tanh, x)


# ---- bisection -----------------------------------------------------------------------------------------------------


def test_bisect_names_the_rewrite(registered: Swap) -> None:
    model, x = Net().eval(), torch.randn(3, 8)
    tried = []

    def check(options: Options) -> bool:
        tried.append(options.fuel)
        compiled = torch.compile(model, backend="llmopt", options=vars(options))
        with torch.no_grad():
            return torch.allclose(compiled(x), model(x), atol=1e-5)

    found = testing.bisect(check)
    assert found is not None
    assert (found.name, found.number) == ("swap_for_test", 1)
    assert "-tanh" in found.diff and "+sigmoid" in found.diff and "aten.sigmoid.default" in found.diff
    assert found.runs == len(tried) <= 8
    assert f"LLMOPT_FUEL={found.fuel} is the first to fail: rewrite 1 of swap_for_test" in str(found)


def test_bisect_knows_when_nothing_is_wrong_and_when_no_rewrite_is() -> None:
    assert testing.bisect(lambda options: None) is None
    found = testing.bisect(lambda options: False)
    assert found is not None and found.fuel == 0 and "without any rewrite" in str(found)
    with pytest.raises(InputError, match="not repeatable"):
        answers = iter([False, True, *[True] * 40])
        testing.bisect(lambda options: next(answers))


SCRIPT = """
import sys, torch
from torch import nn
import broken_pass
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
x = torch.randn(4, 6)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="llmopt")(x), model(x))
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "broken_pass.py").write_text(BROKEN_PASS)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from llmopt.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=folder
    )


def test_bisect_command_takes_any_program(workplace: Path) -> None:
    """A check without PyTorch: it fails from seven rewrites on, and writes the log as a compilation would."""
    check = workplace / "check.py"
    check.write_text(
        "import json, os, sys\n"
        "fuel = int(os.environ['LLMOPT_FUEL']); made = 12 if fuel < 0 else min(fuel, 12)\n"
        "last = {'name': 'p', 'number': 3, 'diff': '-a'} if made == fuel else None\n"
        "line = json.dumps({'rewrites': [['p', made]], 'last': last})\n"
        "open(os.environ['LLMOPT_REWRITE_LOG'], 'a').write(line + '\\n')\n"
        "sys.exit(made >= 7)\n"
    )
    run = lambda *command: CliRunner().invoke(app, ["bisect", *command])  # noqa: E731
    answer = run(sys.executable, str(check))
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout.startswith("LLMOPT_FUEL=7 is the first to fail: rewrite 3 of p")
    assert run(sys.executable, "-c", "pass").exit_code == 1
    missing = run("no-such-program")
    assert missing.exit_code == 2 and "no-such-program" in missing.stderr
    refused = run(str(check))
    assert refused.exit_code == 2 and "check.py cannot be run: Permission denied" in refused.stderr


def test_bisect_command_tells_a_check_that_compiles_nothing(workplace: Path) -> None:
    answer = CliRunner().invoke(app, ["bisect", sys.executable, str(workplace / "chek.py")])
    assert answer.exit_code == 2 and answer.stdout == ""
    assert "compiles nothing with llmopt" in answer.stderr and "can't open file" in answer.stderr


def test_bisect_command_takes_a_check_that_dies_in_a_rewrite(workplace: Path) -> None:
    """Before its log is written: without any rewrite it passes, and nothing is to be blamed but the first."""
    check = workplace / "check.py"
    check.write_text("import os, sys; sys.exit(os.environ['LLMOPT_FUEL'] != '0')")
    answer = CliRunner().invoke(app, ["bisect", sys.executable, str(check)])
    assert answer.exit_code == 0 and answer.stdout.startswith("LLMOPT_FUEL=1 is the first to fail"), answer.stderr


@pytest.mark.slow
def test_bisect_command_on_a_model(workplace: Path) -> None:
    answer = command("bisect", sys.executable, "script.py", folder=workplace)
    assert answer.returncode == 0, answer.stderr
    assert "rewrite 1 of tanh_to_sigmoid" in answer.stdout


# ---- repros --------------------------------------------------------------------------------------------------------


def test_write_repro_keeps_the_one_operation_that_is_wrong(
    registered: Swap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without running the file, which takes a process of its own; the slow test below does."""
    monkeypatch.setattr("llmopt.testing.reproduction._fails", lambda path: True)
    path = tmp_path / "found.py"
    options = {"threads": 1, "disabled_passes": ("raise_rope",), "rewrite_log": str(tmp_path / "log")}
    found = testing.write_repro(Net().eval(), torch.randn(3, 8), path=path, options=options)
    assert found is not None and (found.kind, found.nodes, found.path) == ("accuracy", 1, path)
    assert found.nodes_before >= 6
    text = path.read_text()
    assert "tanh" in text and "linear" not in text and "backend='llmopt_with_options'" in text
    assert "'threads': 1" in text and "'disabled_passes': ('raise_rope',)" in text and "'rewrite_log'" not in text
    compile(text, "found.py", "exec")


def test_a_repro_runs_with_the_options_of_what_failed(tmp_path: Path) -> None:
    """In a process of its own: an op without a kernel is a failure only where the option says so."""
    path = tmp_path / "found.py"
    call = lambda x: torch.linalg.inv(x.relu() + torch.eye(3))  # noqa: E731
    assert testing.write_repro(call, torch.rand(3, 3), path=path) is None
    found = testing.write_repro(call, torch.rand(3, 3), path=path, options={"fallback": "error", "graph_cache": False})
    assert found is not None and found.kind == "crash" and found.reproduces


def test_options_of_step_programs_are_no_part_of_a_repro(tmp_path: Path) -> None:
    """`optimize` compiles with them."""
    with minifying(tmp_path / "repro.py") as search, torch.no_grad():
        llmopt.optimize(Net().eval(), dtype="float32", batch_invariant=True)(torch.randn(3, 8))
    assert search.checked == 1 and search.found is None


def test_repro_command_overwrites_nothing_and_says_what_it_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import sys\nif len(sys.argv) > 1: raise LookupError('no such weight')")
    (tmp_path / "fine.py").write_text(
        "import torch, sys\ntorch.compile(torch.relu, backend='llmopt')(torch.ones(3))\n"
        "if len(sys.argv) > 1: raise LookupError('no such weight')"
    )
    run = lambda *command: CliRunner().invoke(app, ["repro", *command])  # noqa: E731
    cases: list[tuple[list[str], list[str]]] = [
        (["--out", "script.py", "script.py"], ["script.py is SCRIPT"]),
        (["--out", "no/such/repro.py", "script.py"], ["--out no/such/repro.py", "does not exist"]),
        (["script.py"], ["0 graphs of script.py were checked"]),
        (["script.py", "x"], ["LookupError: no such weight", "0 graphs"]),
        (["fine.py", "x"], ["LookupError: no such weight", "1 graphs of fine.py were checked, and none failed"]),
    ]
    for command, words in cases:
        answer = run(*command)
        assert answer.exit_code == 2 and all(word in answer.stderr for word in words), answer.stderr
    torch._dynamo.reset()
    answer = run("fine.py")
    assert answer.exit_code == 1 and "no graph fails: 1 were checked" in answer.stdout
    (tmp_path / "repro.py").write_text("mine")
    for command in (["fine.py"], ["repro.py"]):
        answer = run(*command)
        assert answer.exit_code == 2 and "name another file by --out" in answer.stderr
    assert (tmp_path / "repro.py").read_text() == "mine"


@pytest.mark.slow
def test_repro_command_minifies_a_wrong_result(workplace: Path) -> None:
    answer = command("repro", "--import", "broken_pass", "script.py", folder=workplace)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.startswith("repro.py: accuracy, 1 of ")
    text = (workplace / "repro.py").read_text()
    assert "tanh" in text and "linear" not in text and "import broken_pass" in text
    compile(text, "repro.py", "exec")
    alone = subprocess.run([sys.executable, "repro.py"], capture_output=True, text=True, check=False, cwd=workplace)
    assert alone.returncode != 0 and "accuracy" in alone.stderr.lower()
    (workplace / "broken_pass.py").write_text("")
    fixed = subprocess.run([sys.executable, "repro.py"], capture_output=True, text=True, check=False, cwd=workplace)
    assert fixed.returncode == 0, fixed.stderr


@pytest.mark.slow
def test_repro_of_a_crash_and_of_nothing(tmp_path: Path, registered: Swap) -> None:
    assert testing.write_repro(torch.relu, torch.randn(3), path=tmp_path / "none.py") is None
    assert not (tmp_path / "none.py").exists()

    class Raises(Swap):
        """Fails on every tanh."""

        name = "raises_for_test"

        def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
            for node in nodes_of(graph, aten.sinh.default):
                raise ZeroDivisionError(node.name)
            return PassReport(self.name)

    llmopt.register_pass(Raises(), after="raise_linear")
    try:
        found = testing.write_repro(lambda x: torch.sinh(x.relu()) + 1, torch.randn(3), path=tmp_path / "crash.py")
    finally:
        llmopt.unregister_pass("raises_for_test")
    assert found is not None and (found.kind, found.nodes) == ("crash", 1)
    assert not found.reproduces, "the pass is registered in this process alone"


# ---- the worked example --------------------------------------------------------------------------------------------


def test_the_example_of_docs_extending_runs() -> None:
    """In a process of its own, because it registers an op, which cannot be taken back."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_op.py")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert answer.returncode == 0, answer.stderr
    assert "comparisons with the reference" in answer.stdout
    assert "raise_squared_relu    1" in answer.stdout and "squared_relu  float  1 x" in answer.stdout


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for name in ("explain", "bisect", "repro"):
        assert name in text
        page = CliRunner().invoke(app, [name, "--help"]).stdout
        assert "Examples:" in page and "Usage:" in page
