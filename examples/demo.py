"""Completes real Python by eager PyTorch, Inductor and llmopt side by side, then from a saved program in a new process.

usage: python examples/demo.py [--dtype float32] [--tokens 64] [--rounds 3] [--threads N] [--skip-inductor]

The prompts come from modules of the standard library that the model (examples/models/target) was not trained on.
Ends with status 1 when llmopt's tokens differ from eager's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import torch
from harness import Contestant, Result, conditions, run_rounds
from peers import StaticDecoder, eager_decoder, inductor_decoder
from probe import Probe
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import llmopt

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "target"
# (module, text at which the prompt begins, prompt tokens)
PROMPTS = (
    ("heapq", "def heappush(", 20),
    ("textwrap", "class TextWrapper", 48),
    ("bisect", "def insort_right(", 96),
    ("statistics", "def _sum(", 160),
)
console = Console()


def prompt_text(module: str, start: str) -> str:
    """The standard library's source from `start` on (from the top, should this Python's version not hold `start`)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this Python has no source of its module {module}")
    text = Path(spec.origin).read_text("utf-8")
    begin = max(0, text.find(start))
    return text[begin : begin + 2000]


def load_prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(prompt_text(module, start))["input_ids"][:length] for module, start, length in PROMPTS]


def complete(decoder: StaticDecoder, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    return [[decoder.prefill(prompt), *decoder.decode(tokens - 1)] for prompt in prompts]


class Completions:
    """A contestant's run over all prompts; keeps the tokens of the last one for comparison."""

    def __init__(self, name: str, run: Any) -> None:
        self.name, self._run = name, run
        self.tokens: list[list[int]] = []

    def __call__(self) -> int:
        self.tokens = self._run()
        return sum(map(len, self.tokens))


def make_contestants(
    model: PreTrainedModel, llm: llmopt.LLM, prompts: list[list[int]], tokens: int, with_inductor: bool
) -> list[Completions]:
    longest = max(map(len, prompts)) + tokens
    eager = eager_decoder(model, longest)
    found = [Completions("eager", lambda: complete(eager, prompts, tokens))]
    if with_inductor:
        inductor = inductor_decoder(model, longest, prefill="eager")
        found.append(Completions("Inductor", lambda: complete(inductor, prompts, tokens)))
    sampling = llmopt.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def one_by_one() -> list[list[int]]:
        return [list(llm.generate([prompt], sampling)[0].outputs[0].token_ids) for prompt in prompts]

    def together() -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]

    return [*found, Completions("llmopt", one_by_one), Completions(f"llmopt, batch of {len(prompts)}", together)]


def show_completions(tokenizer: Any, prompts: list[list[int]], completions: list[list[int]]) -> None:
    for (module, _, _), prompt, tokens in zip(PROMPTS, prompts, completions, strict=True):
        text = tokenizer.decode(prompt[-24:], skip_special_tokens=True) + "⟦" + tokenizer.decode(tokens) + "⟧"
        console.print(Panel(Syntax(text, "python", word_wrap=True), title=f"{module}.py, {len(prompt)} prompt tokens"))


def show_speeds(result: Result, contestants: list[Completions]) -> None:
    reference = contestants[0].tokens
    table = Table(title=f"{len(PROMPTS)} prompts, greedy, {len(reference[0])} new tokens each; prefill included")
    for heading in ("", "tokens/s", "to eager", "to Inductor", "tokens equal to eager's", "first run"):
        table.add_column(heading, justify="right" if heading else "left")
    for contestant in contestants:
        name = contestant.name
        if name in result.failures:
            table.add_row(name, "[red]failed", "-", "-", "-", "-")
            continue
        pairs = [
            (a, b)
            for ours, eager in zip(contestant.tokens, reference, strict=True)
            for a, b in zip(ours, eager, strict=True)
        ]
        equal = sum(a == b for a, b in pairs)
        ratios = [result.ratio(name, [peer], "complete") for peer in ("eager", "Inductor")]
        table.add_row(
            name,
            f"{result.median(name, 'complete'):.0f}",
            *("-" if ratio is None else f"{ratio:.1f} x" for ratio in ratios),
            f"{'[green]' if equal == len(pairs) else '[red]'}{equal} of {len(pairs)}",
            f"{result.warmup_s[name]:.1f} s",
        )
    console.print(table)
    for name, error in result.failures.items():
        console.print(f"[red]{name} failed:[/] ", end="")
        console.print(error, markup=False)
    setting = result.conditions
    console.print(
        f"{setting['cpu']} ({setting['instruction_set']}), {setting['threads']} threads, {setting['dtype']}; "
        f"torch {setting['torch']}, transformers {setting['transformers']}, {setting['compiler']}; read bandwidth "
        f"{result.bandwidth():.1f} GB/s. Peers: a loop of one forward and one argmax over a StaticCache; Inductor "
        "compiles decoding (as transformers does), in static shapes.",
        style="dim",
    )


def run_saved(llm: llmopt.LLM, texts: list[str], tokens: int) -> tuple[list[list[int]], list[str]]:
    """Exports, then generates in a fresh process; returns its tokens and the heavy modules that it had loaded."""
    with tempfile.TemporaryDirectory(prefix="llmopt-demo-") as folder:
        engine = Path(folder) / "target.engine"
        begin = time.perf_counter()
        llmopt.export(llm, engine)
        saved = time.perf_counter() - begin
        command = [sys.executable, str(ROOT / "examples" / "engine.py"), str(engine)]
        begin = time.perf_counter()
        answer = subprocess.run(
            [*command, *texts, "--max-tokens", str(tokens), "--ignore-eos", "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode != 0:
            raise SystemExit(f"the saved program did not run:\n{answer.stderr}")
        size = engine.stat().st_size / 1e6
        ran = time.perf_counter() - begin
    report = json.loads(answer.stdout.splitlines()[-1])
    console.print(
        f"saved {size:.1f} MB in {saved:.1f} s; loaded and run in a new process in {ran:.1f} s; "
        f"loaded there: {', '.join(report['loaded']) or 'neither transformers nor torch._dynamo'}"
    )
    return report["token_ids"], report["loaded"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-inductor", action="store_true", help="spares its compilation, the longest wait")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, options.dtype))
    prompts = load_prompts(tokenizer)
    llm = llmopt.LLM(model, tokenizer=tokenizer)
    contestants = make_contestants(model, llm, prompts, options.tokens, not options.skip_inductor)
    tasks = [Contestant(c.name, {"complete": c}) for c in contestants]
    result = run_rounds(tasks, options.rounds, conditions(dtype=options.dtype), Probe(options.threads, 256))
    eager, *_, ours, batched = contestants
    if "eager" in result.failures or "llmopt" in result.failures:
        console.print_json(json.dumps(result.failures))
        return 1
    show_completions(tokenizer, prompts, ours.tokens)
    show_speeds(result, contestants)

    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    expected = [
        list(output.outputs[0].token_ids)
        for output in llm.generate(
            texts, llmopt.SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
        )
    ]
    saved, loaded = run_saved(llm, texts, options.tokens)
    same = saved == expected
    console.print(f"tokens of the saved program: {'[green]all equal' if same else '[red]different'}[/]")
    # In bf16 eager's own rounding decides near ties; only float32 is compared exactly.
    exact = options.dtype != "float32" or (ours.tokens == eager.tokens and batched.tokens == eager.tokens)
    return 0 if exact and same and not loaded else 1


if __name__ == "__main__":
    sys.exit(main())
