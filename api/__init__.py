"""llmopt: makes language-model inference fast, small and servable.

`torch.compile(model.forward, backend="llmopt")`, `llmopt.optimize(model)`, `llmopt.LLM(model).generate(...)`,
`llmopt.export(model, path)`, `llmopt.load(path)`, `llmopt.explain(model)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt import errors
    from llmopt.async_llm import AsyncLLM
    from llmopt.codegen.cpu.registry import register_kernel, unregister_kernel
    from llmopt.compiler.opspec import register_op
    from llmopt.compiler.options import Options
    from llmopt.compiler.pass_manager import Pass
    from llmopt.explaining import explain
    from llmopt.exporting import export, load
    from llmopt.llm import LLM
    from llmopt.optimization import optimize
    from llmopt.passes.pipeline import register_pass, unregister_pass
    from llmopt.runtime.adapters import LoRARequest
    from llmopt.runtime.beam_search import BeamSearchParams
    from llmopt.runtime.outputs import CompletionOutput, RequestOutput
    from llmopt.runtime.sampling import RequestOutputKind, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

_HOME = {
    "AsyncLLM": "llmopt.async_llm",
    "LLM": "llmopt.llm",
    "CompletionOutput": "llmopt.runtime.outputs",
    "RequestOutput": "llmopt.runtime.outputs",
    "RequestOutputKind": "llmopt.runtime.sampling",
    "SamplingParams": "llmopt.runtime.sampling",
    "StructuredOutputsParams": "llmopt.runtime.sampling",
    "BeamSearchParams": "llmopt.runtime.beam_search",
    "LoRARequest": "llmopt.runtime.adapters",
    "Options": "llmopt.compiler.options",
    "optimize": "llmopt.optimization",
    "explain": "llmopt.explaining",
    "export": "llmopt.exporting",
    "load": "llmopt.exporting",
    "Pass": "llmopt.compiler.pass_manager",
    "register_kernel": "llmopt.codegen.cpu.registry",
    "register_op": "llmopt.compiler.opspec",
    "register_pass": "llmopt.passes.pipeline",
    "unregister_kernel": "llmopt.codegen.cpu.registry",
    "unregister_pass": "llmopt.passes.pipeline",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "LoRARequest",
    "Options",
    "Pass",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "errors",
    "explain",
    "export",
    "load",
    "optimize",
    "register_kernel",
    "register_op",
    "register_pass",
    "unregister_kernel",
    "unregister_pass",
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
