"""The command line: `llmopt generate`, `explain`, `bisect`, `repro`, `export`, `env`.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the file system refused, 2 a mistake in
what was asked (every `LlmoptError`), 130 interrupted. Whatever is slow to import is imported inside the command that
needs it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import llmopt
from llmopt.commands import bisect as bisecting
from llmopt.commands import explain as explaining
from llmopt.commands import repro as reproducing
from llmopt.commands.common import (
    AsJson,
    BlockSize,
    Dtype,
    MaxModelLen,
    Model,
    Threads,
    check_for_program,
    complain,
    given,
    is_program,
    progress,
)
from llmopt.compiler.errors import InputError, LlmoptError

if TYPE_CHECKING:
    from llmopt.llm import LLM, RequestOutput
    from llmopt.runtime.sampling import SamplingParams


class _Commands(typer.core.TyperGroup):
    """Turns llmopt's own errors into one line; what is a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlmoptError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # typer ends quietly when the reader of a pipe has gone
        except OSError as error:
            complain(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="llmopt",
    cls=_Commands,
    help="Makes language-model inference fast. MODEL is a Hugging Face folder or a file that `llmopt export` wrote.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    options = given(dtype=dtype, threads=threads, max_model_len=max_model_len, block_size=block_size)
    check_for_program(model, options)
    chosen = given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop) if stop else None,
    )
    with progress("loading"):
        sampling = llmopt.SamplingParams(**chosen, ignore_eos=ignore_eos)
        llm = llmopt.LLM(model, **options)
    if stream:
        _stream(llm, texts, sampling, as_json)
        return
    with progress("compiling and generating"):
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


# ---- explain, bisect, repro ----------------------------------------------------------------------------------------

app.command(epilog=explaining.EPILOG)(explaining.explain)
app.command(epilog=bisecting.EPILOG, context_settings=bisecting.CONTEXT)(bisecting.bisect)
app.command(epilog=reproducing.EPILOG, context_settings=reproducing.CONTEXT)(reproducing.repro)


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
    if is_program(model):
        raise InputError(f"{model} is a program file already")
    with progress("loading and compiling"):
        options = given(dtype=dtype, max_model_len=max_model_len, block_size=block_size)
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

    from llmopt.codegen.cpu.object_cache import cache_folder
    from llmopt.codegen.cpu.toolchain import find_compiler, host_level
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
