"""`llmopt.optimize`: a model in, the same model out, with a compiled forward and a fast `generate`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import torch

from llmopt.backend import make_backend
from llmopt.compiler.errors import InputError, LlmoptError, UnsupportedError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.generate_router import GenerateRouter
from llmopt.huggingface import is_pretrained

log = logging.getLogger(__name__)

T = TypeVar("T")
_STATE = "_llmopt"


class OptimizedState:
    """What `optimize` keeps on a model: options, the report, and the engine once `generate` was called."""

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        self.options, self.report = options, Report()
        self.forward = model.forward
        self._model = model
        self._engine: ModelEngine | None = None
        self._refused: LlmoptError | None = None

    def engine(self) -> ModelEngine:
        """The step program's engine; raises UnsupportedError again if it was refused once."""
        if self._refused is not None:
            raise self._refused
        if self._engine is None:
            try:
                self._engine = ModelEngine(self._model, self.options, self.report)
            except UnsupportedError as error:
                self._refused = error
                raise
        return self._engine


@overload
def optimize(target: torch.nn.Module, **options: Any) -> torch.nn.Module: ...
@overload
def optimize(target: Callable[..., T], **options: Any) -> Callable[..., T]: ...
@overload
def optimize(target: None = None, **options: Any) -> Callable[[T], T]: ...


def optimize(target: Any = None, **options: Any) -> Any:
    """Makes a model fast, in place.

    `optimize(model)` compiles `model.forward` with the llmopt backend and, for a transformers model, sends
    `model.generate` to a step program over a paged KV cache. The model stays what it was: its parameters, `state_dict`
    and class are untouched, and edited weights take effect at the next call.

    As a decorator, `@llmopt.optimize` or `@llmopt.optimize(dtype="bfloat16")`, over a model class (every instance is
    optimized) or over a function that returns a model.

    Args:
        target: a module, a class of modules, or a function that returns a module; None makes a decorator.
        options: the fields of `llmopt.Options`.

    Raises OptionError for unknown options or values, InputError for a target that is none of the above.
    """
    settings = Options.make(options)
    if target is None:
        return lambda inner: optimize(inner, **options)
    if isinstance(target, torch.nn.Module):
        return _optimize_module(target, settings)
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _optimize_class(target, settings)
    if callable(target):

        @functools.wraps(target)
        def build(*args: Any, **kwargs: Any) -> Any:
            return _optimize_module(target(*args, **kwargs), settings)

        return build
    raise InputError(
        f"optimize takes a torch.nn.Module, a class of them or a function that returns one, got {target!r}"
    )


def _optimize_class(cls: type[torch.nn.Module], settings: Options) -> type[torch.nn.Module]:
    original = cls.__init__

    @functools.wraps(original)
    def initialize(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A subclass that calls this one is not complete yet; its instances are its own business.
        if type(self) is cls:
            _optimize_module(self, settings)

    cls.__init__ = initialize  # type: ignore[method-assign]
    return cls


def _optimize_module(model: Any, settings: Options) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if _STATE in vars(model):
        return model
    if settings.torch_dtype is not None:
        model.to(settings.torch_dtype)
    state = OptimizedState(model, settings)
    vars(model)[_STATE] = state
    backend = make_backend(settings, state.report)
    model.forward = torch.compile(state.forward, backend=backend, dynamic=True)
    if is_pretrained(model) and hasattr(model, "generate"):
        router = GenerateRouter(model, state)
        vars(model)["generate"] = functools.wraps(cast(Any, model.generate))(router)
    return model


def state_of(model: torch.nn.Module) -> OptimizedState | None:
    """What `optimize` keeps on a model, None for one that it has not seen."""
    state = vars(model).get(_STATE)
    return state if isinstance(state, OptimizedState) else None
