"""`llmopt.explain`: what was made of a model, and how well it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmopt.compiler.errors import InputError, OptionError
from llmopt.compiler.options import Options
from llmopt.compiler.report import GraphReport, Report
from llmopt.output_file import check_output
from llmopt.served_model import ServedModel


def explain(
    model: Any = None,
    /,
    *inputs: Any,
    sizes: Mapping[str, int] | None = None,
    measure: bool = False,
    html: str | Path | None = None,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Report:
    """What was compiled: graphs, breaks and guards, passes and near misses, kernels, costs, fallbacks, memory.

    Print the result, or call its `to_json()`.

    Args:
        model: an optimized module, an `llmopt.LLM` or an `llmopt.AsyncLLM` that has been used; the path of a Hugging
            Face folder or of a program file; any other module, together with inputs to call it on; None, or a module
            that torch.compile has compiled, for all that the backend has done in this process.
        inputs, kwargs: with these, a module is called as `model(*inputs, **kwargs)`. One that is not compiled yet is
            compiled for this report alone and stays as it is.
        sizes: of a step, for the numbers in the report: `tokens`, `requests`, `context`. The default is a decode step.
        measure: time every kernel, and probe the machine for what it could do at best. Takes a few seconds.
        html: write the report as one self-contained page to this file, too.
        options: the fields of `llmopt.Options`, for a path or a module that is compiled for this report.

    Raises InputError for anything else and for a page that could not be written, OptionError for sizes that the program
    does not have.
    """
    if html is not None:
        check_output(html)
    report = _report(model, inputs, kwargs, sizes or {}, measure, options)
    if html is not None:
        from llmopt.explaining.page import write_page

        write_page(report, html, _title(model))
    return report


def _title(model: Any) -> str:
    if model is None:
        return "torch.compile"
    if isinstance(model, str | Path):
        return Path(model).resolve().name
    served = getattr(model, "_model", None)
    name = served.module_name() if isinstance(served, ServedModel) else None
    return name or type(model).__name__


def _report(
    model: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[str, int], measure: bool, options: Any
) -> Report:
    from llmopt.backend import REPORT
    from llmopt.optimization import state_of

    if isinstance(model, str | Path):
        return explain_path(Path(model), sizes, measure, options)
    if isinstance(model, torch.nn.Module):
        state = state_of(model)
        if state is None and (inputs or kwargs):
            return _explain_call(model, inputs, kwargs, measure, options)
        if state is None and not _is_compiled(model):
            raise InputError(
                f"this {type(model).__name__} is not compiled: give inputs to call it on, or call explain() for all "
                "that torch.compile has made"
            )
        found = state.report if state is not None else REPORT
        if inputs or kwargs:
            with torch.no_grad():
                model(*inputs, **kwargs)
                if measure:
                    _measure_backend(found, lambda: model(*inputs, **kwargs))
        return found
    if inputs or kwargs:
        raise InputError("inputs are for a torch.nn.Module")
    if model is None:
        return REPORT
    report = getattr(model, "report", None)
    if not isinstance(report, Report):
        raise InputError(f"explain takes a model, an LLM, a path or nothing, got {type(model).__name__}")
    if measure or sizes:
        for graph in report.graphs:
            _measure_step(graph, sizes, model.vocab_size, measure)
    return report


def _is_compiled(model: torch.nn.Module) -> bool:
    """Whether torch.compile has made this module, its call or its forward."""
    return model._compiled_call_impl is not None or hasattr(model.forward, "_torchdynamo_orig_callable")


def _measure_step(graph: GraphReport, sizes: Mapping[str, int], vocabulary: int, measure: bool) -> None:
    from llmopt.explaining.measure import measure_step

    program = graph.program() if graph.program is not None else None
    if measure and program is not None and graph.kind in ("step", "program"):
        measure_step(graph, program, vocabulary, sizes)
    elif sizes:
        set_sizes(graph, sizes)


def set_sizes(graph: GraphReport, sizes: Mapping[str, int]) -> None:
    """States numbers for these sizes from now on."""
    from llmopt.compiler.roofline import check_sizes

    if graph.details is not None:
        graph.details.hints.update(check_sizes(graph.details, sizes))


def _measure_backend(report: Report, run: Callable[[], object]) -> None:
    from llmopt.explaining.measure import measure_call

    live = [
        (graph, graph.program()) for graph in report.graphs if graph.program is not None and graph.kind == "backend"
    ]
    measure_call([(graph, compiled) for graph, compiled in live if compiled is not None], run)


def _explain_call(
    model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], measure: bool, options: Any
) -> Report:
    """Compiles a module's forward for this report alone."""
    from llmopt.backend import make_backend
    from llmopt.explaining.dynamo import breaks_so_far, describe_break

    settings = Options.make(options, record_graphs=True)
    report = Report()
    known = len(breaks_so_far())
    compiled = torch.compile(model.forward, backend=make_backend(settings, report), dynamic=True)
    with torch.no_grad():
        compiled(*inputs, **kwargs)
        if measure:
            _measure_backend(report, lambda: compiled(*inputs, **kwargs))
    ended = {graph.ends_at for graph in report.graphs}
    report.breaks = [b for b in map(describe_break, breaks_so_far()[known:]) if b not in ended]
    return report


def explain_path(path: Path, sizes: Mapping[str, int], measure: bool, options: Any = None) -> Report:
    """The step program of a Hugging Face folder, compiled for this report, or that of a program file."""
    if path.is_file():
        return _explain_file(path, sizes, measure, options)
    from llmopt.engine import ModelEngine
    from llmopt.huggingface import load_model

    settings = Options.make(options, record_graphs=True)
    report = Report()
    engine = ModelEngine(load_model(str(path), settings.torch_dtype), settings, report)
    engine.program()
    for graph in report.graphs:
        _measure_step(graph, sizes, engine.info.vocab_size, measure)
        graph.program = None  # the model ends with this call
    return report


def _explain_file(path: Path, sizes: Mapping[str, int], measure: bool, options: Any) -> Report:
    from llmopt.explaining.details import program_details
    from llmopt.explaining.kernels import kernel_uses
    from llmopt.runtime.program_file import load_program

    settings = Options.make(options)
    for name in ("dtype", "block_size"):
        if isinstance(options, Mapping) and name in options:
            raise OptionError(name, options[name], "nothing: a program file has it compiled in; export it again")
    loaded = load_program(path, settings.threads)
    program = loaded.program.program
    names = [program.values[value].name for value in program.inputs if value is not None]
    graph = GraphReport("program", names, kernels=kernel_uses(program))
    graph.native_calls = loaded.program.executable.num_kernel_runs
    graph.make_details = lambda: program_details(program, loaded.costs)
    graph.program = lambda: loaded.program
    _measure_step(graph, sizes, loaded.vocab_size, measure)
    graph.program = None
    report, step = Report([graph]), loaded.program
    weights = step.executable.weights
    size = sum(weight.nbytes for weight in weights) / 1e6
    report.note(f"vocabulary {loaded.vocab_size}, sequences to {loaded.max_model_len} tokens")
    report.note(f"{len(weights)} weights of {size:.1f} MB")
    report.note(
        f"KV cache: {len(step.caches)} layers, blocks of {step.block_size} tokens and {step.bytes_per_block()} bytes"
    )
    return report
