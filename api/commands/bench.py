"""`llmopt bench throughput` and `llmopt bench latency`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.commands.common import (
    AsJson,
    Model,
    check_for_program,
    progress,
)
from llmopt.commands.engine_options import takes_engine_options
from llmopt.compiler.errors import OptionError

if TYPE_CHECKING:
    from llmopt.commands.workload import Work
    from llmopt.llm import LLM

app = typer.Typer(
    help="Measure a model: how much it gives in a time, and how soon. The work is the same whatever the model says: "
    "random prompts unless a file is given, and outputs of fixed lengths.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as PNG, PDF or SVG; needs matplotlib.")]
_Seed = Annotated[int, typer.Option(help="Of the random prompts and lengths [0].", show_default=False)]
_THROUGHPUT_INPUT, _THROUGHPUT_OUTPUT, _NUM_PROMPTS = "512", "128", 64


@app.command(
    epilog="""Examples:

\b
  llmopt bench throughput ./model --num-prompts 64 --input-len 512 --output-len 128
  llmopt bench throughput ./model --input-len 1:300 --output-len 16:64 --plot run.png
  llmopt bench throughput model.engine --dataset prompts.jsonl --json"""
)
@takes_engine_options()
def throughput(
    model: Model,
    num_prompts: Annotated[
        int | None, typer.Option(help="How many, all waiting from the beginning [64, or the whole file].")
    ] = None,
    input_len: Annotated[
        str | None, typer.Option(metavar="N|N:M", help="Tokens of a prompt, or a range of them [512].")
    ] = None,
    output_len: Annotated[str, typer.Option(metavar="N|N:M", help="Tokens to generate.")] = _THROUGHPUT_OUTPUT,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines: "prompt", a text or token ids, and perhaps "output_len".'),
    ] = None,
    seed: _Seed = 0,
    plot: _Plot = None,
    *,
    engine: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Requests and tokens per second over many prompts at once.

    Compilation and a short warm-up come before and are not counted. Prints also the largest share of the KV cache that
    was held, preemptions, and prompt tokens that were found in the prefix cache.
    """
    from llmopt.commands import measuring, workload

    if num_prompts is not None and not 1 <= num_prompts <= workload.MAX_PROMPTS:
        raise OptionError("num_prompts", num_prompts, f"a whole number from 1 to {workload.MAX_PROMPTS}")
    if dataset is not None and input_len is not None:
        raise OptionError("input_len", input_len, "nothing with --dataset, whose prompts have their lengths")
    inputs = workload.Lengths.parse("input_len", input_len or _THROUGHPUT_INPUT)
    outputs = workload.Lengths.parse("output_len", output_len)
    measuring.check_plot(plot)
    work: list[Work] = []
    if dataset is not None:
        work = workload.work_from_file(dataset, num_prompts, outputs, seed)
    llm = _load(model, engine)
    if not work:
        _check_lengths(llm, inputs.most, outputs.most)
        work = workload.random_work(num_prompts or _NUM_PROMPTS, inputs, outputs, llm.vocab_size, seed)
    else:
        _check_work(llm, work)
    _warm_up(llm)
    with _bar(len(work), "prompts") as bar:
        found = measuring.measure_throughput(llm, work, bar.update)
    if plot is not None:
        measuring.plot_throughput(found, plot)
    data = found.to_json()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    typer.echo(
        f"Throughput: {data['requests_per_second']:.2f} requests/s, {data['tokens_per_second']:.2f} total tokens/s, "
        f"{data['output_tokens_per_second']:.2f} output tokens/s"
    )
    typer.echo(
        f"{found.num_requests} requests, {found.prompt_tokens} prompt tokens ({found.prefix_cache_hits} from the "
        f"prefix cache), {found.output_tokens} output tokens in {found.seconds:.2f} s and {found.num_steps} steps"
    )
    typer.echo(f"KV cache: at most {found.max_kv_cache_usage:.1%} held, {found.num_preemptions} preemptions")


@app.command(
    epilog="""Examples:

\b
  llmopt bench latency ./model --batch-size 1 --input-len 512 --output-len 64
  llmopt bench latency ./model --batch-size 8 --num-iters 10 --plot latency.png"""
)
@takes_engine_options()
def latency(
    model: Model,
    batch_size: Annotated[int, typer.Option(help="Requests that run together.")] = 8,
    input_len: Annotated[str, typer.Option(metavar="N|N:M", help="Tokens of a prompt, or a range of them.")] = "32",
    output_len: Annotated[str, typer.Option(metavar="N|N:M", help="Tokens to generate.")] = "128",
    num_iters_warmup: Annotated[int, typer.Option(help="Runs that are not counted.")] = 2,
    num_iters: Annotated[int, typer.Option(help="Runs that are.")] = 10,
    seed: _Seed = 0,
    plot: _Plot = None,
    *,
    engine: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """How long a batch takes: until its first tokens, for each later one, and for each step.

    Prompts are new in every run, so that none is found in the prefix cache. A step is timed once all requests have
    their first token. Text is not made.
    """
    from llmopt.commands import measuring, workload

    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("num_iters", num_iters, 1),
        ("num_iters_warmup", num_iters_warmup, 0),
    ):
        if not least <= number <= 4096:
            raise OptionError(name, number, f"a whole number from {least} to 4096")
    inputs, outputs = (
        workload.Lengths.parse(name, text) for name, text in (("input_len", input_len), ("output_len", output_len))
    )
    if engine.setdefault("max_num_seqs", batch_size) < batch_size:
        raise OptionError("max_num_seqs", engine["max_num_seqs"], f"at least --batch-size {batch_size}")
    measuring.check_plot(plot)
    llm = _load(model, engine)
    _check_lengths(llm, inputs.most, outputs.most)
    found = measuring.Latency()
    with _bar(num_iters_warmup + num_iters, "runs") as bar:
        for run in range(num_iters_warmup + num_iters):
            work = workload.random_work(batch_size, inputs, outputs, llm.vocab_size, seed + run)
            measuring.measure_batch(llm, work, found if run >= num_iters_warmup else measuring.Latency())
            bar.update()
    if plot is not None:
        measuring.plot_latency(found, plot)
    data: dict[str, Any] = {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        **found.to_json(),
    }
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    rows = (("runs", "batch"), ("ttft", "first token"), ("tpot", "later token"), ("steps", "step"))
    typer.echo(f"{'milliseconds':14}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99")))
    for name, title in rows:
        cells = (data[name][column] for column in ("mean", "p50", "p90", "p99"))
        typer.echo(
            f"{title:14}" + "".join(f"{'-' if cell is None else format(1e3 * cell, '.2f'):>10}" for cell in cells)
        )


def _load(model: str, engine: dict[str, Any]) -> LLM:
    check_for_program(model, engine)
    with progress("loading and compiling"):
        import llmopt

        llm = llmopt.LLM(model, **engine, max_num_queued=0)
        llm._engine_core()
    return llm


def _check_lengths(llm: LLM, most_in: int, most_out: int) -> None:
    """Raises OptionError or InputError for work that would end early or could never run."""
    from llmopt.commands.measuring import work_params

    if most_in + most_out > llm.max_model_len:
        raise OptionError(
            "output_len", most_out, f"at most {llm.max_model_len} (max_model_len) together with input_len {most_in}"
        )
    llm._engine_core(fresh=False).check([0] * most_in, work_params(most_out))


def _check_work(llm: LLM, work: list[Work]) -> None:
    for ids, each in zip(llm._requests.encode([each.prompt for each in work])[1], work, strict=True):
        _check_lengths(llm, len(ids), each.output_len)


def _warm_up(llm: LLM) -> None:
    """Pages of weights are read, buffers are made, and no prompt of the measurement is in the cache."""
    from llmopt.commands.measuring import work_params

    length = min(64, llm.max_model_len - 4)
    llm.generate([[0] * length, [1] * length], work_params(3))


def _bar(total: int, unit: str) -> Any:
    """On stderr, and only where that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None)
