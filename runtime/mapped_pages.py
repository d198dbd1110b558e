"""Gives pages of mapped safetensors files back to the system once what they hold has been copied.

A page of a mapped file that was read counts as resident memory of the process. The kernel may take it back at any time,
but does so only under pressure; until then a model whose weights are computed from mapped ones would stand in memory
twice. Linux only; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor
aten = torch.ops.aten

_MAPS = Path("/proc/self/maps")
# Less is not worth a look at the list of mappings.
_LEAST_BYTES = 1 << 16


class MappedPages:
    """The mapped files that were met, kept mapped: an address in one of them cannot come to mean something else."""

    def __init__(self) -> None:
        self._known: list[tuple[int, int, torch.UntypedStorage]] = []
        self._madvise: Any = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None) if _MAPS.exists() else None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a mapped safetensors file."""
        if self._madvise is None or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return False
        if tensor.layout is not torch.strided or tensor.nbytes < _LEAST_BYTES:
            return False
        address = tensor.data_ptr()
        if any(begin <= address < end for begin, end, _ in self._known):
            return True
        for begin, end in _file_mappings():
            if begin <= address < end:
                self._known.append((begin, end, tensor.untyped_storage()))
                return True
        return False

    def release(self, tensor: Tensor) -> None:
        """Drops the resident pages that hold nothing but this tensor, if it lies in a mapped file and is dense.

        Whoever reads it again reads the file again; what was written to it, which the file does not have, is lost.
        """
        if not self.holds(tensor) or not tensor.is_contiguous():
            return
        page = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > begin:
            self._madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _file_mappings() -> Iterator[tuple[int, int]]:
    for line in _MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            begin, _, end = line.split(" ", 1)[0].partition("-")
            yield int(begin, 16), int(end, 16)


@contextmanager
def released_once_copied() -> Iterator[None]:
    """Within the block, in this thread: tensors in mapped files that an op makes something new of let their pages go.

    Views of such tensors stay what they are, and once anything is written to one, all files keep their pages.
    """
    with _Release():
        yield
    _return_free_memory()


# Ops that read all of their arguments and need them no longer.
_COPIES = frozenset(
    (aten._to_copy.default, aten.clone.default, aten.copy_.default, aten.stack.default, aten.cat.default)
)
# Bytes of copies after which the allocator is asked to return what it keeps.
_RETURN_AFTER = 32 << 20


class _Release(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._pages = MappedPages()
        self._written = False
        self._copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Most calls make views or describe weights, and there are many of them.
        if self._written or not (func in _COPIES or func._schema.is_mutable):
            return func(*args, **(kwargs or {}))
        held = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and self._pages.holds(leaf)]
        result = func(*args, **(kwargs or {}))
        targets = [arg for arg, schema in zip(args, func._schema.arguments, strict=False) if schema.is_write]
        self._written = any(target is tensor for target in targets for tensor in held)
        if held and func in _COPIES and not self._written:
            for tensor in held:
                self._pages.release(tensor)
                self._copied += tensor.nbytes
            if self._copied >= _RETURN_AFTER:
                self._copied = 0
                _return_free_memory()
        return result


def _return_free_memory() -> None:
    """What a weight was merged from is freed in pieces, which glibc keeps for later allocations of their size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
