"""llmopt: makes language-model inference fast, small and servable.

`torch.compile(model.forward, backend="llmopt")`, `llmopt.optimize(model)`, `llmopt.LLM(model).generate(...)`,
`llmopt.export(model, path)`, `llmopt.load(path)`, `llmopt.explain(model)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt import errors
    from llmopt.compiler.options import Options
    from llmopt.exporting import export, load
    from llmopt.llm import LLM, CompletionOutput, RequestOutput
    from llmopt.optimization import explain, optimize
    from llmopt.runtime.beam_search import BeamSearchParams
    from llmopt.runtime.sampling import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "llmopt.llm",
    "CompletionOutput": "llmopt.llm",
    "RequestOutput": "llmopt.llm",
    "SamplingParams": "llmopt.runtime.sampling",
    "StructuredOutputsParams": "llmopt.runtime.sampling",
    "BeamSearchParams": "llmopt.runtime.beam_search",
    "Options": "llmopt.compiler.options",
    "optimize": "llmopt.optimization",
    "explain": "llmopt.optimization",
    "export": "llmopt.exporting",
    "load": "llmopt.exporting",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Options",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "errors",
    "explain",
    "export",
    "load",
    "optimize",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that `import llmopt` costs nothing."""
    if name == "errors":
        return importlib.import_module("llmopt.errors")
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
