"""Decode steps as CUDA graphs: captured once for each padded batch size, then replayed with one launch.

Kernel launches cost more time on the CPU than a small model's decode step takes on the GPU. All kernels have grids that
depend on shapes alone, so a step that was captured for B requests serves every step of at most B requests that decode
one token each: what is missing is filled up with requests of one token that are not stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.step_batch import StepBatch

Tensor = torch.Tensor

PADDED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # requests of a captured step


def is_decode(batch: StepBatch) -> bool:
    """Whether every request of a batch computes one token, which has an id, and wants its logits."""
    requests = batch.seq_lens.shape[0]
    return batch.prompt_embeds is None and batch.input_ids.shape[0] == requests == batch.logits_indices.shape[0]


def padded_size(requests: int) -> int | None:
    """The captured size that serves so many requests, None when there are too many."""
    return next((size for size in PADDED_SIZES if size >= requests), None)


def pad_decode(batch: StepBatch, size: int, width: int) -> StepBatch:
    """A decode batch filled up to `size` requests and block tables of `width` pages.

    A filler is a request of one token (id 0, position 0) over page 0, of which nothing is stored: slot -1.
    """
    count, pages = batch.block_tables.shape

    def table(tensor: Tensor) -> Tensor:
        wider = tensor.new_zeros((size, width))
        wider[:count, :pages] = tensor
        return wider

    def filled(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((size - count,), value)])

    return StepBatch(
        filled(batch.input_ids, 0),
        filled(batch.positions, 0),
        filled(batch.slot_mapping, -1),
        torch.arange(size + 1, dtype=batch.cu_seqlens_q.dtype),
        filled(batch.seq_lens, 1),
        table(batch.block_tables),
        torch.arange(size, dtype=batch.logits_indices.dtype),
        None if batch.window_slot_mapping is None else filled(batch.window_slot_mapping, -1),
        None if batch.window_block_tables is None else table(batch.window_block_tables),
        None if batch.adapter_index is None else filled(batch.adapter_index, -1),
    )


def _fields(batch: StepBatch) -> tuple[str, ...]:
    """The names of the fields that a batch has."""
    return tuple(field.name for field in fields(StepBatch) if getattr(batch, field.name) is not None)


def _tensors(batch: StepBatch) -> list[Tensor]:
    return [getattr(batch, name) for name in _fields(batch)]


@dataclass
class _Captured:
    """A graph, what its kernels read, and where its logits lie."""

    graph: Any
    inputs: StepBatch
    logits: Tensor


# What one graph serves: requests, pages of their block tables, and the fields that its batch has.
_Kind = tuple[int, int, tuple[str, ...]]


class DecodeGraphs:
    """The captured decode steps of one program, for each KV cache that it is used with.

    Graphs hold the addresses of weights and caches: those of other weights are dropped, those of a cache end with it.
    Their temporary values share memory, for they run one at a time.

    Args:
        run: (batch on the device, cache) -> logits on the device, launching kernel by kernel.
    """

    def __init__(self, run: Callable[[StepBatch, KVCache], Tensor]) -> None:
        self._run = run
        self._captured: weakref.WeakKeyDictionary[KVCache, dict[_Kind, _Captured]] = weakref.WeakKeyDictionary()
        self._weights_version = -1
        self.replays = 0

    def __call__(self, batch: StepBatch, cache: KVCache, executable: Any) -> Tensor | None:
        """Logits of a decode step on the CPU, or None for a step that is none, or is too large.

        Raises KernelError as the executable does.
        """
        if executable.device.type != "cuda" or not is_decode(batch):
            return None
        requests = batch.seq_lens.shape[0]
        size = padded_size(requests)
        if size is None:
            return None
        if executable.weights_version != self._weights_version:
            self._captured.clear()
            self._weights_version = executable.weights_version
        width = 1 << max(0, batch.block_tables.shape[1] - 1).bit_length()
        padded = pad_decode(batch, size, width)
        graphs = self._captured.setdefault(cache, {})
        kind = (size, width, _fields(padded))
        captured = graphs.get(kind)
        if captured is None:
            captured = graphs[kind] = self._capture(padded, cache, executable)
        for mine, given in zip(_tensors(captured.inputs), _tensors(padded), strict=True):
            mine.copy_(given, non_blocking=True)
        captured.graph.replay()
        self.replays += 1
        executable.check()
        return captured.logits[:requests].cpu()

    def _capture(self, batch: StepBatch, cache: KVCache, executable: Any) -> _Captured:
        """Runs a step once, which compiles its kernels, then captures it. The fillers' effect on the cache is none;
        the requests' own keys are written again, to the same values, when the graph is replayed."""
        device = executable.device
        inputs = StepBatch(**{name: getattr(batch, name).to(device) for name in _fields(batch)})
        # The device's own stream: PyTorch's for captures belongs to the device on which the first one was made.
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._run(inputs, cache)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._shared_pool(), stream=stream, capture_error_mode="thread_local"):
                logits = self._run(inputs, cache)
        return _Captured(graph, inputs, logits)

    def _shared_pool(self) -> Any:
        """The memory of the graphs that there are, None for none: PyTorch takes no pool again that all have left."""
        return next((each.graph.pool() for graphs in self._captured.values() for each in graphs.values()), None)
