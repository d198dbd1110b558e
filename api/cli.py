"""The command line: `llmopt generate`, `explain`, `export`, `env`.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the file system refused, 2 a mistake in
what was asked (every `LlmoptError`), 130 interrupted. Whatever is slow to import is imported inside the command that
needs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import llmopt
from llmopt.compiler.errors import InputError, LlmoptError, OptionError

if TYPE_CHECKING:
    from torch import fx

    from llmopt.compiler.report import GraphReport
    from llmopt.llm import LLM, RequestOutput
    from llmopt.runtime.program_file import LoadedProgram
    from llmopt.runtime.sampling import SamplingParams


class _Commands(typer.core.TyperGroup):
    """Turns llmopt's own errors into one line; what is a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlmoptError as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # typer ends quietly when the reader of a pipe has gone
        except OSError as error:
            _complain(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="llmopt",
    cls=_Commands,
    help="Makes language-model inference fast. MODEL is a Hugging Face folder or a file that `llmopt export` wrote.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _complain(text: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"error: {text}", style="red", markup=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmopt {llmopt.__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # A progress bar belongs on a terminal; transformers and its hub client read this when they are imported.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a program file.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16; auto keeps the model's own [auto]."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 is PyTorch's number [0].")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest sequence, prompt included; 0 is the model's own limit [0].")
]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in one page of the KV cache [16].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _progress(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes long; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


def _given(**options: Any) -> dict[str, Any]:
    """What the user has set; the rest is left to the environment and the library's defaults."""
    return {name: setting for name, setting in options.items() if setting is not None}


def _is_program(model: str) -> bool:
    return Path(model).is_file()


def _check_for_program(model: str, options: dict[str, Any]) -> None:
    """A program file has its dtype and page size compiled in; asking for others must not be passed over."""
    for name in ("dtype", "block_size"):
        if _is_program(model) and name in options:
            raise OptionError(name, options[name], "nothing: a program file has it compiled in; export it again")


# ---- generate ------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  llmopt generate ./model "def fib(n):" --max-tokens 64 --temperature 0
  llmopt generate ./model --prompt-file prompt.txt --stream
  echo "import os" | llmopt generate ./model --prompt-file - --json
  llmopt generate model.engine "One" "Two" --stop END --seed 7"""
)
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")] = None,
    prompt_file: Annotated[
        list[str] | None, typer.Option(help="A file that is one prompt, - for stdin; may be repeated.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate [16].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [1.0].")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus: the likeliest tokens up to this probability [1.0].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="The k likeliest tokens; 0 is all [0].")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest [0.0].")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on at the end of sequence.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    dtype: Dtype = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = None,
    as_json: AsJson = False,
) -> None:
    """Continue one or more prompts.

    Prints the continuations; with several prompts each has a heading. --json prints one object per prompt and line
    (with --stream: per token).
    """
    texts = [*(prompts or []), *map(_read_prompt, prompt_file or [])]
    if not texts:
        raise InputError("no prompt: give one as argument or by --prompt-file")
    if stream and len(texts) > 1 and not as_json:
        raise InputError(f"--stream prints one prompt, got {len(texts)}; --stream --json tells them apart")
    options = _given(dtype=dtype, threads=threads, max_model_len=max_model_len, block_size=block_size)
    _check_for_program(model, options)
    chosen = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop) if stop else None,
    )
    with _progress("loading"):
        sampling = llmopt.SamplingParams(**chosen, ignore_eos=ignore_eos)
        llm = llmopt.LLM(model, **options)
    if stream:
        _stream(llm, texts, sampling, as_json)
        return
    with _progress("compiling and generating"):
        results = llm.generate(texts, sampling)
    for number, result in enumerate(results):
        _print_result(number, result, len(results), as_json)


def _read_prompt(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _print_result(number: int, result: RequestOutput, total: int, as_json: bool) -> None:
    output = result.outputs[0]
    if as_json:
        record = {
            "index": number,
            "prompt": result.prompt,
            "prompt_token_ids": result.prompt_token_ids,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
        }
        typer.echo(json.dumps(record))
        return
    if total > 1:
        typer.echo(f"{'' if number == 0 else os.linesep}==> prompt {number + 1} <==")
    typer.echo(output.text)


def _stream(llm: LLM, texts: list[str], sampling: SamplingParams, as_json: bool) -> None:
    for chunk in llm.stream(texts, sampling):
        if as_json:
            typer.echo(json.dumps(vars(chunk)))
        else:
            typer.echo(chunk.text, nl=False)
        sys.stdout.flush()
    if not as_json:
        typer.echo()


# ---- explain -------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  llmopt explain ./model
  llmopt explain ./model --dtype bfloat16 --kernels
  llmopt explain ./model --json | jq '.graphs[0].passes'
  llmopt explain model.engine"""
)
def explain(
    model: Model,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the C++ source of every kernel.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph after all passes.")] = False,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    as_json: AsJson = False,
) -> None:
    """Say what llmopt makes of a model.

    For a folder: compiles the step program and prints passes with their matches and near misses, kernels, and
    fallbacks to ATen with their reasons. For a program file: its inputs, kernels and schedule.
    """
    options = _given(dtype=dtype, block_size=block_size)
    _check_for_program(model, options)
    if _is_program(model):
        if graph:
            raise OptionError("graph", True, "False: a program file holds no graph, only what was made of it")
        _explain_program(model, kernels, as_json)
        return
    with _progress("loading and compiling"):
        report, final = _compile_folder(model, options)
    if as_json:
        from llmopt.compiler.report import Report

        data = Report([report]).to_json()
        if graph:
            data["graphs"][0]["graph"] = _graph_text(final)
        if not kernels:
            for kernel in data["graphs"][0]["kernels"]:
                del kernel["source"]
        typer.echo(json.dumps(data, indent=2))
        return
    from llmopt.compiler.report import graph_text

    typer.echo(graph_text(0, report))
    if graph:
        typer.echo(f"\n{_graph_text(final)}")
    if kernels:
        for use in report.kernels:
            typer.echo(f"\n// {use.template} {use.arguments}: {use.calls} x {use.origin}\n{use.source}")


def _compile_folder(model: str, options: dict[str, Any]) -> tuple[GraphReport, fx.Graph]:
    """The report and the final graph of a folder's step program."""
    from llmopt.compilation import compile_step
    from llmopt.compiler.options import Options
    from llmopt.huggingface import describe, load_model
    from llmopt.tracing import trace_forward

    settings = Options.make(options)
    info = describe(load_model(model, settings.torch_dtype))
    captured, _ = trace_forward(info.forward, info.max_model_len - 1)
    return compile_step(captured, settings).report, captured.graph


def _graph_text(graph: fx.Graph) -> str:
    from llmopt.compiler.graph import graph_text

    return graph_text(graph)


def _explain_program(path: str, with_sources: bool, as_json: bool) -> None:
    from llmopt.runtime.executable import kernel_source
    from llmopt.runtime.program_file import load_program

    with _progress("loading"):
        loaded = load_program(path)
    program = loaded.program.program
    if as_json:
        typer.echo(json.dumps(_program_json(loaded, with_sources), indent=2))
        return
    for line in _program_lines(loaded):
        typer.echo(line)
    if with_sources:
        for spec in program.kernels:
            typer.echo(f"\n// {_kernel_name(spec)}\n{kernel_source(spec)}")


def _kernel_name(spec: Any) -> str:
    arguments = ", ".join(spec.arguments).replace("llmopt::", "")
    return f"{spec.template}<{arguments}>" if arguments else str(spec.template)


def _program_json(loaded: LoadedProgram, with_sources: bool) -> dict[str, Any]:
    from llmopt.codegen import program_json
    from llmopt.runtime.executable import kernel_source

    program = loaded.program.program
    data: dict[str, Any] = {
        "kind": "program",
        "vocab_size": loaded.vocab_size,
        "max_model_len": loaded.max_model_len,
        "eos_token_ids": loaded.eos_token_ids,
        "block_size": loaded.program.block_size,
        "program": program_json.to_json(program),
    }
    if with_sources:
        data["sources"] = [kernel_source(spec) for spec in program.kernels]
    return data


def _program_lines(loaded: LoadedProgram) -> Iterator[str]:
    from llmopt.codegen.program import KernelCall

    step = loaded.program
    program = step.program
    weights = sum(w.numel() * w.element_size() for w in step.executable.weights)
    yield (
        f"program: vocabulary {loaded.vocab_size}, sequences to {loaded.max_model_len} tokens, "
        f"{len(program.weights)} weights of {weights / 1e6:.1f} MB"
    )
    yield (
        f"KV cache: {len(step.caches)} layers, blocks of {step.block_size} tokens and {step.bytes_per_block()} bytes"
    )
    calls = [call for call in program.steps if isinstance(call, KernelCall)]
    count = Counter(call.kernel for call in calls)
    yield f"kernels ({len(calls)} calls)"
    for number, spec in enumerate(program.kernels):
        yield f"  [{number}] {_kernel_name(spec)}  {count[number]} x"
    yield "schedule (call, kernel, what it computes; | waits for all threads)"
    for number, call in enumerate(calls):
        yield f"  {number:4d}  [{call.kernel}] {call.origin}{'  |' if call.sync_after else ''}"


# ---- export, env ---------------------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  llmopt export ./model model.engine --dtype bfloat16
  llmopt generate model.engine "import os" """
)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; an existing one is replaced.")],
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = None,
) -> None:
    """Compile a model and write program, weights and tokenizer to one file.

    The file runs without the model's Python code, transformers or Dynamo; its kernels are compiled where it is loaded.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder does not exist'}")
    if _is_program(model):
        raise InputError(f"{model} is a program file already")
    with _progress("loading and compiling"):
        options = _given(dtype=dtype, max_model_len=max_model_len, block_size=block_size)
        llmopt.export(model, out, **options)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command(epilog="Example: llmopt env --json")
def env(as_json: AsJson = False) -> None:
    """Print versions, compiler, instruction set, kernel cache and threads: what a report of a problem should hold."""
    found = _environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, setting in found.items():
        typer.echo(f"{name.ljust(width)}  {setting}")


def _environment() -> dict[str, Any]:
    import platform
    from importlib import metadata

    import torch

    from llmopt.codegen.cpu.toolchain import cache_folder, find_compiler, host_level
    from llmopt.compiler.errors import ToolchainError

    found: dict[str, Any] = {"llmopt": llmopt.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = platform.platform()
    found["instruction set"] = host_level().name
    try:
        compiler = find_compiler()
        found["compiler"] = f"{compiler.path}, {compiler.version}"
    except ToolchainError as error:
        found["compiler"] = f"none: {error}"
    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    found["kernel cache"] = f"{folder}, {size / 1e6:.1f} MB"
    found["threads"] = torch.get_num_threads()
    settings = {name: text for name, text in sorted(os.environ.items()) if name.startswith("LLMOPT_")}
    found["environment"] = (
        " ".join(f"{name}={text}" for name, text in settings.items()) or "no LLMOPT_* variable is set"
    )
    return found


def main() -> None:
    """The entry point `llmopt`."""
    # Generated text may hold what an old terminal's encoding cannot show; that must not end the program.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
