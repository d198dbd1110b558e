"""`llmopt generate`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import llmopt
from llmopt.commands.common import (
    AsJson,
    Model,
    check_for_program,
    complain,
    given,
    is_program,
    progress,
)
from llmopt.commands.engine_options import takes_engine_options
from llmopt.compiler.errors import InputError

if TYPE_CHECKING:
    from llmopt.llm import LLM, CompletionOutput, RequestOutput
    from llmopt.runtime.adapters import LoRARequest
    from llmopt.runtime.outputs import PositionLogprobs
    from llmopt.runtime.sampling import SamplingParams

EPILOG = """Examples:

\b
  llmopt generate ./model "def fib(n):" --max-tokens 64 --temperature 0
  llmopt generate ./model --prompt-file prompt.txt --stream
  echo "import os" | llmopt generate ./model --prompt-file - --json
  llmopt generate model.engine "One" "Two" --stop END --seed 7
  llmopt generate ./model "A person:" --json-schema person.json --max-tokens 200"""


@takes_engine_options()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")] = None,
    prompt_file: Annotated[
        list[str] | None, typer.Option(help="A file that is one prompt, - for stdin; may be repeated.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate [16].")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="No end before so many tokens [0].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [1.0].")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus: the likeliest tokens up to this probability [1.0].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="The k likeliest tokens; 0 is all [0].")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest [0.0].")] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="The most typical tokens up to this probability [1.0].")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Against tokens that were generated before, once each [0.0].")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Against tokens that were generated before, once for each time [0.0].")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divides the logits of tokens of prompt and output [1.0].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable [None].")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Continuations of each prompt [1].")] = None,
    best_of: Annotated[
        int | None, typer.Option(help="Generate so many, print the --n likeliest; not with --stream [None].")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Keep the stop text that was found.")
    ] = False,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never generate this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on at the end of sequence.")] = False,
    skip_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--skip-special-tokens/--no-skip-special-tokens", help="Leave special tokens out of the text [True]."
        ),
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log probabilities of so many likeliest tokens [None].")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE", help="Output that is JSON of this schema; - for stdin.")
    ] = None,
    json_object: Annotated[bool, typer.Option("--json-object", help="Output that is any JSON object.")] = False,
    regex: Annotated[str | None, typer.Option(help="Output that matches this regular expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Output that is one of these; may be repeated.")] = None,
    grammar: Annotated[
        str | None, typer.Option(metavar="FILE", help="Output of this grammar, Lark or GBNF; - for stdin.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Generate with this LoRA adapter, a folder that PEFT saved.")
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="With --lora: largest rank there is room for [16].")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    *,
    engine: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Continue one or more prompts.

    Prints the continuations; where there are several each has a heading. --json prints one object per continuation and
    line (with --stream: per token). A folder's generation_config.json comes before the defaults in brackets. The exit
    status is 1 when a prompt failed while it ran.
    """
    texts = [*(prompts or []), *map(_read, prompt_file or [])]
    if not texts:
        raise InputError("no prompt: give one as argument or by --prompt-file")
    if stream and (len(texts) > 1 or (n or 1) > 1) and not as_json:
        count = f"{len(texts)} prompts, {n or 1} continuations"
        raise InputError(f"--stream prints one continuation, got {count}; --stream --json tells them apart")
    if logprobs is not None and (not as_json or stream):
        raise InputError(f"--logprobs {logprobs} is for --json without --stream, where they are printed")
    options = engine | given(
        max_lora_rank=max_lora_rank, enable_lora=True if lora is not None and not is_program(model) else None
    )
    check_for_program(model, options)
    adapter = llmopt.LoRARequest(Path(lora).name or lora, lora) if lora is not None else None
    structure = given(
        json=_read(json_schema) if json_schema is not None else None,
        json_object=json_object or None,
        regex=regex,
        choice=tuple(choice) if choice else None,
        grammar=_read(grammar) if grammar is not None else None,
    )
    chosen = given(
        n=n,
        best_of=best_of,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
        stop_token_ids=tuple(stop_token_id) if stop_token_id else None,
        include_stop_str_in_output=include_stop_str_in_output or None,
        bad_words=tuple(bad_word) if bad_word else None,
        ignore_eos=ignore_eos or None,
        skip_special_tokens=skip_special_tokens,
        logprobs=logprobs,
    )
    with progress("loading"):
        if structure:
            chosen["structured_outputs"] = llmopt.StructuredOutputsParams(**structure)
        # What is wrong with any model is said before one is loaded; how many tokens is the folder's to say, too.
        llmopt.SamplingParams(**{"max_tokens": None, **chosen})
        llm = llmopt.LLM(model, **options)
        sampling = llm.get_default_sampling_params().replace(**chosen)
    if stream:
        _stream(llm, texts, sampling, adapter, as_json)
        return
    with progress("compiling and generating"):
        results = llm.generate(texts, sampling, lora_request=adapter)
    _print(results, as_json)


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _print(results: list[RequestOutput], as_json: bool) -> None:
    failed = False
    several = len(results) > 1, any(len(result.outputs) > 1 for result in results)
    for number, result in enumerate(results):
        for output in result.outputs:
            if as_json:
                typer.echo(json.dumps(_record(number, result, output)))
            else:
                names = (f"prompt {number + 1}", f"continuation {output.index + 1}")
                title = ", ".join(name for name, wanted in zip(names, several, strict=True) if wanted)
                if title:
                    typer.echo(f"{'' if number == output.index == 0 else os.linesep}==> {title} <==")
                typer.echo(output.text)
            if output.error is not None:
                failed = True
                complain(f"prompt {number + 1} failed: {output.error}")
    if failed:
        raise typer.Exit(1)


def _record(number: int, result: RequestOutput, output: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": number,
        "sequence": output.index,
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_token_ids,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.error is not None:
        record["error"] = output.error
    if output.logprobs is not None:
        record["logprobs"] = [_position(position) for position in output.logprobs]
    return record


def _position(position: PositionLogprobs) -> list[dict[str, Any]]:
    return [{"token_id": token, **vars(entry)} for token, entry in position.items()]


def _stream(llm: LLM, texts: list[str], sampling: SamplingParams, adapter: LoRARequest | None, as_json: bool) -> None:
    failed = False
    for chunk in llm.stream(texts, sampling, lora_request=adapter):
        if as_json:
            typer.echo(json.dumps(vars(chunk)))
        else:
            typer.echo(chunk.text, nl=False)
        sys.stdout.flush()
        if chunk.error is not None:
            failed = True
            complain(f"prompt {chunk.index + 1} failed: {chunk.error}")
    if not as_json:
        typer.echo()
    if failed:
        raise typer.Exit(1)
