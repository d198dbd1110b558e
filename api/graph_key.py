"""Names for what is compiled, that two processes agree on: equal names, equal compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node

import llmopt
from llmopt import codegen, compiler, passes, runtime
from llmopt.code_digest import code_digest
from llmopt.codegen.cpu.templates import REGISTERED_SOURCES
from llmopt.codegen.cpu.toolchain import host_level
from llmopt.compiler.capture import specialized_floats, weight_names
from llmopt.compiler.graph import placeholders
from llmopt.compiler.options import Options
from llmopt.passes.registry import registered_passes

log = logging.getLogger(__name__)

# Options that a compiled program has nothing to do with, and those that ask for a record of the compilation itself.
_NO_PART = frozenset(
    {"threads", "kv_cache_memory_bytes", "gpu_memory_utilization", "swap_space_bytes", "enable_prefix_caching"}
    | {"max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued", "async_scheduling", "huge_pages"}
)
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
    if not _may_be_kept(options):
        return None
    digest = hashlib.sha256()
    try:
        for part in _parts(gm, example_inputs):
            digest.update(f"{part}\n".encode())
    except _Unnamed:
        return None
    digest.update(_circumstances(options))
    return digest.hexdigest()[:32]


def step_key(module: nn.Module, length: int, options: Options) -> str | None:
    """A digest of all that the step program of a module depends on, or None where none is to be kept.

    It covers the module's state and the code of its forward (`code_digest`), its weights' names, layouts and ties, the
    length with which it is captured, and otherwise what `graph_key` does.
    """
    if not _may_be_kept(options):
        return None
    try:
        code = code_digest(module)
    except Exception as error:  # objects that others have made may answer in any way when they are looked at
        log.debug("a step program is not kept: %s", error)
        return None
    digest = hashlib.sha256(f"{code} {length}\n".encode())
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        facts = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
        digest.update(f"{name} {facts} {first.setdefault(id(tensor), name)}\n".encode())
    digest.update(_circumstances(options))
    return digest.hexdigest()[:32]


def _may_be_kept(options: Options) -> bool:
    """Whether nothing of the user's takes part in the compilation, and nobody watches it."""
    if not options.graph_cache or REGISTERED_SOURCES or registered_passes():
        return False
    plain = Options()
    return all(getattr(options, name) == getattr(plain, name) for name in _WATCHED)


def _circumstances(options: Options) -> bytes:
    kept = {name: setting for name, setting in dataclasses.asdict(options).items() if name not in _NO_PART}
    return repr((kept, _surroundings(), _own_sources())).encode()


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
        _transformers_version(),
        sys.version_info[:3],
        host_level().name,
        capabilities,
    )


def _transformers_version() -> str:
    """That of the one that is loaded; without it no model is one of its."""
    return str(getattr(sys.modules.get("transformers"), "__version__", None))


@functools.cache
def _own_sources() -> str:
    """A digest of llmopt itself: a program that another version compiled is of no use."""
    digest = hashlib.sha256()
    for name in ("compilation.py", "tracing.py", "engine.py", "huggingface.py", "graph_cache.py", "step_cache.py"):
        digest.update(Path(llmopt.__file__).with_name(name).read_bytes())
    for package in (compiler, passes, codegen, runtime):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
