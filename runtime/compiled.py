"""A graph compiled for the caller's own arguments: what the torch.compile backend hands back to Dynamo."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen.program import Program
from llmopt.runtime.cuda_executable import make_executable
from llmopt.runtime.weights import WeightBinder


class CompiledGraph:
    """Runs a program on the arguments that Dynamo passes at each call, weights among them.

    Calls are serialised: one program has one arena.

    Args:
        program: what to run.
        graph, weights: say how its weights are made of the arguments; see `WeightBinder`.
        constants: the graph's further arguments.
        threads, huge_pages: see `Executable`.
        device: where a program for a GPU runs.
        checks: messages of the last results, which are no results but must be true.
    """

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        weights: Sequence[Node],
        constants: Sequence[torch.Tensor] = (),
        threads: int = 0,
        huge_pages: bool = False,
        device: torch.device | None = None,
        checks: Sequence[str] = (),
    ) -> None:
        self._constants, self._checks = list(constants), list(checks)
        self.executable = make_executable(program, threads, device, huge_pages)
        self.binder = WeightBinder(graph, weights)
        self._bound: list[int] | None = None
        self._lock = threading.Lock()

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        """The graph's results, in order; raises RuntimeError where a check of the caller's own fails."""
        arguments = [*arguments, *self._constants]
        with self._lock, torch.no_grad():
            weights = self.binder.resolve(arguments)
            pointers = [w.data_ptr() for w in weights]
            if pointers != self._bound:
                self.executable.bind(weights)
                self._bound = pointers
            results = self.executable(arguments)
        for message in reversed(self._checks):
            if not results.pop():
                raise RuntimeError(message)
        return results
