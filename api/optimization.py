"""`llmopt.optimize`: a model in, the same model out, with a compiled forward and a fast `generate`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar, overload

import torch

from llmopt.compiled_forward import CompiledForward
from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.generate_router import GenerateRouter
from llmopt.huggingface import is_pretrained

T = TypeVar("T")
_STATE = "_llmopt"


class OptimizedState:
    """What `optimize` keeps on a model: options, the report, and the engine once `generate` was called.

    A copy of the model has the same options, and compiles for itself.
    """

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        self.options, self.report = options, Report()
        self.forward = model.forward
        self._model = model
        self._engine: ModelEngine | None = None
        self._lock = threading.Lock()

    def engine(self) -> ModelEngine:
        """The step program's engine; raises UnsupportedError for a model that has none."""
        with self._lock:
            if self._engine is None:
                self._engine = ModelEngine(self._model, self.options, self.report)
            return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "forward": self.forward, "_model": self._model}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, report=Report(), _engine=None, _lock=threading.Lock())


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

    A copy of the model (`copy.deepcopy`, pickle) is optimized with the same options and has its own weights.

    As a decorator, `@llmopt.optimize` or `@llmopt.optimize(dtype="bfloat16")`, over a model class (every instance is
    optimized) or over a function that returns a model.

    Args:
        target: a module, a class of modules, or a function that returns a module; None makes a decorator.
        options: the fields of `llmopt.Options`.

    Raises OptionError for unknown options or values, InputError for a target that is none of the above and for a module
    that was optimized with other options before.
    """
    settings = Options.make(options)
    if target is None:
        return lambda inner: optimize(inner, **options)
    if isinstance(target, torch.nn.Module):
        return _optimize_module(target, settings, options)
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _optimize_class(target, settings, options)
    if callable(target):

        @functools.wraps(target)
        def build(*args: Any, **kwargs: Any) -> Any:
            return _optimize_module(target(*args, **kwargs), settings, options)

        return build
    raise InputError(
        f"optimize takes a torch.nn.Module, a class of them or a function that returns one, got {target!r}"
    )


def _optimize_class(cls: type[torch.nn.Module], settings: Options, given: Collection[str]) -> type[torch.nn.Module]:
    original = cls.__init__

    @functools.wraps(original)
    def initialize(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A subclass that calls this one is not complete yet; its instances are its own business.
        if type(self) is cls:
            _optimize_module(self, settings, given)

    cls.__init__ = initialize  # type: ignore[method-assign]
    return cls


def _optimize_module(model: Any, settings: Options, given: Collection[str]) -> torch.nn.Module:
    """`given` are the names of the settings that were asked for; the others may stay as they are."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if (before := state_of(model)) is not None:
        for name in given:
            if (old := getattr(before.options, name)) != (new := getattr(settings, name)):
                raise InputError(f"the model was optimized with {name}={old!r} already, not with {new!r}")
        return model
    if settings.torch_dtype is not None:
        model.to(settings.torch_dtype)
    state = OptimizedState(model, settings)
    vars(model)[_STATE] = state
    model.forward = CompiledForward(state)
    if is_pretrained(model) and hasattr(model, "generate"):
        vars(model)["generate"] = GenerateRouter(model, state)
    return model


def state_of(model: torch.nn.Module) -> OptimizedState | None:
    """What `optimize` keeps on a model, None for one that it has not seen."""
    state = vars(model).get(_STATE)
    return state if isinstance(state, OptimizedState) else None
