"""Writing a compiled model to a file, and reading one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmopt.llm import LLM


def export(model: torch.nn.Module | LLM | str | Path, path: str | Path, tokenizer: Any = None, **options: Any) -> None:
    """Compiles a model's step program and writes it, with weights and tokenizer, to one safetensors file.

    Args:
        model: a module, the path of a Hugging Face folder, or an LLM that was made from either.
        path: where to write; an existing file is replaced only once the new one is complete.
        tokenizer: as for LLM.
        options: the fields of `llmopt.Options`.

    Raises UnsupportedError for a model that cannot run over a paged KV cache or has ops without a kernel.
    """
    llm = model if isinstance(model, LLM) else LLM(model, tokenizer, **options)
    llm.export(path)


def load(path: str | Path, **options: Any) -> LLM:
    """An LLM from a file that `export` wrote. Needs neither the model's Python code nor transformers nor Dynamo.

    Raises ProgramFileError for a file that is damaged or made by an incompatible version.
    """
    return LLM(Path(path), **options)
