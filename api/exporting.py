"""Writing a compiled model to a file, and reading one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.llm import LLM


def export(model: torch.nn.Module | LLM | str | Path, path: str | Path, tokenizer: Any = None, **options: Any) -> None:
    """Compiles a model's step program and writes it, with weights and tokenizer, to one safetensors file.

    Args:
        model: a module, which stays as it is also where `dtype` is another; the path of a Hugging Face folder; or an
            LLM that was made from either.
        path: where to write; an existing file is replaced only once the new one is complete.
        tokenizer: as for LLM; an LLM has its own.
        options: the fields of `llmopt.Options`; an LLM has its own.

    Raises UnsupportedError for a model that cannot run over a paged KV cache or has ops without a kernel, and
    InputError for a tokenizer or options beside an LLM.
    """
    if isinstance(model, LLM):
        if tokenizer is not None or options:
            name = "a tokenizer" if tokenizer is not None else min(options)
            raise InputError(f"{name} cannot be given with an LLM, which has been made with its own")
        model.export(path)
        return
    dtype = Options.make(options).torch_dtype
    if isinstance(model, torch.nn.Module) and dtype is not None:
        model = _cast_copy(model, dtype)
    LLM(model, tokenizer, **options).export(path)


def _cast_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """As `copy.deepcopy(model).to(dtype)`, but only what is cast takes memory: the copy shares the other tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        memo[id(tensor)] = torch.nn.Parameter(cast, False) if isinstance(tensor, torch.nn.Parameter) else cast
    return copy.deepcopy(model, memo)


def load(path: str | Path, **options: Any) -> LLM:
    """An LLM from a file that `export` wrote. Needs neither the model's Python code nor transformers nor Dynamo.

    Raises InputError for what is no file, and ProgramFileError for a file that is damaged or made by an incompatible
    version.
    """
    if not Path(path).is_file():
        kind = "is a folder; llmopt.LLM takes one" if Path(path).is_dir() else "does not exist"
        raise InputError(f"{path} {kind}")
    return LLM(Path(path), **options)
