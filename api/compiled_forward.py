"""What `optimize` puts in the place of a model's forward, and whether a graph of the class's forward would be the same.

Whoever compiles a step program takes the forward of the model's class. A call of the model may do more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llmopt.backend import make_backend

if TYPE_CHECKING:
    from llmopt.optimization import OptimizedState


def named_like(wrapper: Any, original: Any) -> None:
    """Gives an object the name and signature of what it wraps, for whoever looks which arguments that takes.

    Annotations are left out: they may be what cannot be pickled.
    """
    functools.update_wrapper(wrapper, original, ("__module__", "__name__", "__qualname__", "__doc__"), ())


class CompiledForward:
    """The forward of an optimized model.

    An object and no function, because copying a function does not copy it: a copy of the model would go on with the
    weights of the original. A copied or unpickled one compiles the forward of its own model.

    Args:
        state: of the model; `state.forward` is what is compiled.
    """

    def __init__(self, state: OptimizedState) -> None:
        self._state = state
        self._compile()

    def _compile(self) -> None:
        state = self._state
        named_like(self, state.forward)
        backend = make_backend(state.options, state.report)
        self.run: Callable[..., Any] = torch.compile(state.forward, backend=backend, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self._state = kept["_state"]
        self._compile()

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the model had before."""
        return self._state.forward


def beyond_the_class(model: torch.nn.Module) -> str | None:
    """What a call of the model does besides the forward of its class, None for nothing.

    Only of the module itself: hooks and forwards of the modules inside are part of what is captured.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        return "the model has forward hooks"
    forward = vars(model).get("forward")
    if isinstance(forward, CompiledForward):
        forward = forward.original
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        return "the model's forward was replaced by another"
    return None


def code_inside(model: torch.nn.Module) -> list[Any]:
    """Hooks, replaced forwards and training modes of the modules inside: with others, another graph is captured."""
    found: list[Any] = []
    for name, module in model.named_modules():
        # The keys of hooks are numbers that PyTorch gives only once.
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        forward = vars(module).get("forward") if module is not model else None
        if hooks or forward is not None or module.training:
            found.append((name, hooks, forward, module.training))
    return found
