"""Launches of Triton kernels as data, and the one place that loads triton to run or compile them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmopt.codegen.cpu.object_cache import cache_folder, mark_used
from llmopt.compiler.errors import ToolchainError

KERNELS = "llmopt.codegen.triton.kernels"


@dataclass(frozen=True)
class Device:
    """What launch shapes depend on: the number of multiprocessors (SMs)."""

    multiprocessors: int = 132


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    kernel: "module.function" under `codegen.triton.kernels`, or a function of `source`.
    args: positional arguments in order, tensors and numbers.
    constants: compile-time arguments by name.
    warps, stages: warps of a program, and depth of the software pipeline.
    source: text of a generated module, for fused loops.
    """

    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    source: str = ""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolchainError(f"GPU programs need triton, which cannot be imported here: {error}") from error


class _SourceLoader(SourceFileLoader):
    """Leaves no byte code beside a module: in the cache lies what is named after its content, and nothing else."""

    def set_data(self, *_: Any, **__: Any) -> None:
        pass


@functools.cache
def load_source(text: str) -> ModuleType:
    """A generated module. Triton reads a kernel's text from its file, so there must be one."""
    name = "llmopt_loop_" + hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}.py"
    if not path.exists() or path.read_text("utf-8") != text:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".py")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    mark_used(path)
    spec = importlib.util.spec_from_file_location(name, path, loader=_SourceLoader(name, str(path)))
    if spec is None or spec.loader is None:
        raise ToolchainError(f"cannot load the generated kernel {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the source
    spec.loader.exec_module(module)
    return module


@functools.cache
def _function(kernel: str, source: str) -> Any:
    _import("triton")
    if source:
        return getattr(load_source(source), kernel)
    module, _, name = kernel.rpartition(".")
    return getattr(_import(f"{KERNELS}.{module}"), name)


def index_type(reach: int) -> Any:
    """Triton's integer type for places among `reach` elements; intermediate products may be somewhat larger."""
    language = _import("triton.language")
    return language.int32 if reach < 1 << 29 else language.int64


def run(launches: Sequence[Launch]) -> None:
    """Launches the kernels in order on the current stream."""
    for launch in launches:
        if 0 in launch.grid:
            continue
        kernel = _function(launch.kernel, launch.source)
        kernel[launch.grid](*launch.args, **launch.constants, **_options(launch))


def compile_for(launch: Launch, capability: int) -> Any:
    """Compiles a launch's kernel for an NVIDIA GPU of that compute capability (90 is Hopper); needs no GPU.

    Pointers are taken to be aligned to 16 bytes, as PyTorch's allocator aligns them. Raises whatever Triton raises.
    """
    triton = _import("triton")
    compiler = _import("triton.compiler")
    target = _import("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    function = _function(launch.kernel, launch.source)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    positional = iter(launch.args)
    for index, name in enumerate(function.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(index,)] = launch.constants[name]
            continue
        value = next(positional)
        signature[name] = _type(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0 and name not in _unspecialized(function)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=_options(launch))


def _options(launch: Launch) -> dict[str, Any]:
    # Fused multiply-adds round once; said here because Triton's default is going to change.
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def _unspecialized(function: Any) -> set[str]:
    return {p.name for p in function.params if p.do_not_specialize}


_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
