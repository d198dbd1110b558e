"""What a quantized KV cache costs in perplexity: the trained model on Python text that it has not seen.

    python benchmarks/kv_cache_quality.py --out benchmarks/results/kv_cache_quality.json

The text is twelve modules of this Python's own standard library that were held out of the model's training. It is cut
into windows of 256 tokens, the length that the model was trained at, and every window is computed teacher-forced by the
step program: first half as one chunk, the rest in chunks of 16 tokens, so that most queries meet keys that were read
back from pages. The error of a difference is that of the mean over windows, paired.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, conditions
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.compiler.kv_formats import KV_CACHE_DTYPES
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.step_program import StepBatch, StepProgram

HELD_OUT = (
    "statistics",
    "textwrap",
    "heapq",
    "bisect",
    "calendar",
    "shlex",
    "fractions",
    "queue",
    "csv",
    "glob",
    "tempfile",
    "sched",
)
WINDOW, FIRST, CHUNK = 256, 128, 16


def windows(folder: Path) -> list[list[int]]:
    """The held-out text in windows of WINDOW tokens; the rest of the last one is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    library = Path(sysconfig.get_paths()["stdlib"])
    ids: list[int] = []
    for name in HELD_OUT:
        text = (library / f"{name}.py").read_text("utf-8")
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def window_losses(program: StepProgram, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean cross entropy in nats of each of `rows`, computed in chunks as one ragged batch."""
    pages = -(-WINDOW // program.block_size)
    cache = program.new_cache(len(rows) * pages)
    held = [list(range(i * pages, (i + 1) * pages)) for i in range(len(rows))]
    parts = []
    for start, end in [(0, FIRST), *((i, i + CHUNK) for i in range(FIRST, WINDOW, CHUNK))]:
        batch = StepBatch.build([r[start:end] for r in rows], [start] * len(rows), held, program.block_size, True)
        parts.append(program(batch, cache).float().view(len(rows), end - start, -1))
    logits = torch.cat(parts, 1)
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(row[:-1], torch.tensor(ids[1:]))
            for row, ids in zip(logits, rows, strict=True)
        ]
    )


def measure(folder: Path, dtype: str, rows: Sequence[Sequence[int]], batch: int) -> dict[str, dict[str, float]]:
    """Perplexity and memory of each cache format; differences are to "auto", in percent."""
    losses: dict[str, torch.Tensor] = {}
    bytes_per_token = {}
    for name in KV_CACHE_DTYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        options = Options.make({"kv_cache_dtype": name, "fallback": "error"})
        program = ModelEngine(model, options, Report()).program()
        bytes_per_token[name] = sum(spec.bytes_per_token() for spec in program.caches)
        steps = tqdm(range(0, len(rows), batch), desc=f"{dtype}, {name}", leave=False)
        losses[name] = torch.cat([window_losses(program, rows[i : i + batch]) for i in steps]).double()
    results = {}
    for name, loss in losses.items():
        change = loss - losses["auto"]
        results[name] = {
            "perplexity": math.exp(loss.mean().item()),
            "change_percent": 100 * math.expm1(change.mean().item()),
            "change_error_percent": 100 * (change.std() / len(change) ** 0.5).item(),
            "bytes_per_token": bytes_per_token[name],
            "tokens_to_bfloat16": sum(_plain_bytes(folder)) / bytes_per_token[name],
        }
    return results


def _plain_bytes(folder: Path) -> list[int]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return [2 * 2 * config["num_key_value_heads"] * config["head_dim"]] * config["num_hidden_layers"]


def main() -> None:
    """Parses the command line, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--windows", type=int, default=0, help="how many windows, evenly chosen; 0 is all")
    parser.add_argument("--batch", type=int, default=16, help="windows computed together")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = windows(arguments.model)
    if arguments.windows:
        rows = rows[:: max(1, len(rows) // arguments.windows)][: arguments.windows]
    found: dict[str, Any] = {d: measure(arguments.model, d, rows, arguments.batch) for d in arguments.dtype}
    for dtype, results in found.items():
        table = Table(title=f"{len(rows)} windows of {WINDOW} tokens, weights in {dtype}")
        for column in ("KV cache", "perplexity", "change", "bytes a token", "tokens, to bfloat16"):
            table.add_column(column, justify="right")
        for name, row in results.items():
            change = f"{row['change_percent']:+.3f} % ± {row['change_error_percent']:.3f}"
            memory = (f"{row['bytes_per_token']}", f"{row['tokens_to_bfloat16']:.2f} x")
            table.add_row(name, f"{row['perplexity']:.4f}", change, *memory)
        Console().print(table)
    if arguments.out:
        data = {"conditions": conditions(windows=len(rows), window=WINDOW, modules=HELD_OUT), "results": found}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
