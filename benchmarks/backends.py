"""Backends of torch.compile that are compared. None has anything of it loaded before its turn, llmopt included."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

# Arguments of torch.compile for each peer; None is the model as it is. OpenVINO without `aot_autograd` takes weights as
# arguments of each call and fails on ViT and Llama; where a processor has bfloat16 arithmetic, it would choose that for
# a float32 model, too.
BACKENDS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "dynamo": {"backend": "eager"},  # captures and compiles nothing: what every backend has of the capture
    "inductor": {"backend": "inductor"},
    # Weights as constants, folded and packed when the model is compiled: Inductor's setting for inference on a CPU.
    "inductor-freezing": {"backend": "inductor", "options": {"freezing": True}},
    "inductor-max-autotune": {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
    "openvino": {
        "backend": "openvino",
        "options": {"aot_autograd": True, "config": {"INFERENCE_PRECISION_HINT": "f32"}},
    },
    "llmopt": {"backend": "llmopt"},
}
_MODULES = {"dynamo": "torch._dynamo.backends.debugging", "openvino": "openvino.torch", "llmopt": "llmopt.backend"}


def import_backend(name: str) -> None:
    """Loads the modules that a peer's first call would load; OpenVINO's backend is only known after that.

    Raises ImportError where the peer is not installed.
    """
    if BACKENDS[name] is None:
        return
    importlib.import_module("torch._dynamo")
    importlib.import_module(_MODULES.get(name, "torch._inductor.compile_fx"))
    if name == "openvino":
        _refuse_openvino_fallbacks()


class _Raise(logging.Handler):
    """Makes an error of a log message about one."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "failed" in message.lower():
            raise RuntimeError(message)


def _refuse_openvino_fallbacks() -> None:
    """OpenVINO's backend runs what it fails on in Inductor or PyTorch, and tells so in its debug log alone."""
    for module in ("backend", "execute"):
        logger = logging.getLogger(f"openvino.frontend.pytorch.torchdynamo.{module}")
        logger.setLevel(logging.DEBUG)
        if not any(isinstance(handler, _Raise) for handler in logger.handlers):
            logger.addHandler(_Raise())


def _refuse_dynamo_fallbacks() -> None:
    """Models of transformers share the code that is captured, and beyond a number of captures of one code Dynamo runs
    it as it is, with no more than a warning."""
    from torch._dynamo import config

    config.recompile_limit = 64
    config.fail_on_recompile_limit_hit = True


def _settings(name: str) -> contextlib.AbstractContextManager[object]:
    """What a peer needs beside its arguments: Dynamo takes weights for constants where the global setting says so."""
    if name != "inductor-freezing":
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(freezing=True)


def compiled_forward(model: torch.nn.Module, name: str) -> Callable[..., Any]:
    """The model's forward as a peer of `BACKENDS` runs it, with static shapes, which all of them do best with.

    Only without gradients: with them "inductor-freezing" freezes nothing, and does not say so. A peer that is not
    installed raises at its first call, as one that fails does.
    """
    arguments = BACKENDS[name]
    if arguments is None:
        return model
    compiled: list[Callable[..., Any]] = []

    def forward(**inputs: Any) -> Any:
        if not compiled:
            import_backend(name)
            _refuse_dynamo_fallbacks()
            if name == "openvino":
                arguments["options"]["config"]["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
            compiled.append(torch.compile(model.forward, dynamic=False, **arguments))
        with _settings(name):
            return compiled[0](**inputs)

    return forward
