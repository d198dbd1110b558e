"""A graph compiled for the caller's own arguments: what the torch.compile backend hands back to Dynamo."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from llmopt.codegen.lower import Lowered
from llmopt.runtime.cuda_executable import make_executable
from llmopt.runtime.weights import WeightBinder


class CompiledGraph:
    """Runs a lowered graph on the arguments that Dynamo passes at each call, weights among them.

    `constants` are the graph's further arguments.
    Calls are serialised: one graph has one arena.
    """

    def __init__(
        self, graph: fx.Graph, lowered: Lowered, constants: Sequence[torch.Tensor] = (), threads: int = 0
    ) -> None:
        self.lowered = lowered
        self._constants = list(constants)
        self.executable = make_executable(lowered.program, threads)
        self.binder = WeightBinder(graph, lowered.weights)
        self._bound: list[int] | None = None
        self._lock = threading.Lock()

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        """The graph's results, in order."""
        arguments = [*arguments, *self._constants]
        with self._lock, torch.no_grad():
            weights = self.binder.resolve(arguments)
            pointers = [w.data_ptr() for w in weights]
            if pointers != self._bound:
                self.executable.bind(weights)
                self._bound = pointers
            return self.executable(arguments)
