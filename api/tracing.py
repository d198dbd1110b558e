"""Captures a model's cache-less forward without running it."""

from __future__ import annotations

import types
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from llmopt.compiler.capture import Captured, capture
from llmopt.compiler.errors import UnsupportedError

Forward = Callable[[torch.Tensor], torch.Tensor]


class _Done(Exception):
    """Leaves the compiled call once the graph is in hand."""


def trace_forward(forward: Forward, length: int, device: torch.device | str = "cpu") -> tuple[Captured, list[Any]]:
    """The graph of `forward(input_ids[1, S]) -> logits[1, S, V]` with S symbolic, and its arguments.

    Dynamo works on fake tensors and the result is never run, so `length` costs nothing. It should be the longest
    sequence that the model takes: a sliding window shows in the graph only if the prompt is longer than the window.

    `device` is the model's.

    Raises UnsupportedError when the model breaks the graph or cannot be traced, with Dynamo's reason.
    """
    found: list[tuple[Captured, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        found.append((captured, [*example_inputs, *captured.constants]))

        def stop(*_: Any) -> Any:
            raise _Done

        return stop

    def template(ids: torch.Tensor) -> torch.Tensor:
        return forward(ids)

    # A code object of its own, and a name that no other ever had: Dynamo counts recompilations by the one, and by the
    # other it remembers which numbers differ from call to call, to make them arguments. Other models have passed here.
    code = template.__code__.replace(co_name=f"forward_{uuid.uuid4().hex}")
    fresh = types.FunctionType(code, template.__globals__, "forward", None, template.__closure__)
    ids = torch.zeros((1, max(2, length)), dtype=torch.int64, device=device)
    torch._dynamo.mark_dynamic(ids, 1)
    try:
        with torch.no_grad():
            torch.compile(fresh, backend=backend, fullgraph=True)(ids)
    except _Done:
        pass
    except torch._dynamo.exc.BackendCompilerFailed as error:
        cause = error.inner_exception
        if isinstance(cause, UnsupportedError):
            raise cause from cause.__cause__
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedError(f"the model cannot be captured as one graph: {reason}") from error
    if not found:
        raise UnsupportedError("the model's forward computes nothing that depends on its input")
    return found[0]
