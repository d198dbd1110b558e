"""Minimal repros: wraps PyTorch's minifier of FX graphs for this backend."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.debug_utils import backend_accuracy_fails
from torch._dynamo.repro.after_dynamo import generate_dynamo_fx_repro_string

from llmopt import backend as llmopt_backend_module
from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.output_file import check_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repro:
    """A repro that was written.

    kind: "crash" (compiling or running raises) or "accuracy" (the result is wrong).
    nodes: operations in the minified graph, of `nodes_before` in the graph that failed.
    reproduces: whether the file fails when it is run by itself.
    """

    path: Path
    kind: str
    nodes: int
    nodes_before: int
    reproduces: bool


def write_repro(
    function: Callable[..., Any],
    *args: Any,
    path: str | Path = "repro.py",
    imports: Sequence[str] = (),
    options: Any = None,
    **kwargs: Any,
) -> Repro | None:
    """Writes a minimal runnable program for a call that fails under llmopt; None if no graph of it fails.

    Calls `function(*args, **kwargs)`, a module or a function. Each graph that Dynamo captures is compiled and compared
    with eager mode; the first that raises or differs is minified: as few operations as possible that still fail.

    Args:
        path: the file to write; an existing one is replaced. Inputs are random in it; where that does not fail, the
            real ones are saved beside it, in a folder of the same name.
        imports: modules that register passes, ops or kernels; the repro imports them first.
        options: the fields of `llmopt.Options`; the repro has those that are not as by default.

    Raises InputError for a path that cannot be written, and for the program's own.
    """
    for name in imports:
        importlib.import_module(name)
    torch._dynamo.reset()
    with minifying(Path(path), imports) as search, torch.no_grad():
        settings = Options.make(options)
        compiled = torch.compile(function, backend=functools.partial(_compile, options=settings))
        compiled(*args, **kwargs)
    return search.found


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """As the backend does; of `llmopt.optimize` it gets options, too, that are about step programs."""
    return llmopt_backend_module.make_backend(options, Report())(gm, example_inputs)


@dataclass
class Search:
    """How the search for a failing graph goes: how many graphs were checked, and what was written for the one."""

    checked: int = 0
    found: Repro | None = None


@contextmanager
def minifying(path: Path, imports: Sequence[str] = ()) -> Iterator[Search]:
    """While this is active, every graph that llmopt is given is checked, and the first failing one is minified.

    The model's code gets eager results and so runs on.
    """
    check_output(path)
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    if program is not None and path.exists() and path.samefile(program):
        raise InputError(f"{path} is the program that is running; write the repro to another file")
    search = Search()

    def intercept(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
        if search.found is None:
            search.checked += 1
            search.found = minify(gm, example_inputs, options, path, imports)
        return gm.forward

    llmopt_backend_module.INTERCEPT.append(intercept)
    try:
        yield search
    finally:
        llmopt_backend_module.INTERCEPT.remove(intercept)


def _bare(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without what Dynamo has noted on the nodes: just what a repro file holds."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, mapping))
    for node in graph.nodes:
        node.meta = {}
    plain = fx.GraphModule(gm, graph)
    plain.meta = {}
    return plain.eval()


def _clones(values: Sequence[Any]) -> list[Any]:
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]


def _operations(gm: fx.GraphModule) -> int:
    return sum(node.op not in ("placeholder", "output") for node in gm.graph.nodes)


class _Failure:
    """Whether a graph fails, and how: an exception of the type that was seen first, or a wrong result."""

    def __init__(self, options: Options) -> None:
        self.options, self.kind, self.error = options, "", ""

    def compiler(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with _not_intercepted():
            return _compile(_bare(gm), inputs, self.options)

    def detect(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
        """The first look at a graph; sets `kind`."""
        try:
            with torch.no_grad():
                self.compiler(gm, inputs)(*_clones(inputs))
        except Exception as error:
            self.kind, self.error = "crash", type(error).__name__
            return True
        self.kind = "accuracy"
        return self._differs(gm, inputs)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
        """Whether a smaller graph fails in the same way."""
        try:
            with torch.no_grad():
                _bare(gm)(*_clones(inputs))
        except Exception as error:  # cut so that PyTorch cannot run it either: another cut is tried
            log.debug("a smaller graph is no graph any more: %s", error)
            return False
        if self.kind == "accuracy":
            return self._differs(gm, inputs)
        try:
            with torch.no_grad():
                self.compiler(gm, inputs)(*_clones(inputs))
        except Exception as error:
            return type(error).__name__ == self.error
        return False

    def _differs(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
        try:
            with torch.no_grad():
                return bool(backend_accuracy_fails(_bare(gm), _clones(inputs), self.compiler, only_fwd=True))
        except Exception as error:  # of the comparison: says nothing about the graph, and a smaller one may be invalid
            log.warning("the results of a graph of %d nodes could not be compared: %s", len(gm.graph.nodes), error)
            return False


@contextmanager
def _not_intercepted() -> Iterator[None]:
    saved = list(llmopt_backend_module.INTERCEPT)
    llmopt_backend_module.INTERCEPT.clear()
    try:
        yield
    finally:
        llmopt_backend_module.INTERCEPT[:] = saved


def minify(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, path: Path, imports: Sequence[str] = ()
) -> Repro | None:
    """Minifies one Dynamo graph and writes the repro; None if it does not fail."""
    from functorch.compile import minifier

    inputs = [v.node.hint if isinstance(v, torch.SymInt) else v for v in _clones(example_inputs)]
    failure, plain = _Failure(options), _bare(gm)
    if not failure.detect(plain, inputs):
        return None
    smallest: list[tuple[fx.GraphModule, list[Any]]] = [(plain, inputs)]

    def keep(found: fx.GraphModule, found_inputs: Sequence[Any]) -> None:
        smallest[0] = (_bare(found), list(found_inputs))

    # Where the graph cannot be made smaller, PyTorch's minifier may raise; the whole graph is the repro then.
    try:
        minifier(_bare(plain), _clones(inputs), module_fails=failure, dump_state=keep)
    except Exception as error:
        log.warning("the graph could not be minified: %s", error)
    final, values = smallest[0]
    reproduces = False
    for folder in (None, path.with_suffix("")):
        _write(final, values, failure.kind, path, folder, options, imports)
        reproduces = _fails(path)
        if reproduces:
            break
    return Repro(path, failure.kind, _operations(final), _operations(plain), reproduces)


def _write(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    kind: str,
    path: Path,
    folder: Path | None,
    options: Options,
    imports: Sequence[str],
) -> None:
    """`folder`: where to save the inputs; None makes them random."""
    changed = _changed(options)
    text = generate_dynamo_fx_repro_string(
        gm,
        inputs,
        "llmopt_with_options" if changed else "llmopt",
        check_accuracy=kind == "accuracy",
        save_dir=str(folder.absolute()) if folder is not None else None,
    )
    if folder is None:
        text = text.replace("save_dir=''", "save_dir=None")
    head = [
        f'"""A minimal repro of llmopt ({kind}): run it, it fails with the error that is to be explained."""',
        "import os",
        "import sys",
    ]
    for name in imports:
        file = getattr(sys.modules[name], "__file__", None)
        parent = Path(file).absolute().parents[name.count(".")] if file else Path.cwd()
        head += [f"sys.path.append({str(parent)!r})", f"import {name}"]
    if changed:
        head += [
            "import functools",
            "from torch._dynamo import register_backend",
            "from llmopt.backend import llmopt_backend",
            f"with_options = functools.partial(llmopt_backend, options={changed!r})",
            "register_backend(with_options, name='llmopt_with_options')",
        ]
    path.write_text("\n".join([*head, text]), "utf-8")


def _changed(options: Options) -> dict[str, Any]:
    """The options of a backend that are not as by default; a log that somebody reads is no part of what fails."""
    without = (*llmopt_backend_module.STEP_ONLY, "rewrite_log")
    return {
        field.name: value
        for field in dataclasses.fields(options)
        if field.name not in without and (value := getattr(options, field.name)) != field.default
    }


def _fails(path: Path) -> bool:
    """Whether the file fails when it is run, in a process of its own."""
    answer = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        log.info("%s runs without an error", path)
    return answer.returncode != 0
