"""Launches of fused loops."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from llmopt.codegen.index import evaluate
from llmopt.codegen.loops.ir import LoopKernel
from llmopt.codegen.loops.print_triton import print_triton, walks
from llmopt.codegen.triton.calls import ceil_div, power
from llmopt.codegen.triton.launch import Launch, index_type

_ELEMENTS = 1024  # of a tile


@functools.lru_cache(1024)
def _printed(kernel: LoopKernel) -> str:
    return print_triton(kernel)


_walks = functools.lru_cache(1024)(walks)


def loop_launches(
    kernel: LoopKernel, tensors: Sequence[torch.Tensor], ints: Sequence[int], status: torch.Tensor
) -> list[Launch]:
    """One launch for each nest; `tensors` are the buffers and `ints` the values of the symbols, in order."""
    sizes = dict(zip(kernel.symbols, ints, strict=True))
    source = _printed(kernel)
    made = []
    for number, walk in enumerate(_walks(kernel)):
        rows, inner = evaluate(walk.rows, sizes), evaluate(walk.inner, sizes)
        # A sweep whose length is read from its row counts as one of a few vectors.
        rblock = 1 if walk.inner == 1 else min(_ELEMENTS, power(inner)) if inner else 64
        xblock = max(1, min(_ELEMENTS // rblock, power(max(1, rows))))
        reach = max([rows * max(inner, 1), *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        constants = {"INDEX": index_type(reach), "XBLOCK": xblock, "RBLOCK": rblock}
        args = (*tensors, status, *ints, rows)
        made.append(Launch(f"nest{number}", (ceil_div(rows, xblock),), args, constants, source=source))
    return made
