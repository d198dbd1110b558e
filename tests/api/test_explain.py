"""`llmopt.explain`: breaks, guards, measured times, JSON, the page; and the command."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from graphs.causal_models import TinyCausal, traced
from models.target import FOLDER, write_shallow
from models.zoo import build
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import llmopt
from llmopt import LLM
from llmopt.cli import app
from llmopt.compilation import compile_step
from llmopt.compiler.errors import InputError, OptionError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.explaining.page import page, write_page
from llmopt.explaining.tables import print_report


class Broken(nn.Module):
    """A graph break in the middle, a guard on a size, and an op that has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.shape[0] > 3:
            y = y + 1
        torch._dynamo.graph_break()
        return nn.functional.conv1d(y[None], torch.ones(4, y.shape[0], 3))


@pytest.fixture(scope="module")
def broken() -> Report:
    torch._dynamo.reset()
    return llmopt.explain(Broken(), torch.randn(5, 8), measure=True)


def test_graph_breaks_have_reason_and_line(broken: Report) -> None:
    assert len(broken.graphs) == 2
    (found,) = broken.all_breaks()
    assert "graph_break" in found.reason
    assert re.search(r"test_explain\.py:\d+ in forward, code: torch\._dynamo\.graph_break\(\)", found.location)
    assert broken.graphs[0].ends_at == found and broken.graphs[1].ends_at is None
    assert "graph breaks\n  " in str(broken)


def test_frames_guards_and_shapes(broken: Report) -> None:
    first, second = broken.graphs
    assert first.frame.startswith("forward, ") and "compile id" in first.frame
    assert "torch_dynamo_resume" in second.frame
    assert any("> 3" in guard and "test_explain.py" in guard for guard in first.guards), first.guards
    assert any(guard.startswith("L['x']: same dtype") for guard in first.guards)
    assert first.details is not None and list(first.details.hints.values()) == [5]


def test_measured_at_the_sizes_of_the_call(broken: Report) -> None:
    for graph in broken.graphs:
        assert graph.timing is not None and graph.details is not None
        assert len(graph.timing.seconds) == len(graph.details.calls)
        assert all(seconds > 0 for seconds in graph.timing.seconds)
        assert graph.timing.limits.read_gb_s > 0 and graph.timing.limits.gflop_s["float32"] > 0
    assert list(broken.graphs[0].timing.sizes.values()) == [5]  # type: ignore[union-attr]


def test_fallbacks_are_in_every_form(broken: Report) -> None:
    graph = broken.graphs[1]
    assert any("conv" in f.op and f.reason for f in graph.fallbacks)
    data = broken.to_json()
    json.dumps(data)
    assert any(call["kernel"] is None and call["measured"] > 0 for call in data["graphs"][1]["calls"])
    assert data["graph_breaks"][0]["location"] in str(broken)
    console = Console(width=160, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    print_report(broken, console)
    text = console.export_text()
    for word in (
        "graph 0",
        "raise_linear",
        "linear<float>",
        "fallbacks to ATen",
        "graph breaks",
        "roofline of",
        "guards",
    ):
        assert word in text, word


def test_the_model_stays_as_it_was() -> None:
    model = Broken()
    llmopt.explain(model, torch.randn(5, 8))
    assert "forward" not in vars(model)


def test_what_explain_takes() -> None:
    with pytest.raises(InputError, match="inputs are for"):
        llmopt.explain(None, torch.randn(2))
    with pytest.raises(InputError, match="got int"):
        llmopt.explain(3)
    with pytest.raises(InputError, match="this Linear is not compiled: give inputs"):
        llmopt.explain(nn.Linear(2, 2))
    with pytest.raises(InputError, match="does not exist"):
        llmopt.explain(nn.Linear(2, 2), torch.ones(1, 2), html="no/such/folder.html")
    model = nn.Linear(2, 2)
    assert llmopt.explain(torch.compile(model, backend="llmopt")) is llmopt.explain()
    model.compile(backend="llmopt")
    assert llmopt.explain(model) is llmopt.explain()


@pytest.fixture(scope="module")
def deep() -> Report:
    """The step program of a model with 16 layers."""
    return Report([compile_step(traced(TinyCausal(layers=16)), Options(record_graphs=True)).report])


def data_of(text: str) -> dict[str, object]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match.group(1))


def test_page_is_one_small_file_with_every_state(deep: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(deep, path, "deep <b>")
    text = path.read_text("utf-8")
    assert len(text) < 5e6
    assert "deep &lt;b&gt; - llmopt" in text and not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", text)
    graph = data_of(text)["graphs"][0]  # type: ignore[index]
    lines = graph["lines"]
    before = graph["captured"]
    assert "\n".join(lines[n] for n in before) == deep.graphs[0].captured
    for row, item in zip(graph["passes"], deep.graphs[0].passes, strict=True):
        after = row.get("graph", before)
        assert "\n".join(lines[n] for n in after) == item.graph, item.name
        # applying the hunks to the state before gives the state after
        patched, end = list[int](), 0
        for a, b, c, d in row.get("hunks", []):
            patched += before[end:a] + after[c:d]
            end = b
        assert patched + before[end:] == after
        before = after
    assert sum("hunks" in row for row in graph["passes"]) >= 5


def test_diffs_are_as_small_as_the_rewrites(deep: Report) -> None:
    """Names are stable, so that a pass which rewrites one layer's op does not colour all lines behind it."""
    graph = data_of(page(deep, "x"))["graphs"][0]  # type: ignore[index]
    merged = next(row for row in graph["passes"] if row["name"] == "fuse_residual_norm")
    changed = sum(d - c for _, _, c, d in merged["hunks"])
    assert merged["matched"] > 8
    assert changed < len(merged["graph"]) / 2


def test_script_in_names_cannot_end_the_data(deep: Report) -> None:
    deep.note("</script><script>alert(1)</script>")
    text = page(deep, "x")
    assert "</script><script>alert" not in text
    assert data_of(text)["notes"] == ["</script><script>alert(1)</script>"]
    deep.notes.clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_page_opens_in_a_browser(deep: Report, tmp_path: Path) -> None:
    write_page(deep, tmp_path / "report.html", "deep")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    url = f"file://{tmp_path / 'report.html'}#open=raise_linear"
    answer = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=False)
    body = answer.stdout.split("<main>")[1].split("</main>")[0]
    for item in deep.graphs[0].passes:
        assert f'<span class="name">{item.name}</span>' in body
    assert "equal lines" in body and 'class="l add"' in body and "Memory" in body


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_command_measures_and_writes_the_page(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", write_shallow(tmp_path / "target")
    out = run(
        "explain", folder, "--dtype", "float32", "--measure", "--at", "tokens=4,context=64", "--html", path, "--json"
    )
    graph = json.loads(out)["graphs"][0]
    assert graph["sizes"]["tokens"] == 4 and graph["sizes"]["context"] == 64
    assert graph["limits"]["read_gb_s"] > 0 and all(call["measured"] is not None for call in graph["calls"])
    products = [call for call in graph["calls"] if call["origin"] == "llmopt.linear"]
    assert all("tokens" in call["cost"]["flops"] or "rows" in call["cost"]["flops"] for call in products)
    assert data_of(path.read_text("utf-8"))["title"] == "target"


def test_a_program_file_reports_the_costs_of_its_model(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    llm = LLM(build("gemma2"), block_size=4)
    llm.export(path)
    sizes = {"tokens": 6, "requests": 3, "context": 40, "pages": 12}
    report, filed = llmopt.explain(llm, sizes=sizes), llmopt.explain(path, sizes=sizes)
    (graph,), (kept,) = report.to_json()["graphs"], filed.to_json()["graphs"]
    assert kept["sizes"] == graph["sizes"] and kept["symbols"] == graph["symbols"]
    work = [[call[key] for key in ("origin", "flops", "bytes_read", "bytes_written")] for call in graph["calls"]]
    assert work == [[call[key] for key in ("origin", "flops", "bytes_read", "bytes_written")] for call in kept["calls"]]
    assert sum(call["flops"] for call in kept["calls"]) > 0
    measured = llmopt.explain(path, sizes={"tokens": 2, "context": 9}, measure=True)
    assert all(call["predicted"] is not None for call in measured.to_json()["graphs"][0]["calls"])
    assert "roofline" in str(measured)


def test_a_program_file_without_costs_says_nothing_of_them(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    LLM(build("gpt2"), block_size=4).export(path)
    with safe_open(str(path), framework="pt") as opened:
        data = json.loads(opened.metadata()["llmopt"])
    del data["costs"]
    text = json.dumps(data)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(load_file(path), path, {"llmopt": text, "llmopt.sha256": digest})
    (graph,) = llmopt.explain(path).to_json()["graphs"]
    assert {call["flops"] for call in graph["calls"]} == {0.0}


def test_command_refuses_bad_sizes() -> None:
    assert "'at'" in run("explain", FOLDER, "--at", "tokens", status=2)
    assert "'at'" in run("explain", FOLDER, "--at", "tokens=x", status=2)


def test_sizes_of_a_step_are_checked() -> None:
    from llmopt.explaining.measure import measure_step

    step = compile_step(traced(TinyCausal()), Options())
    for given, word in (({"pages": 3}, "pages"), ({"tokens": 3, "requests": 2}, "multiple"), ({"heads": 1}, "heads")):
        with pytest.raises(OptionError, match=word):
            measure_step(step.report, step.program, 23, given)
