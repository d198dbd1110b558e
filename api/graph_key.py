"""A name for a Dynamo graph that two processes agree on: equal names, equal compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

import llmopt
from llmopt import codegen, compiler, passes, runtime
from llmopt.codegen.cpu.templates import REGISTERED_SOURCES
from llmopt.codegen.cpu.toolchain import host_level
from llmopt.compiler.capture import specialized_floats, weight_names
from llmopt.compiler.graph import placeholders
from llmopt.compiler.options import Options
from llmopt.passes.registry import registered_passes

# Options that a compiled program has nothing to do with, and those that ask for a record of the compilation itself.
_NO_PART = frozenset({"threads"})
_WATCHED = ("fuel", "verify", "record_graphs", "rewrite_log")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format, torch.layout)
_ROOTS = ("torch", "_operator", "math", "builtins")


class _Unnamed(Exception):
    """The graph holds something that has no name in another process."""


def graph_key(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> str | None:
    """A digest of all that compiling depends on, or None where that cannot be told.

    It covers the graph, what Dynamo knows about its arguments and symbols, the options, the state of PyTorch that
    tracing looks at, the versions, the machine, and llmopt's own sources.
    """
    if not options.graph_cache or REGISTERED_SOURCES or registered_passes():
        return None
    plain, chosen = dataclasses.asdict(Options()), dataclasses.asdict(options)
    if any(chosen[name] != plain[name] for name in _WATCHED):
        return None
    digest = hashlib.sha256()
    try:
        for part in _parts(gm, example_inputs):
            digest.update(f"{part}\n".encode())
    except _Unnamed:
        return None
    kept = {name: setting for name, setting in chosen.items() if name not in _NO_PART}
    digest.update(repr((kept, _surroundings(), _own_sources())).encode())
    return digest.hexdigest()[:32]


def _parts(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[str]:
    yield repr(specialized_floats(gm, example_inputs))
    yield repr(weight_names(gm, example_inputs))
    yield shape_facts(gm)
    storages: dict[Any, int] = {}
    for node, example in zip(placeholders(gm.graph), example_inputs, strict=True):
        value = node.meta.get("example_value", example)
        if isinstance(value, torch.Tensor):
            number = storages.setdefault(value.untyped_storage()._cdata, len(storages))
            layout = (list(map(str, value.shape)), list(map(str, value.stride())), str(value.storage_offset()))
            facts = (value.dtype, value.device, value.requires_grad, value.is_inference(), value.is_conj())
            yield f"{node.name} {type(value).__name__} {layout} {facts} {number}"
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            yield f"{node.name} {value.node.expr}"
        else:
            yield f"{node.name} {_text(value)}"
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            yield f"{node.name} = {node.op} {_target(node)} {_text(node.args)} {_text(node.kwargs)}"


def shape_facts(gm: fx.GraphModule) -> str:
    """All that is known about the symbols of a Dynamo graph, and all that has been assumed about them."""
    environment = None
    for node in placeholders(gm.graph):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            environment = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            environment = value.node.shape_env
        if environment is not None:
            break
    if environment is None:
        return ""
    facts: Any = (
        sorted((str(symbol), str(bounds)) for symbol, bounds in environment.var_to_range.items()),
        sorted((str(symbol), str(other)) for symbol, other in environment.replacements.items()),
        [str(guard.expr) for guard in environment.guards],
        [str(checks) for checks in environment.deferred_runtime_asserts.values()],
    )
    return repr(facts)


def _target(node: Node) -> str:
    target = node.target
    if node.op in ("call_method", "output"):
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if isinstance(target, torch._ops.OpOverload):
        module, name = "torch.ops", str(target)
        if target.namespace not in ("aten", "prims", "prim"):
            raise _Unnamed
    if node.op != "call_function" or not module or not name or module.partition(".")[0] not in _ROOTS:
        raise _Unnamed  # a module of its own, a user's op, a function that only this process knows
    return f"{module}.{name}"


def _text(item: Any) -> str:
    if isinstance(item, Node):
        return f"%{item.name}"
    if isinstance(item, list | tuple):
        return f"({', '.join(map(_text, item))})"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{name}: {_text(inner)}' for name, inner in item.items())}}}"
    if isinstance(item, slice):
        return f"[{_text(item.start)}:{_text(item.stop)}:{_text(item.step)}]"
    if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"<{item.node.expr}>"
    if type(item) in _PLAIN:
        return repr(item)
    if item is Ellipsis:
        return "..."
    raise _Unnamed


def _surroundings() -> tuple[Any, ...]:
    """What else tracing and lowering look at."""
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    )
    capabilities = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return (
        autocast,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.__version__,
        sys.version_info[:3],
        host_level().name,
        capabilities,
    )


@functools.cache
def _own_sources() -> str:
    """A digest of llmopt itself: a program that another version compiled is of no use."""
    digest = hashlib.sha256(Path(llmopt.__file__).with_name("compilation.py").read_bytes())
    for package in (compiler, passes, codegen, runtime):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
