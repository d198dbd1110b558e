"""Moves large tensors to huge pages, where they are and while they are used.

A decode step reads every weight once. With pages of 4 KiB a processor has to find 260 000 of them for a gigabyte, which
is far more than it remembers, and its prefetchers stop at the end of each. Huge pages hold 512 times as much.

Linux 6.1 copies memory to huge pages behind its addresses when asked to (`madvise` with MADV_COLLAPSE, see the manual
page). That takes seconds for a few gigabytes, hence a thread of its own. Memory that is mapped from a file stays
as it is: its pages are the page cache's, which file systems with large folios keep together by themselves. Other
systems, older kernels and those with transparent huge pages switched off keep the pages that they have.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Advice to madvise(2), which Python's mmap module does not name.
_COLLAPSE = 25
# Caches and the memory of page addresses hold less than this much.
_LEAST_BYTES = 64 << 20
# Moved by one call: tensors are held so long, and may be freed between.
_PIECE_BYTES = 32 << 20
_THREAD_NAME = "llmopt-huge-pages"


@functools.cache
def huge_page_bytes() -> int:
    """The size of a huge page, 0 where there are none, or where the system's settings forbid them."""
    try:
        allowed = "[never]" not in (_SETTINGS / "enabled").read_text("ascii")
        return int((_SETTINGS / "hpage_pmd_size").read_text("ascii")) if allowed else 0
    except (OSError, ValueError):
        return 0


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _whole_pages(tensor: torch.Tensor) -> range:
    """The addresses of the huge pages that lie within a tensor's memory, one step for each."""
    size, memory = huge_page_bytes(), tensor.untyped_storage()
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
    return range(-(-begin // size) * size, end // size * size, size)


def move_to_huge_pages(tensors: Iterable[torch.Tensor]) -> threading.Thread | None:
    """Begins to move what lies in whole huge pages of the CPU's tensors; None where there is too little of it.

    The thread keeps no tensor from being freed for longer than it takes to move a few pages.
    """
    if not huge_page_bytes():
        return None
    known: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and _whole_pages(tensor):
            known.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    if sum(tensor.untyped_storage().nbytes() for tensor in known.values()) < _LEAST_BYTES:
        return None
    references = [weakref.ref(tensor) for tensor in known.values()]
    thread = threading.Thread(target=_move, args=(references,), name=_THREAD_NAME, daemon=True)
    thread.start()
    return thread


def _move(references: list[weakref.ref[torch.Tensor]]) -> None:
    for reference in references:
        done = 0
        while (tensor := reference()) is not None:
            pages = _whole_pages(tensor)
            piece = pages[done : done + _PIECE_BYTES // pages.step]
            if not piece:
                break
            if _madvise()(piece.start, len(piece) * piece.step, _COLLAPSE) != 0:
                failure = ctypes.get_errno()
                if failure == errno.EINVAL:  # no memory of this kind can be moved, or the kernel knows no such advice
                    break
                if failure != errno.EAGAIN:
                    log.debug("weights stay on small pages: %s", errno.errorcode.get(failure, failure))
                    return
            done += len(piece)
            del tensor
