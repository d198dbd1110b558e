"""Compiles C++ kernels: finds the compiler, knows the instruction sets, keeps every object for the next time."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmopt.codegen.cpu import object_cache
from llmopt.codegen.cpu.available import available_cpus
from llmopt.compiler.errors import ToolchainError

log = logging.getLogger(__name__)

KERNEL_FOLDER = Path(__file__).parent / "kernels"

_COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fno-semantic-interposition",
    "-Wno-psabi",
)


@dataclass(frozen=True)
class InstructionSet:
    """A level that kernels are compiled for: its name, the CPU flags it needs, and the compiler's flags for it."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")


def _level(name: str, needs: Sequence[str]) -> InstructionSet:
    return InstructionSet(name, frozenset(n.replace(".", "_") for n in needs), tuple(f"-m{n}" for n in needs))


# Best first; the last one runs anywhere.
LEVELS: tuple[InstructionSet, ...] = (
    InstructionSet(
        "avx512_bf16",
        frozenset((*_AVX512, "avx512_vnni", "avx512_bf16")),
        tuple(f"-m{n}" for n in (*_AVX512, "avx512vnni", "avx512bf16")),
    ),
    _level("avx512", _AVX512),
    _level("avx2", _AVX2),
    InstructionSet("portable", frozenset(), ()),
)


@functools.cache
def host_level() -> InstructionSet:
    """The best level that this machine's CPU reports."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return LEVELS[-1]
    line = next((row for row in text.splitlines() if row.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return next(level for level in LEVELS if level.needs <= flags)


def supported_levels() -> tuple[InstructionSet, ...]:
    """The levels whose code this machine can run, best first."""
    return LEVELS[LEVELS.index(host_level()) :]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path, the first line of its version, and what stands before all other arguments."""

    path: str
    version: str
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        """The beginning of a command line."""
        return self.path, *self.arguments


def _try_compiler(words: str) -> Compiler | None:
    try:
        name, *arguments = shlex.split(words)
    except ValueError:  # no words, or a quote that is not closed
        return None
    path = shutil.which(name)
    if path is None:
        return None
    answer = subprocess.run([path, *arguments, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout:
        return None
    return Compiler(path, answer.stdout.splitlines()[0], tuple(arguments))


@functools.cache
def find_compiler() -> Compiler:
    """`$CXX`, else g++, else clang++; raises ToolchainError that says what to install when there is none.

    `$CXX` may have arguments ("ccache g++"); where it is set and cannot be used, that is logged.
    """
    asked = os.environ.get("CXX")
    for candidate in (asked, "g++", "clang++"):
        if not candidate:
            continue
        found = _try_compiler(candidate)
        if found is not None:
            return found
        if candidate == asked:
            log.warning("$CXX is %r, which is no C++ compiler that can be run; looking for g++ and clang++", asked)
    raise ToolchainError(
        "no C++ compiler found; install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) "
        "or point $CXX at one"
    )


@functools.cache
def _header(name: str) -> tuple[str, frozenset[str]]:
    """A kernel header's text and the names of the headers that it includes."""
    text = (KERNEL_FOLDER / name).read_text("utf-8")
    return text, _included(text)


def _included(source: str) -> frozenset[str]:
    return frozenset(re.findall(r'^#include "([\w.]+)"', source, re.MULTILINE))


def headers_of(source: str) -> set[str]:
    """Names of all kernel headers that a source includes, directly or not."""
    names, todo = set[str](), set(_included(source))
    while todo:
        name = todo.pop()
        names.add(name)
        todo |= _header(name)[1] - names
    return names


def _headers_digest(source: str) -> str:
    """Hash of all headers that a source includes: a change elsewhere keeps the object valid."""
    digest = hashlib.sha256()
    for name in sorted(headers_of(source)):
        digest.update(f"{name}\0{_header(name)[0]}\0".encode())
    return digest.hexdigest()


def _run(command: Sequence[str], what: str) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ToolchainError(f"{what}: the C++ compiler failed\n  {' '.join(command)}\n{answer.stderr[-4000:]}")


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((platform.machine(), *parts)).encode()).hexdigest()[:32]


def compile_object(
    source: str,
    level: InstructionSet,
    defines: Mapping[str, int] | None = None,
) -> Path:
    """Compiles one translation unit to a cached object file.

    `defines` are extra preprocessor symbols; they enter the key like everything else that shapes the object: source,
    headers, instruction set, compiler.
    """
    compiler = find_compiler()
    flags = [*_COMMON_FLAGS, *level.flags, *(f"-D{k}={v}" for k, v in sorted((defines or {}).items()))]
    key = _key(source, " ".join(flags), *compiler.command, compiler.version, _headers_digest(source))
    if (known := object_cache.find(f"{key}.o")) is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="llmopt-") as build:
        path, made = Path(build) / "kernel.cpp", Path(build) / "kernel.o"
        path.write_text(source, "utf-8")
        _run([*compiler.command, *flags, "-I", str(KERNEL_FOLDER), "-c", str(path), "-o", str(made)], "kernel")
        return object_cache.keep(f"{key}.o", made)


def build_library(
    sources: Sequence[str],
    level: InstructionSet | None = None,
    defines: Mapping[str, int] | None = None,
) -> Path:
    """One shared library of the step executor and the given kernel sources; objects come from the cache.

    The library is cached too, under the hash of its objects' names. Nothing is linked against an OpenMP runtime: the
    executor is handed the one that PyTorch loaded.

    Raises ToolchainError when there is no compiler, when it fails, or when there is no room for what it makes.
    """
    level = level or host_level()
    executor = (KERNEL_FOLDER / "executor.cpp").read_text("utf-8")
    workers = max(1, min(len(sources) + 1, available_cpus()))
    try:
        with ThreadPoolExecutor(workers) as pool:
            compiling = [pool.submit(compile_object, text, level, defines) for text in (executor, *sources)]
            objects = [job.result() for job in compiling]
        key = _key(*(path.name for path in objects))
        if (known := object_cache.find(f"{key}.so")) is not None:
            return known
        with tempfile.TemporaryDirectory(prefix="llmopt-") as build:
            made = Path(build) / "kernels.so"
            _run([*find_compiler().command, "-shared", *map(str, objects), "-o", str(made)], "link")
            return object_cache.keep(f"{key}.so", made)
    except OSError as error:
        raise ToolchainError(f"kernels cannot be compiled: {error}") from error
