"""A model made ready to generate: its step program, kept true to the model's present weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from llmopt.compilation import CompiledStep, compile_step
from llmopt.compiler.input_embeddings import marked
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.huggingface import ModelInfo, describe
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.step_program import StepProgram
from llmopt.tracing import trace_forward


class ModelEngine:
    """The step program of one live module.

    The module's parameters stay its own. Before each generation they are looked up by name: replaced or edited weights
    are used as they are now, and another dtype, shape or layout compiles anew.

    Args:
        model: what to compile.
        options: for compilation and engine.
        report: gets an entry for each compiled graph.
        owned: nobody else has the module, so its weights stay what they are, and a later generation may use the keys
            and values of an earlier one. Otherwise each generation starts without: not every write to a weight can be
            seen. What an owned module's weights were transposed or merged from gives up its memory.
    """

    def __init__(self, model: torch.nn.Module, options: Options, report: Report, *, owned: bool = False) -> None:
        self.info: ModelInfo = describe(model)
        self.options, self.report, self._owned = options, report, owned
        self._compiled: dict[tuple[Any, ...], tuple[CompiledStep, list[str | torch.Tensor | None]]] = {}
        self._core: EngineCore | None = None

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt included."""
        limit = self.options.max_model_len
        return min(limit, self.info.max_model_len) if limit else self.info.max_model_len

    def _tensors(self) -> Mapping[str, torch.Tensor]:
        module = self.info.module
        return {
            **dict(module.named_buffers(remove_duplicate=False)),
            **dict(module.named_parameters(remove_duplicate=False)),
        }

    def program(self, prompt_embeds: bool = False) -> StepProgram:
        """The step program for the module's present dtype and structure, bound to its present weights.

        With `prompt_embeds`, or with the option `enable_prompt_embeds`, one whose tokens may be given as embeddings.
        Raises UnsupportedError for a module that cannot take them.
        """
        prompt_embeds = prompt_embeds or self.options.enable_prompt_embeds
        if self._owned and self._compiled:
            ((step, _),) = self._compiled.values()
            return step.program
        tensors = self._tensors()
        # Tied weights are one argument of the graph, so a tie that is broken later needs another graph.
        first: dict[int, str] = {}
        ties = [first.setdefault(id(t), name) for name, t in tensors.items()]
        layouts = ((name, t.dtype, t.device, tuple(t.shape), t.stride()) for name, t in tensors.items())
        signature = (prompt_embeds, *layouts, *ties)
        if signature not in self._compiled:
            self._compiled[signature] = self._compile(tensors, prompt_embeds)
        step, names = self._compiled[signature]
        current = [tensors.get(name) if isinstance(name, str) else name for name in names]
        step.bind(current, consume=self._owned)
        return step.program

    def _compile(
        self, tensors: Mapping[str, torch.Tensor], prompt_embeds: bool
    ) -> tuple[CompiledStep, list[str | torch.Tensor | None]]:
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        with marked(self.info.embedding) if prompt_embeds else contextlib.nullcontext():
            captured, arguments = trace_forward(self.info.forward, self.info.max_model_len - 1, device)
        by_identity = {id(tensor): name for name, tensor in tensors.items()}
        names: list[str | torch.Tensor | None] = []
        for index, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                names.append(None)
                continue
            name = by_identity.get(id(argument))
            names.append(name if name is not None else argument)
            captured.weights[index] = name or captured.weights[index]
        step = compile_step(captured, self.options, prompt_embeds=prompt_embeds)
        self.report.graphs.append(step.report)
        return step, names

    def core(self, fresh: bool = True) -> EngineCore:
        """The engine that runs requests; one for as long as the program stays the same.

        `fresh` brings it up to the module's present weights, and is for the start of a generation.
        """
        if self._core is not None and not fresh:
            return self._core
        program = self.program()
        if self._core is None or self._core.program is not program:
            self._core = EngineCore(program, self.info, self.options, self.max_model_len)
        elif not self._owned:
            self._core.reset_prefix_cache()
        return self._core
