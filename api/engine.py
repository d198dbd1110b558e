"""A model made ready to generate: its step program, kept true to the model's present weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmopt.compilation import CompiledStep, compile_step, kept_step
from llmopt.compiled_forward import beyond_the_class, code_inside
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.input_embeddings import marked
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.graph_key import step_key
from llmopt.huggingface import ModelInfo, describe, implementations
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.step_program import StepProgram
from llmopt.step_cache import Source
from llmopt.tracing import trace_forward


class ModelEngine:
    """The step program of one live module.

    The module's parameters stay its own. Before each generation they are looked up by name: replaced or edited weights
    are used as they are now, and another dtype, shape or layout compiles anew, as do other hooks on modules inside.
    Only the latest program is kept, because each has copies of the weights that kernels want in another layout.
    Threads may share an engine.

    Args:
        model: what to compile.
        options: for compilation and engine.
        report: gets an entry for each compiled graph.
        source: makes the same module again, for one that llmopt has made itself. Nobody else has it then, so its
            weights stay what they are, and a later generation may use the keys and values of an earlier one. Otherwise
            each generation starts without: not every write to a weight can be seen. What such a module's weights were
            transposed or merged from gives up its memory, and its step program is kept for later processes.

    Raises UnsupportedError for a module whose calls do more than the forward of its class.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: Options,
        report: Report,
        *,
        source: Callable[[], torch.nn.Module] | None = None,
    ) -> None:
        self.info: ModelInfo = describe(model)
        self.options, self.report = options, report
        self._source, self._owned = source, source is not None
        # With and without embeddings: the latest step program, or why there is none, and what it was made for.
        self._latest: dict[bool, tuple[list[Any], CompiledStep | UnsupportedError]] = {}
        self._core: EngineCore | None = None
        self._lock = threading.RLock()
        self._check_forward()

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
        with self._lock:
            if self._owned and prompt_embeds in self._latest:
                return self._step(prompt_embeds, self._latest[prompt_embeds][0]).program
            self._check_forward()
            tensors = self._tensors()
            step = self._step(prompt_embeds, self._signature(tensors))
            step.bind(tensors, consume=self._owned)
            return step.program

    def _check_forward(self) -> None:
        if more := beyond_the_class(self.info.module):
            raise UnsupportedError(f"{more}, and a step program has only the forward of its class")

    def _signature(self, tensors: Mapping[str, torch.Tensor]) -> list[Any]:
        """What a step program is made for, besides the options."""
        # Tied weights are one argument of the graph, so a tie that is broken later needs another graph.
        first: dict[int, str] = {}
        ties = [first.setdefault(id(t), name) for name, t in tensors.items()]
        layouts = [(name, t.dtype, t.device, tuple(t.shape), t.stride()) for name, t in tensors.items()]
        return [layouts, ties, code_inside(self.info.module), implementations(self.info.module)]

    def _step(self, prompt_embeds: bool, signature: list[Any]) -> CompiledStep:
        """The step program of that signature; one that was refused is refused again, without another look."""
        made_for, step = self._latest.get(prompt_embeds, (None, None))
        if step is None or made_for != signature:
            try:
                step = self._kept_or_compiled(prompt_embeds)
            except UnsupportedError as error:
                # Without its cause and traceback, which hold the frames of the compilation.
                refusal = UnsupportedError(error.reason, operation=error.operation, location=error.location)
                self._latest[prompt_embeds] = signature, refusal
                raise
            self.report.graphs.append(step.report)
            self._latest[prompt_embeds] = signature, step
        if isinstance(step, UnsupportedError):
            raise step.with_traceback(None)
        return step

    def _kept_or_compiled(self, prompt_embeds: bool) -> CompiledStep:
        """The step program, from the cache where that has it: only for a module that is as llmopt made it."""
        source, options = self._source, self.options
        # The key tells programs apart by their options, so it is for what the options ask for.
        if source is None or prompt_embeds != options.enable_prompt_embeds:
            return self._compile(prompt_embeds)
        key = step_key(self.info.module, self._length, options)
        if key is None:
            return self._compile(prompt_embeds)
        # The module's own weights may have given up their memory by then.
        again = lambda: ModelEngine(source(), options, Report())._compile(prompt_embeds)  # noqa: E731
        return kept_step(key, self._tensors(), options, again) or self._compile(prompt_embeds, key)

    @property
    def _length(self) -> int:
        """That of the sequence with which the module is captured."""
        return self.info.max_model_len - 1

    def _compile(self, prompt_embeds: bool, key: str | None = None) -> CompiledStep:
        tensors = self._tensors()
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        with marked(self.info.embedding) if prompt_embeds else contextlib.nullcontext():
            captured, arguments = trace_forward(self.info.forward, self._length, device)
        by_identity = {id(tensor): name for name, tensor in tensors.items()}
        constants = {id(tensor) for tensor in captured.constants}
        sources: list[Source] = []
        for index, argument in enumerate(arguments):
            name = by_identity.get(id(argument))
            captured.weights[index] = name or captured.weights[index]
            if name is None and captured.weights[index] is not None and id(argument) not in constants:
                key = None  # a tensor that only the module's code knows where to find
            # What is no weight comes with each step.
            is_input = captured.weights[index] is None and id(argument) not in constants
            sources.append(name or (None if is_input else argument))
        return compile_step(captured, self.options, sources, key, prompt_embeds=prompt_embeds)

    def core(self, fresh: bool = True) -> EngineCore:
        """The engine that runs requests; one for as long as the program stays the same.

        `fresh` brings it up to the module's present weights, and is for the start of a generation.
        """
        with self._lock:
            if self._core is not None and not fresh:
                return self._core
            program = self.program()
            if self._core is None or self._core.program is not program:
                self._core = EngineCore(program, self.info, self.options, self.max_model_len)
            elif not self._owned:
                self._core.reset_prefix_cache()
            return self._core
