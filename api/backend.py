"""The torch.compile backend: `torch.compile(model, backend="llmopt", options={...})`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from llmopt.compilation import compile_backend
from llmopt.compiler.capture import specialized_floats
from llmopt.compiler.errors import BackwardError, OptionError, ToolchainError, UnsupportedError
from llmopt.compiler.graph import placeholders
from llmopt.compiler.options import Options
from llmopt.compiler.report import GraphReport, Report
from llmopt.explaining.dynamo import describe_capture
from llmopt.runtime.compiled import CompiledGraph

log = logging.getLogger(__name__)

# What the backend has compiled since the process began or `torch._dynamo.reset()` was called.
REPORT = Report()

# What only a step program has: under torch.compile, nothing would come of them.
STEP_ONLY = ("dtype", "kv_cache_dtype", "batch_invariant", "enable_lora", "enable_prompt_embeds")

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class _NoBackward(torch.autograd.Function):
    """Passes values on; asks for gradients end in an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.count = len(tensors)
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError(
            "this model was compiled by llmopt, which computes inference only; call the original model for training, "
            "or run the compiled one under torch.no_grad()"
        )


class _Runner:
    """What Dynamo calls in place of a graph.

    Floats that Dynamo passes in as tensors are constants of the compiled code, so a graph is compiled again for each
    new set of their values.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Report) -> None:
        self._gm, self._options, self._report = gm, options, report
        self._floats = list(specialized_floats(gm, example_inputs))
        self._compiled: dict[tuple[float, ...], Callable[[Sequence[Any]], Sequence[Any]]] = {}
        self._get(example_inputs)

    def _get(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        key = tuple(float(arguments[i]) for i in self._floats)
        if key not in self._compiled:
            self._compiled[key] = self._compile(arguments)
        return self._compiled[key]

    def _compile(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        try:
            compiled, report = compile_backend(self._gm, arguments, self._options)
        except (UnsupportedError, ToolchainError) as error:
            if self._options.fallback == "error":
                raise
            log.warning("llmopt runs this graph in eager mode: %s", error)
            names = [n.name for n in placeholders(self._gm.graph)]
            refused = GraphReport("backend", names[:4], refused=str(error))
            describe_capture(self._gm, refused)
            self._report.graphs.append(refused)
            forward = self._gm.forward
            return lambda args: forward(*args)
        describe_capture(self._gm, report)
        self._report.graphs.append(report)
        return compiled

    def __deepcopy__(self, memo: Any) -> _Runner:
        """Itself: PyTorch's debugging tools copy what they run, and a compiled program has no state to protect."""
        return self

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        run = self._get(arguments) if self._floats else next(iter(self._compiled.values()))
        if not isinstance(run, CompiledGraph):
            return run(arguments)
        needs_grad = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
        results = run(arguments)
        if not needs_grad:
            return results
        return _with_backward_error(results, [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad])


def _with_backward_error(results: Sequence[Any], sources: Sequence[torch.Tensor]) -> list[Any]:
    """The results as if they depended on `sources`, with a backward that explains itself."""
    places = [i for i, r in enumerate(results) if isinstance(r, torch.Tensor) and r.is_floating_point()]
    tied = _NoBackward.apply(len(places), *(results[i] for i in places), *sources) if places else ()
    out = list(results)
    for place, tensor in zip(places, tied, strict=True):
        out[place] = tensor
    return out


# Tools that want a graph before it is compiled: the latest one runs in place of the compiler.
INTERCEPT: list[Callable[[fx.GraphModule, Sequence[Any], Options], Callable[..., Any]]] = []


def _make_runner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Report
) -> Callable[..., Any]:
    if INTERCEPT:
        return INTERCEPT[-1](gm, example_inputs, options)
    return _Runner(gm, example_inputs, options, report)


def make_backend(options: Options, report: Report) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A Dynamo backend with fixed options that records what it does in `report`."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return _make_runner(gm, example_inputs, options, report)

    backend.compiler_name = "llmopt"  # type: ignore[attr-defined]  # what PyTorch's debugging tools call it
    return backend


def llmopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Callable[..., Any]:
    """Entry point for Dynamo; `options` are the fields of `llmopt.Options`.

    Raises OptionError for an unknown option or value, and for one that only a step program has. `mode` is accepted for
    torch.compile's sake and changes nothing.
    """
    if mode is not None and mode not in _MODES:
        raise OptionError("mode", mode, _MODES)
    settings = Options.make(options)
    for name in STEP_ONLY:
        if (value := getattr(settings, name)) != (default := getattr(Options, name)):
            raise OptionError(name, value, f"{default!r} under torch.compile: others are for llmopt.optimize and LLM")
    return _make_runner(gm, example_inputs, settings, REPORT)


def _reset() -> None:
    REPORT.graphs.clear()
    REPORT.notes.clear()
    REPORT.breaks.clear()


# Dynamo calls `reset` of a backend from `torch._dynamo.reset()`.
llmopt_backend.reset = _reset  # type: ignore[attr-defined]
