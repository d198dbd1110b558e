"""torch.compile on CPU: llmopt beside eager PyTorch, Inductor and (where installed) OpenVINO, as a user meets them.

usage: python benchmarks/compile_cpu.py [--parts llama-bfloat16 bert-float32 ...] [--peers eager inductor llmopt]
           [--batches 1 8] [--rounds 7] [--first-call-rounds 3] [--tokens 32] [--threads 2] [--layers N]
           [--out benchmarks/results/compile_cpu.json]

Parts are MODEL-DTYPE. `llama` (Llama-3.2-1B shape, a short prompt into a StaticCache of 512) measures the first call:
in each round once with empty caches and once more with what that left in them, each in a process of its own
(`first_call.py`), peers in turns. Medians are reported, and what the first call is made of: Dynamo's tracing, which is
everybody's; the forward itself (as long as a later call takes); and the rest, which is the compiler's own. `bert` and
`vit` (BERT-base, 128 tokens; ViT-base, 224 x 224) measure samples per second at each batch size in interleaved rounds.
Every part has each peer's peak memory as well, eager PyTorch's beside it (`peak_memory.py`). Weights are random and
shared; sizes are static for everybody, which is what suits each of them best. A part's result replaces the one in
`--out`; the plot beside it shows all parts that are there.

OpenVINO's backend needs `pip install openvino`; it is no dependency. A peer that is not installed, does not work or
hands the model to something else is listed with the reason. It takes no bfloat16; `--parts llama-float32` is for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from backends import BACKENDS, compiled_forward
from compile_models import MODELS, build, inputs
from harness import ROOT, Contestant, conditions, print_table, run_rounds, write_json
from probe import Probe
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PARTS = ("llama-bfloat16", "bert-float32", "bert-bfloat16", "vit-float32", "vit-bfloat16")
PEERS = [name for name in BACKENDS if name != "dynamo"]
STATES = ("cold", "warm")
# What a first call is made of, in the order of the table; they add up to `first_call_s`.
SHARES = {"dynamo_s": "Dynamo", "later_call_s": "the forward", "compiler_s": "compiler's own"}


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
    return {**result.to_json(), "memory": measure_memory(part, options, options.batches)}


def measure_memory(part: str, options: argparse.Namespace, batches: Sequence[int]) -> dict[str, Any]:
    """What `peak_memory.py` finds for each batch size and each peer that works, with caches filled before.

    Eager PyTorch and a capture that compiles nothing are always among them, to compare with.
    """
    found: dict[str, dict[str, Any]] = {f"batch {batch}": {} for batch in batches}
    with tempfile.TemporaryDirectory(prefix="compile-cpu-") as folder:
        for batch, peer in product(batches, dict.fromkeys(["eager", "dynamo", *options.peers])):
            for _ in STATES if BACKENDS[peer] is not None else STATES[:1]:
                sample = child("peak_memory.py", part, peer, Path(folder) / peer, options, "--batch", str(batch))
            if "error" in sample:
                print(f"{part}, batch {batch}, peak memory: {peer} did not run: {sample['error']}")
            else:
                found[f"batch {batch}"][peer] = sample
    for phase, peers in found.items():
        sizes = ", ".join(f"{peer} {sample['peak_bytes'] / 2**20:.0f} MiB" for peer, sample in peers.items())
        print(f"{part}, {phase}, peak memory: {sizes}")
    return found


def child(
    script: str, part: str, peer: str, caches: Path, options: argparse.Namespace, *arguments: str
) -> dict[str, Any]:
    """What one process measured, or `{"error": ...}`."""
    kind, _, dtype = part.partition("-")
    command = [sys.executable, str(Path(__file__).with_name(script)), kind, dtype, peer, str(caches), *arguments]
    command += ["--threads", str(options.threads)]
    command += ["--layers", str(options.layers)] if options.layers else []
    command += ["--tokens", str(options.tokens)] if options.tokens else []
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return {"error": answer.stderr.strip()[-2000:]}
    return dict(json.loads(answer.stdout.strip().splitlines()[-1]))


def measure_first_call(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The first call of each peer, cold and warm, each in a fresh process."""
    tokens = options.tokens or MODELS[part.partition("-")[0]].length
    setting = conditions(part=part, layers=options.layers or "all", tokens=tokens)
    probe = Probe(options.threads)
    peers = [peer for peer in options.peers if BACKENDS[peer] is not None]
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {p: {s: [] for s in STATES} for p in peers}
    bandwidth = []
    for _ in range(options.first_call_rounds):
        with tempfile.TemporaryDirectory(prefix="compile-cpu-") as folder:
            for state in STATES:
                bandwidth.append(max(probe.read_gb_s() for _ in range(5)))
                for peer in peers:
                    samples[peer][state].append(child("first_call.py", part, peer, Path(folder) / peer, options))
    medians = {peer: {state: median(found) for state, found in states.items()} for peer, states in samples.items()}
    result = {
        "conditions": setting,
        "read_gb_s": {"samples": bandwidth},
        "first_call_median": medians,
        "first_call": samples,
        "memory": measure_memory(part, options, [1]),
    }
    print_first_call(part, result)
    return result


def median(samples: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The median of every figure over the processes that came through; None where none did."""
    good = [sample for sample in samples if "error" not in sample]
    return {key: statistics.median(sample[key] for sample in good) for key in good[0]} if good else None


def print_first_call(part: str, result: dict[str, Any]) -> None:
    rounds = max(len(samples) for states in result["first_call"].values() for samples in states.values())
    table = Table(title=f"{part}: first call, seconds, medians of {rounds}")
    columns = ("", "first call", *SHARES.values(), "to Inductor's", "own to\nInductor's", "imports")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    console = Console()
    medians = result["first_call_median"]
    for peer, states in result["first_call"].items():
        for state, samples in states.items():
            errors = [sample["error"] for sample in samples if "error" in sample]
            if errors:
                console.print(f"[red]{peer} did not run, {state}, {len(errors)} times:[/] {escape(errors[0])}")
            found, base = medians[peer][state], medians.get("inductor", {}).get(state)
            if found is None:
                continue
            ratios = [f"{found[key] / base[key]:.2f}" if base else "-" for key in ("first_call_s", "compiler_s")]
            times = [f"{found[key]:.2f}" for key in ("first_call_s", *SHARES)]
            table.add_row(f"{peer}, {state}", *times, *ratios, f"{found['import_s']:.2f}")
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in result["conditions"].items()))


def plot(parts: dict[str, Any], path: Path) -> bool:
    """A panel of throughputs and one of first calls; False (and no file) where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    encoders = {name: part for name, part in parts.items() if "median" in part}
    calls = {name: part for name, part in parts.items() if "first_call_median" in part}
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
    """Seconds of the first call of each compiler, and what they are made of."""
    found = {
        f"{peer.replace('-', chr(10), 1)}\n{state}": medians
        for part in parts.values()
        for peer, states in part["first_call_median"].items()
        for state, medians in states.items()
        if medians is not None
    }
    bottom = [0.0] * len(found)
    for key, label in SHARES.items():
        heights = [max(0.0, medians[key]) for medians in found.values()]
        bars = axes.bar(list(found), heights, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar_label(bars, [f"{medians['first_call_s']:.1f}" for medians in found.values()])
    axes.set_title(f"first call, seconds ({', '.join(parts)})")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "llama-float32"), default=list(PARTS))
    parser.add_argument("--peers", nargs="+", choices=list(BACKENDS), default=PEERS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-call-rounds", type=int, default=3, help="processes a peer and state")
    parser.add_argument("--tokens", type=int, help="length of the first call's prompt instead of 32")
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
        torch.compiler.reset()  # nothing of the parts before
        measured = MODELS[part.partition("-")[0]].measures
        parts[part] = (measure_first_call if measured == "first call" else measure_throughput)(part, options)
        if out is not None:
            write_json(parts, out)
            plot(parts, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
