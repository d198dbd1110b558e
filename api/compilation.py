"""Drives the stages: capture, passes, code generation, runtime. The two ways to compile a graph meet here."""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmopt import graph_cache, step_cache
from llmopt.codegen.lower import Lowered, lower
from llmopt.codegen.program import Program
from llmopt.codegen.target import device_of
from llmopt.compiler.capture import Captured, capture, lift_checks, specialized_floats
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import graph_text, location, placeholders
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassReport, run_pipeline
from llmopt.compiler.report import Details, Fallback, GraphReport
from llmopt.compiler.step import CacheSpec, LoraSpec
from llmopt.explaining.details import graph_details
from llmopt.explaining.kernels import kernel_uses
from llmopt.graph_key import graph_key, shape_facts
from llmopt.passes.pipeline import InsertLora, backend_pipeline, step_pipeline
from llmopt.runtime.compiled import CompiledGraph
from llmopt.runtime.step_program import StepProgram
from llmopt.runtime.weights import WeightBinder
from llmopt.step_cache import Source

log = logging.getLogger(__name__)


def _mark_weights(captured: Captured) -> None:
    """Tells passes and code generation which placeholders are weights: parameters and buffers that nobody writes."""
    for index, node in enumerate(placeholders(captured.graph)):
        node.meta["argument"] = index
        if index not in captured.mutations:
            node.meta["weight"] = captured.weights[index]


def _describe(node: fx.Node) -> str:
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return f"{node.name} {str(val.dtype).removeprefix('torch.')}{list(map(str, val.shape))}".replace("'", "")
    return f"{node.name} {val}"


def make_report(kind: str, graph: fx.Graph, passes: list[PassReport], lowered: Lowered) -> GraphReport:
    """What was decided about one graph."""
    program = lowered.program
    selection = lowered.selection
    return GraphReport(
        kind,
        [_describe(n) for n in placeholders(graph) if not n.meta.get("weight")],
        passes,
        kernel_uses(program),
        [Fallback(step.op, step.reason, step.location) for step in program.fallbacks],
        [Fallback(str(n.target), reason, location(n)) for n, reason in selection.rejected.items()],
        batch_invariant=program.batch_invariant,
        make_details=lambda: graph_details(graph, lowered, kind == "step"),
    )


def compile_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[CompiledGraph, GraphReport]:
    """Compiles a Dynamo graph for the caller's own arguments, or takes what an earlier process made of the same one.

    Raises UnsupportedError when the graph cannot be compiled, and when `options.fallback` is "error" and an op has no
    kernel.
    """
    start = time.perf_counter()
    key = graph_key(gm, example_inputs, options)
    kept = graph_cache.find(key) if key is not None else None
    if kept is not None:
        compiled = CompiledGraph(
            *(kept.program, kept.graph, kept.weights, kept.constants),
            *(options.threads, options.huge_pages, _device(example_inputs)),
        )
        report = kept.report
        report.kernels = kernel_uses(kept.program)
        # Costs and lives of values are looked for in the graph, so whoever asks for them has it compiled.
        report.make_details = _details_by_compiling(gm, example_inputs, options)
        report.seconds = {"reading the cache": time.perf_counter() - start}
    else:
        compiled, report = _compile_graph(gm, example_inputs, options, key)
    report.native_calls = compiled.executable.num_kernel_runs
    report.program = weakref.ref(compiled)
    return compiled, report


def _device(arguments: Iterable[Any]) -> torch.device | None:
    """Where the arguments of a compiled graph lie, which all lie on one device."""
    return next((argument.device for argument in arguments if isinstance(argument, torch.Tensor)), None)


def _details_by_compiling(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[[], Details | None]:
    """Keeps none of the arguments but the floats that the graph is specialised on: the others may be large."""
    floats = specialized_floats(gm, example_inputs)
    arguments = [example if index in floats else None for index, example in enumerate(example_inputs)]
    return lambda: _compile_graph(gm, arguments, options)[1].details


def _compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, key: str | None = None
) -> tuple[CompiledGraph, GraphReport]:
    """Compiles, and keeps the result under `key` for later processes."""
    start = time.perf_counter()
    known = shape_facts(gm)
    captured = capture(gm, example_inputs)
    checks = lift_checks(captured)
    _mark_weights(captured)
    before = graph_text(captured.graph, renumber=False) if options.record_graphs else None
    traced = time.perf_counter()
    passes = run_pipeline(captured.graph, backend_pipeline(), options)
    passed = time.perf_counter()
    lowered = lower(captured.graph, captured.mutations, captured.told)
    report = make_report("backend", captured.graph, passes, lowered)
    report.captured = before
    _check_fallbacks(report, options)
    parts = (lowered.program, captured.graph, lowered.weights, captured.constants)
    compiled = CompiledGraph(*parts, options.threads, options.huge_pages, device_of(captured.graph), checks)
    report.seconds = {
        "capture": traced - start,
        "passes": passed - traced,
        "code generation": time.perf_counter() - passed,
    }
    # What comes from the cache cannot tell Dynamo of what it assumes about sizes.
    if key is not None and not checks and shape_facts(gm) == known:
        graph_cache.keep(key, *parts, report)
    return compiled, report


def _check_fallbacks(report: GraphReport, options: Options) -> None:
    if report.batch_invariant and report.fallbacks:
        first = report.fallbacks[0]
        reason = f"not batch invariant, it runs on ATen: {first.reason}"
        raise UnsupportedError(reason, operation=first.op, location=first.location)
    if not report.fallbacks or options.fallback == "silent":
        return
    first = report.fallbacks[0]
    if options.fallback == "error":
        raise UnsupportedError(f"no kernel: {first.reason}", operation=first.op, location=first.location)
    names = Counter(f.op for f in report.fallbacks)
    listed = ", ".join(f"{count} x {op}" for op, count in names.items())
    log.warning("these ops run on ATen: %s; llmopt.explain tells why", listed)


@dataclass
class CompiledStep:
    """A step program that has no weights yet.

    sources: where each argument of its graph comes from.
    """

    program: StepProgram
    binder: WeightBinder
    report: GraphReport
    sources: list[Source]

    def bind(self, tensors: Mapping[str, torch.Tensor], *, consume: bool = False) -> None:
        """Binds the weights, given the module's parameters and buffers as they are now; see `WeightBinder.resolve`."""
        arguments = [tensors.get(source) if isinstance(source, str) else source for source in self.sources]
        self.program.bind(self.binder.resolve(arguments, consume=consume))


def kept_step(
    key: str, tensors: Mapping[str, torch.Tensor], options: Options, compile_again: Callable[[], CompiledStep]
) -> CompiledStep | None:
    """What an earlier process compiled under this key for a module with these parameters and buffers.

    `compile_again` makes the same for those who ask for details.
    """
    start = time.perf_counter()
    found = step_cache.find(key, tensors.keys())
    if found is None:
        return None
    kept, report = found.kept, found.kept.report
    program = StepProgram(
        *(kept.program, found.caches, options.block_size, options.threads, _device(tensors.values())),
        lora=found.lora,
        huge_pages=options.huge_pages,
    )
    report.kernels = kernel_uses(kept.program)
    report.batch_invariant = kept.program.batch_invariant
    report.native_calls = program.executable.num_kernel_runs
    report.make_details = lambda: compile_again().report.details
    report.program = weakref.ref(program)
    report.seconds = {"reading the cache": time.perf_counter() - start}
    return CompiledStep(program, WeightBinder(kept.graph, kept.weights), report, found.sources)


def compile_step(
    captured: Captured,
    options: Options,
    sources: Sequence[Source] = (),
    key: str | None = None,
    *,
    prompt_embeds: bool = False,
) -> CompiledStep:
    """Compiles a cache-less graph `logits[1, S, V] = f(input_ids[1, S])` into a step program.

    Args:
        captured: the graph.
        options: of the compilation and of the program.
        sources: where each argument of the graph comes from; without them the step cannot be bound.
        key: what the step is kept under for later processes, None for not at all.
        prompt_embeds: tokens may be given as embeddings; the graph is then marked (`compiler/input_embeddings.py`).

    Raises UnsupportedError, with the op and the line of the user's model, when it cannot run over a paged cache.
    """
    start = time.perf_counter()
    _mark_weights(captured)
    graph = captured.graph
    if options.batch_invariant and device_of(graph).type != "cpu":
        raise UnsupportedError("batch_invariant: kernels for a GPU choose how they compute by the number of rows")
    before = graph_text(graph, renumber=False) if options.record_graphs else None
    adapted = InsertLora(options.max_loras, options.max_lora_rank) if options.enable_lora else None
    pipeline = step_pipeline(options.block_size, options.kv_cache_dtype, adapted, prompt_embeds=prompt_embeds)
    passes = run_pipeline(graph, pipeline, options)
    passed = time.perf_counter()
    lowered = lower(graph)
    lowered.program.batch_invariant = options.batch_invariant
    report = make_report("step", graph, passes, lowered)
    report.captured = before
    _check_fallbacks(report, options)
    caches: list[CacheSpec] = []
    lora: LoraSpec | None = None
    for node in placeholders(graph):
        lora = node.meta.get("lora", lora)
        spec = node.meta.get("cache")
        if spec is not None and spec not in caches:
            caches.append(spec)
    program = StepProgram(
        *(lowered.program, caches, options.block_size, options.threads, device_of(graph)),
        lora=lora,
        huge_pages=options.huge_pages,
    )
    report.native_calls = program.executable.num_kernel_runs
    report.program = weakref.ref(program)
    report.seconds = {"passes": passed - start, "code generation": time.perf_counter() - passed}
    arguments = [node.meta.get("argument") for node in placeholders(graph)]
    step_sources = [sources[i] if sources and i is not None else None for i in arguments]
    if key is not None:
        step_cache.keep(key, lowered.program, graph, lowered.weights, step_sources, caches, lora, report)
    return CompiledStep(program, WeightBinder(graph, lowered.weights), report, step_sources)


__all__ = ["CompiledStep", "Program", "compile_backend", "compile_step", "kept_step"]
