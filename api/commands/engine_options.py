"""The options of an engine, as options of the commands that make one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llmopt.commands.common import given

_OPTIONS: dict[str, Any] = {
    "dtype": Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16; auto keeps the model's own [auto]."),
    ],
    "threads": Annotated[int | None, typer.Option(help="CPU threads; 0 is PyTorch's number [0].")],
    "max_model_len": Annotated[
        int | None, typer.Option(help="Longest sequence, prompt included; 0 is the model's own limit [0].")
    ],
    "block_size": Annotated[int | None, typer.Option(help="Tokens in one page of the KV cache [16].")],
    "kv_cache_dtype": Annotated[
        str | None, typer.Option(help="How the KV cache stores keys and values: auto, fp8, int8 or int4 [auto].")
    ],
    "kv_cache_memory_bytes": Annotated[
        int | None, typer.Option(help="Memory of the KV cache; 0 leaves it to the fraction that follows [0].")
    ],
    "gpu_memory_utilization": Annotated[
        float | None, typer.Option(help="Fraction of the available memory that the KV cache may take [0.5].")
    ],
    "max_num_seqs": Annotated[int | None, typer.Option(help="Requests that are decoded together [16].")],
    "max_num_batched_tokens": Annotated[
        int | None, typer.Option(help="Most tokens of one step; longer prompts take several [2048].")
    ],
    "enable_prefix_caching": Annotated[
        bool | None,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Prompts that begin alike share what they have in common [True].",
        ),
    ],
    "batch_invariant": Annotated[
        bool | None,
        typer.Option("--batch-invariant", help="The same text alone and in any batch; prompts take longer [False]."),
    ],
}


def takes_engine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the named options of an engine, by default all.

    The command gets those that the user has set as one dict, its argument `engine`.
    """
    chosen = names or tuple(_OPTIONS)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            engine = {name: arguments.pop(name) for name in chosen}
            command(engine=given(**engine), **arguments)

        # typer reads what a command takes from its signature: the options stand where `engine` does.
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "engine":
                parameters += [parameter.replace(name=name, annotation=_OPTIONS[name], default=None) for name in chosen]
            else:
                parameters.append(parameter)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
