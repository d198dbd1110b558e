"""Small modules as captured graphs: what the tests of the compiler and of the passes start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from llmopt.compiler.capture import Captured, capture
from llmopt.compiler.graph import placeholders

Function = Callable[..., Any]


class Caught:
    """A captured graph with the arguments, in the order of its placeholders, that it was captured on."""

    def __init__(self, captured: Captured, arguments: Sequence[Any]) -> None:
        self.captured, self.arguments = captured, list(arguments)

    @property
    def graph(self) -> fx.Graph:
        return self.captured.graph

    def run(self, arguments: Sequence[Any] | None = None) -> list[Any]:
        """Runs the graph node by node in PyTorch."""
        given = self.arguments if arguments is None else arguments
        with torch.no_grad():
            return list(fx.Interpreter(fx.GraphModule({}, self.graph)).run(*given))


def catch(
    function: Function, *args: Any, dynamic: bool | None = None, marked: Sequence[tuple[int, int]] = ()
) -> Caught:
    """Captures `function(*args)`, a module or a function, as the backend would.

    marked: (argument, dimension) pairs of symbolic size; `dynamic=True` makes everything symbolic.
    """
    caught: list[Caught] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        captured = capture(gm, example_inputs)
        mark_weights(captured)
        caught.append(Caught(captured, [*example_inputs, *captured.constants]))
        return gm.forward

    args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)  # marks stay on a tensor
    for argument, dim in marked:
        torch._dynamo.mark_dynamic(args[argument], dim)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (only,) = caught
    return only


def mark_weights(captured: Captured) -> None:
    """As the stages above capture do: a parameter that nobody writes is a weight."""
    for index, node in enumerate(placeholders(captured.graph)):
        if index not in captured.mutations:
            node.meta["weight"] = captured.weights[index]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters far from their initial values, so that a lost one shows; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return module.eval()
