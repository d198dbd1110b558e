"""The OpenMP runtime that PyTorch runs on. Its threads are llmopt's too: a second pool would compete for the CPUs."""

from __future__ import annotations

import ctypes
import functools

import torch

from llmopt.compiler.errors import ToolchainError

_NAMES = ("GOMP_parallel", "omp_get_num_threads")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Where the names lead that PyTorch's libraries were linked with.

    The dynamic linker looks among the names that are global in the process, which a preloaded runtime comes first in,
    then in PyTorch's own dependencies. Copies that other packages bring count in neither.
    """
    for path in (None, torch._C.__file__):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if all(hasattr(library, name) for name in _NAMES):
            return library
    return None


@functools.cache
def entries() -> tuple[int, int]:
    """Addresses of GOMP_parallel and omp_get_num_threads.

    Raises ToolchainError for a PyTorch without OpenMP.
    """
    library = _library()
    if library is None:
        raise ToolchainError("PyTorch was built without OpenMP; llmopt's CPU programs need its thread pool")
    first, second = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _NAMES)
    return first, second


@functools.cache
def bound_cpus() -> int | None:
    """CPUs of the places that the runtime binds its threads to (OMP_PROC_BIND, OMP_PLACES); None where it binds none.

    A thread that is bound sees in its affinity mask its own place only.
    """
    library = _library()
    try:
        if library is None or not library.omp_get_proc_bind():
            return None
        cpus: set[int] = set()
        for place in range(library.omp_get_num_places()):
            numbers = (ctypes.c_int * library.omp_get_place_num_procs(place))()
            library.omp_get_place_proc_ids(place, numbers)
            cpus.update(numbers)
    except AttributeError:  # a runtime older than OpenMP 4.5
        return None
    return len(cpus) or None
