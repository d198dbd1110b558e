"""The instruments: what they report is what was run."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import backends
import compile_cpu
import compile_models
import engine_overhead
import harness
import model_coverage
import pytest
import torch
from coverage_table import summary, table
from harness import Contestant, Result, conditions, run_rounds, save
from model_coverage import SHAPES, FlopCount, measure
from models.zoo import build, greedy, prompts
from peers import StepDecoder, eager_decoder, inductor_decoder
from probe import Probe
from torch._dynamo.utils import counters
from torch._inductor import freezing


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(1, megabytes=8)


def test_rounds_take_turns(probe: Probe) -> None:
    calls: list[str] = []

    def phase(name: str) -> int:
        calls.append(name)
        return 10

    contestants = [
        Contestant("a", {"x": lambda: phase("ax"), "y": lambda: phase("ay")}),
        Contestant("b", {"x": lambda: phase("bx")}),
    ]
    result = run_rounds(contestants, 3, {}, probe)
    one, other = ["ax", "ay", "bx"], ["bx", "ax", "ay"]
    assert calls == [*one, *other, *one, *other]  # one warm-up round, and then each begins in its turn
    assert [len(result.rates["a"]["x"]), len(result.rates["a"]["y"]), len(result.rates["b"]["x"])] == [3, 3, 3]
    assert len(result.read_gb_s) == 3
    assert min(result.read_gb_s) > 0
    assert set(result.warmup_s) == {"a", "b"}


def test_a_failing_peer_is_reported_and_hides_nothing(probe: Probe) -> None:
    def broken() -> int:
        raise RuntimeError("no such instruction")

    result = run_rounds([Contestant("bad", {"x": broken}), Contestant("good", {"x": lambda: 1})], 2, {}, probe)
    assert result.failures == {"bad": "RuntimeError: no such instruction"}
    assert result.median("bad", "x") is None
    assert result.median("good", "x") is not None
    assert result.ratio("good", ["bad"], "x") is None


def test_ratio_is_to_the_best_peer() -> None:
    rates = {"eager": {"x": [1.0, 2.0, 9.0]}, "inductor": {"x": [4.0, 4.0, 4.0]}, "ours": {"x": [7.0, 8.0, 9.0]}}
    result = Result(rates, {}, [10.0], {}, {})
    assert result.ratio("ours", ["eager", "inductor"], "x") == 2.0
    assert result.ratio("inductor", ["eager", "inductor"], "x") == 2.0


def test_saved_results_say_what_ran(probe: Probe, tmp_path: Path) -> None:
    result = run_rounds([Contestant("a", {"x": lambda: 1})], 2, conditions(dtype="float32"), probe)
    save(result, tmp_path / "new" / "r.json")
    read = json.loads((tmp_path / "new" / "r.json").read_text("utf-8"))
    assert read["conditions"]["torch"] == torch.__version__
    assert read["conditions"]["dtype"] == "float32"
    assert len(read["rates"]["a"]["x"]) == 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("changed", "is_dirty"), [("harness.py", True), ("results/a.json", False), ("of_its_own.py", False)]
)
def test_a_result_says_whether_its_code_is_in_the_commit(
    tmp_path: Path, changed: str, is_dirty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result of the run before is no change of code."""
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("harness.py", "results/a.json"):
        (tmp_path / "benchmarks" / name).write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = harness.revision()
    assert clean and not clean.endswith("-dirty")
    (tmp_path / "benchmarks" / changed).write_text("2")
    assert conditions()["revision"] == (f"{clean}-dirty" if is_dirty else clean)
    assert ("uncommitted" in capsys.readouterr().err) is is_dirty


def test_the_overhead_is_not_kept_from_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(sys, "argv", ["engine_overhead.py", "--out", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit):
        engine_overhead.main()
    assert "load average 1.50" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_eager_peer_decodes_what_generate_decodes() -> None:
    model = build("llama")
    decoder = eager_decoder(model, 64)
    for prompt in prompts([1, 40, 7]):
        assert [decoder.prefill(prompt), *decoder.decode(11)] == greedy(model, prompt, 12)


def test_the_step_program_decodes_what_generate_decodes() -> None:
    model = build("llama")
    decoder = StepDecoder(model, 64)
    for prompt in prompts([1, 40, 7]):
        assert [decoder.prefill(prompt), *decoder.decode(11)] == greedy(model, prompt, 12)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["eager", "compiled"])
def test_the_inductor_peer_decodes_what_generate_decodes(prefill: str) -> None:
    model = build("llama")
    decoder = inductor_decoder(model, 64, prefill="eager" if prefill == "eager" else "compiled")
    for prompt in prompts([40, 7]):
        assert [decoder.prefill(prompt), *decoder.decode(11)] == greedy(model, prompt, 12)


def test_a_probe_reads_plausible_numbers(probe: Probe) -> None:
    reading = probe.best(3)
    assert reading.threads == 1
    assert 0.5 < reading.read_gb_s < 2000  # 8 MB may lie in a cache
    assert 0.5 < reading.fma_gflop_s < 2000


TINY: dict[str, dict[str, int]] = {
    "llama": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "bert": {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
    "vit": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 32},
}


@pytest.mark.parametrize("kind", TINY)
def test_a_model_can_be_called_again(kind: str) -> None:
    model = compile_models.build(kind, "bfloat16", 2, **TINY[kind])
    assert model.config.num_hidden_layers == 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    arguments = compile_models.inputs(model, 3 if kind != "llama" else 1)
    with torch.no_grad():
        first = model(**compile_models.reset(arguments))[0]
        second = model(**compile_models.reset(arguments))[0]
    assert torch.equal(first, second)
    assert first.shape[0] == (3 if kind != "llama" else 1)


def test_a_peer_that_is_not_installed_is_listed_with_its_error(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not, where it is
    model = compile_models.build("bert", "float32", 1, **TINY["bert"])
    result = run_rounds(compile_cpu.contestants(model, [1], ["eager", "openvino"]), 1, {}, probe)
    assert "openvino" in result.failures["openvino"]
    assert result.median("eager", "batch 1") is not None


def test_samples_are_counted_whatever_the_batch(probe: Probe) -> None:
    model = compile_models.build("bert", "float32", 1, **TINY["bert"])
    (eager,) = compile_cpu.contestants(model, [1, 3, 8], ["eager"])
    assert {name: run() for name, run in eager.phases.items()} == {"batch 1": 8, "batch 3": 6, "batch 8": 8}


def test_no_peer_runs_uncompiled_after_many_captures() -> None:
    """Dynamo's own limit is eight captures of one code."""
    torch.compiler.reset()
    model = compile_models.build("bert", "float32", 1, **TINY["bert"])
    batches = range(1, 13)
    (dynamo,) = compile_cpu.contestants(model, batches, ["dynamo"])
    before = counters["stats"]["unique_graphs"]
    for run in dynamo.phases.values():
        run()
    assert counters["stats"]["unique_graphs"] - before == len(batches)


def test_first_calls_are_medians_of_the_processes_that_came_through(tmp_path: Path) -> None:
    shares = ("dynamo_s", "later_call_s", "compiler_s")
    samples: list[dict[str, Any]] = [
        {"first_call_s": 6.0 + i, **dict.fromkeys(shares, 2.0 + i), "import_s": 0.1} for i in (3, 0, 1)
    ]
    samples.insert(1, {"error": "killed"})
    found = compile_cpu.median(samples)
    assert found is not None and (found["first_call_s"], found["dynamo_s"]) == (7.0, 3.0)
    assert compile_cpu.median(samples[1:2]) is None
    calls = {"llmopt": {"cold": samples}, "inductor": {"cold": samples[1:2]}}
    medians = {peer: {s: compile_cpu.median(m) for s, m in states.items()} for peer, states in calls.items()}
    first_call = {"first_call": calls, "first_call_median": medians, "conditions": {}}
    compile_cpu.print_first_call("a", first_call)
    throughput = {"median": {"inductor": {"batch 1": 2.0}, "llmopt": {"batch 1": 3.0}, "eager": {"batch 1": None}}}
    assert compile_cpu.plot({"a": first_call, "b-float32": throughput}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
@torch.no_grad()
def test_inductor_has_weights_as_constants_where_it_freezes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the same model has been compiled without."""
    model = compile_models.build("bert", "float32", 1, **TINY["bert"])
    arguments = compile_models.inputs(model, 2)
    expected = model(**arguments)[0]
    inputs_left: list[int] = []
    freeze = freezing.freeze

    def counted(*graphs: Any) -> Any:
        module, kept = freeze(*graphs)
        inputs_left.append(len(kept))
        return module, kept

    monkeypatch.setattr(freezing, "freeze", counted)
    for name, graphs in (("inductor", 0), ("inductor-freezing", 1)):
        found = backends.compiled_forward(model, name)(**arguments)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(inputs_left) == graphs
    assert inputs_left[0] <= len(arguments)  # and no weight


@pytest.mark.slow
def test_a_first_call_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = compile_cpu.parse(["--layers", "1", "--tokens", "3", "--threads", "1"])
    for peer in ("llmopt", "eager"):
        sample = compile_cpu.child("first_call.py", "llama-float32", peer, tmp_path, options)
        assert "error" not in sample, sample
        made_of = sum(sample[key] for key in compile_cpu.SHARES)
        assert made_of == pytest.approx(sample["first_call_s"])
        assert (sample["dynamo_s"] > 0) is (peer == "llmopt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_peak_memory_holds_the_weights(kind: str) -> None:
    options = compile_cpu.parse(["--layers", "1", "--tokens", "3", "--threads", "1", "--peers", "eager", "llmopt"])
    found = compile_cpu.measure_memory(f"{kind}-float32", options, [2])["batch 2"]
    for peer in ("eager", "llmopt"):
        assert found[peer]["weights_bytes"] < found[peer]["peak_bytes"] < 2 * found[peer]["weights_bytes"]


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_is_not_credited_with_what_pytorch_runs(probe: Probe) -> None:
    for dtype in ("float32", "bfloat16"):  # the latter it does not take, and hands to PyTorch
        model = compile_models.build("bert", dtype, 1, **TINY["bert"])
        result = run_rounds(compile_cpu.contestants(model, [1], ["openvino"]), 1, {}, probe)
        assert ("bfloat16" in result.failures.get("openvino", "")) is (dtype == "bfloat16")


def test_the_sweep_counts_what_reaches_aten() -> None:
    x, w, q = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 4, 7, 16)
    with FlopCount() as count, torch.no_grad():
        torch.nn.functional.linear(x, w)
    assert count.total == 2 * 3 * 5 * 8
    with FlopCount() as count, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert count.total == 2 * 2 * (2 * 4) * 7 * 7 * 16
    with FlopCount() as count, torch.no_grad():
        torch.ops.llmopt.linear(x, [w], [None])  # a reference, not a kernel
    assert count.own == {"llmopt.linear": 1} and count.total == 2 * 3 * 5 * 8


def test_a_single_logit_is_compared_by_its_size() -> None:
    """CLIP has one, for one text beside one image."""
    one, more = torch.tensor([[-4.0]]), torch.tensor([[1.0, 3.0]])
    assert model_coverage._difference(one + 1, one) == 0.25
    assert model_coverage._difference(more + 1, more) == pytest.approx(0.5**0.5)
    assert model_coverage._difference(more / 0, more) == math.inf


@pytest.mark.parametrize("name", ["gpt2", "ViTForImageClassification"])
@torch.no_grad()
def test_the_sweep_of_one_type(name: str) -> None:
    seen: list[str] = []
    record = measure(name, ((2, 19),), lambda record: seen.append(record["step"]))
    assert record["status"] == "right" and record["flop_share"] == 1.0 and record["difference"] < 1e-4
    assert record["tokens_equal"] is (True if name == "gpt2" else None)
    assert seen[0] == "eager" and any("greedy" in step for step in seen)
    text = table([record], [(2, 19)], 2e-3, {"torch": "x"})
    assert f"| {name} |" in text
    causal, others = (dict(summary([record]))[key].lstrip("*")[0] for key in ("right", "encoders and others, right"))
    assert (causal, others) == (("1", "0") if name == "gpt2" else ("0", "1"))


def test_the_sweep_adds_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llmopt's results stay when Inductor's come later, and when Inductor's process dies."""
    found = {"type": "gpt2", "status": "right", "compile_s": 1.0}
    run = functools.partial(model_coverage._run, "gpt2", tmp_path, 60.0, shapes=SHAPES, end=math.inf)
    monkeypatch.setattr(model_coverage, "measure", lambda *_: found)
    assert run(inductor=False) == found
    monkeypatch.setattr(model_coverage, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(model_coverage, "measure_inductor", lambda *_: os._exit(3))
    died = run(inductor=True)
    assert died is not None and died["status"] == "right" and "exit status 3" in died["inductor"]["error"]
    monkeypatch.setattr(model_coverage, "measure_inductor", lambda *_: {"right": True, "compile_s": 2.0})
    assert run(inductor=True) == found | {"inductor": {"right": True, "compile_s": 2.0}}


def test_the_sweep_beside_inductor() -> None:
    def record(inductor: dict[str, Any] | None) -> dict[str, Any]:
        made = {"type": "gpt2", "class": "A", "status": "right", "compile_s": 3.0}
        return made if inductor is None else made | {"inductor": inductor}

    right, slow = {"compile_s": 6.0, "right": True}, {"compile_s": 1.0, "right": False}
    records = [record(None), record(right), record(slow), record({"error": "no end in time", "right": False})]
    found = dict(summary(records))
    assert found["right by Inductor, of those that it was run on"] == "1 of 3"
    assert not any("Inductor" in name for name, _ in summary(records[:1]))
    text = table(records, [(2, 19)], 2e-3, {"torch": "x"})
    assert [line.split("|")[10].strip() for line in text.splitlines() if "| gpt2 |" in line] == [
        "-",
        "6.0",
        "1.0 (wrong)",
        "- (error)",
    ]
