"""torch.compile on CPU: llmopt beside eager PyTorch, Inductor and (where installed) OpenVINO, as a user meets them.

usage: python benchmarks/compile_cpu.py [--parts llama-bfloat16 bert-float32 ...] [--peers eager inductor llmopt]
           [--batches 1 8] [--rounds 7] [--threads 2] [--layers N] [--out benchmarks/results/compile_cpu.json]

Parts are MODEL-DTYPE. `llama` (Llama-3.2-1B shape, 512 tokens into a StaticCache) measures the first call: once with
empty caches and once more with what the first process left in them, each in a process of its own (`first_call.py`),
peers in turns. `bert` and `vit` (BERT-base, 128 tokens; ViT-base, 224 x 224) measure samples per second at each batch
size in interleaved rounds. Weights are random and shared; sizes are static for everybody, which is what suits
Inductor best. A part's result replaces the one in `--out`; the plot beside it shows all parts that are there.

OpenVINO's backend needs `pip install openvino`; it is no dependency. A peer that fails is listed with its error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compile_models import MODELS, build, inputs
from harness import ROOT, Contestant, conditions, print_table, run_rounds, write_json
from peers import BACKENDS, compiled_forward
from probe import Probe
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PARTS = ("llama-bfloat16", "bert-float32", "bert-bfloat16", "vit-float32", "vit-bfloat16")
STATES = ("cold", "warm")


def contestants(model: torch.nn.Module, batches: Sequence[int], names: Sequence[str]) -> list[Contestant]:
    """One contestant a peer, with a phase for each batch size."""
    samples = {batch: inputs(model, batch) for batch in batches}

    def make(name: str) -> Contestant:
        forward = compiled_forward(model, name)

        @torch.no_grad()
        def run(batch: int) -> int:
            repeat = max(1, 8 // batch)  # as many samples whatever the batch size
            for _ in range(repeat):
                forward(**samples[batch])
            return repeat * batch

        phases = {f"batch {batch}": lambda batch=batch: run(batch) for batch in batches}
        return Contestant(name, phases, {"backend": BACKENDS[name] or "none"})

    return [make(name) for name in names]


def measure_throughput(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of an encoder."""
    kind, _, dtype = part.partition("-")
    model = build(kind, dtype, options.layers)
    setting = conditions(part=part, layers=model.config.num_hidden_layers, parameters=model.num_parameters())
    result = run_rounds(
        contestants(model, options.batches, options.peers), options.rounds, setting, Probe(options.threads)
    )
    peers = [name for name in options.peers if name != "llmopt"]
    print_table(result, [f"batch {b}" for b in options.batches], part, peers, unit="samples")
    return result.to_json()


def first_call(part: str, peer: str, caches: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one process measured, or `{"error": ...}`."""
    kind, _, dtype = part.partition("-")
    command = [sys.executable, str(Path(__file__).with_name("first_call.py")), kind, dtype, peer, str(caches)]
    command += ["--threads", str(options.threads)]
    command += ["--layers", str(options.layers)] if options.layers else []
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return {"error": answer.stderr.strip()[-2000:]}
    return dict(json.loads(answer.stdout.strip().splitlines()[-1]))


def measure_first_call(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The first call of each peer, cold and warm, each in a fresh process."""
    setting = conditions(part=part, layers=options.layers or "all")
    probe = Probe(options.threads)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {p: {s: [] for s in STATES} for p in options.peers}
    bandwidth = []
    for _ in range(options.first_call_rounds):
        with tempfile.TemporaryDirectory(prefix="compile-cpu-") as folder:
            for state in STATES:
                bandwidth.append(max(probe.read_gb_s() for _ in range(5)))
                for peer in options.peers:
                    samples[peer][state].append(first_call(part, peer, Path(folder) / peer, options))
    result = {"conditions": setting, "read_gb_s": {"samples": bandwidth}, "first_call": samples}
    print_first_call(part, result)
    return result


def best(samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The quickest of the processes that came through: whatever else runs can only make one slower."""
    good = [s for s in samples if "error" not in s]
    return min(good, key=lambda s: float(s["first_call_s"])) if good else None


def print_first_call(part: str, result: dict[str, Any]) -> None:
    table = Table(title=f"{part}: first call")
    for column in ("", "seconds", "of it Dynamo", "of it imports", "later calls", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    console = Console()
    for peer, states in result["first_call"].items():
        for state, samples in states.items():
            found = best(samples)
            if found is None:
                console.print(f"[red]{peer} failed:[/] {escape(samples[0]['error'])}")
                continue
            times = [f"{found[key]:.2f}" for key in ("first_call_s", "dynamo_s", "import_s")]
            later = f"{found['later_call_s']:.3f} s"
            table.add_row(f"{peer}, {state}", *times, later, f"{found['peak_bytes'] / 2**30:.2f} GiB")
    console.print(table)


def plot(parts: dict[str, Any], path: Path) -> bool:
    """A panel of throughputs and one of first calls; False (and no file) where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    encoders = {name: part for name, part in parts.items() if "median" in part}
    calls = {name: part for name, part in parts.items() if "first_call" in part}
    panels = [draw for draw, data in ((_throughputs, encoders), (_first_calls, calls)) if data]
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, encoders if draw is _throughputs else calls)
        axes.tick_params(axis="x", labelsize=7)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _throughputs(axes: Any, parts: dict[str, Any]) -> None:
    """Samples per second as multiples of Inductor's."""
    groups = [
        (f"{name.replace('bfloat16', 'bf16').replace('float32', 'fp32')}\n{phase}", part["median"], phase)
        for name, part in parts.items()
        for phase in next(iter(part["median"].values()))
    ]
    names = [n for n in BACKENDS if any(median.get(n, {}).get(phase) for _, median, phase in groups)]
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        heights = []
        for _, median, phase in groups:
            own, base = median.get(name, {}).get(phase), median.get("inductor", {}).get(phase)
            heights.append(own / base if own and base else 0.0)
        axes.bar([i + place * width for i in range(len(groups))], heights, width, label=name)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(groups))], [label for label, *_ in groups])
    axes.axhline(1.0, color="gray", linewidth=0.5)
    axes.set_title("samples per second, Inductor = 1")


def _first_calls(axes: Any, parts: dict[str, Any]) -> None:
    """Seconds of the first call of each compiler, Dynamo's own apart."""
    labels, tracing, rest = [], [], []
    for part in parts.values():
        for peer, states in part["first_call"].items():
            for state, samples in states.items():
                found = best(samples)
                if found is not None and peer != "eager":
                    labels.append(f"{peer}\n{state}")
                    tracing.append(found["dynamo_s"])
                    rest.append(found["first_call_s"] - found["dynamo_s"])
    axes.bar(labels, tracing, label="Dynamo")
    bars = axes.bar(labels, rest, bottom=tracing, label="everything else")
    axes.bar_label(bars, [f"{a + b:.1f}" for a, b in zip(tracing, rest, strict=True)])
    axes.set_title(f"first call, seconds ({', '.join(parts)})")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="+", choices=list(BACKENDS), default=["eager", "inductor", "llmopt"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-call-rounds", type=int, default=1, help="processes a peer and state")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--out", type=Path, help="JSON file, updated part by part; a plot goes beside it")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    out = None if options.out is None else options.out if options.out.is_absolute() else ROOT / options.out
    parts: dict[str, Any] = json.loads(out.read_text("utf-8")) if out is not None and out.exists() else {}
    for part in options.parts:
        measured = MODELS[part.partition("-")[0]].measures
        parts[part] = (measure_first_call if measured == "first call" else measure_throughput)(part, options)
        if out is not None:
            write_json(parts, out)
            plot(parts, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
