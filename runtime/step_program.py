"""A compiled step of a language model: tokens of many requests in, logits of the wanted rows out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llmopt.codegen.cpu.largest import with_largest
from llmopt.codegen.index import Index
from llmopt.codegen.program import Program
from llmopt.compiler.errors import InputError
from llmopt.compiler.step import EMBEDS_INPUTS, CacheSpec, EmbedsSpec, LoraSpec, group_windows, step_inputs
from llmopt.runtime.adapters import AdapterPool
from llmopt.runtime.cuda_executable import make_executable
from llmopt.runtime.cuda_graphs import DecodeGraphs
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.step_batch import StepBatch

Tensor = torch.Tensor


class _Latest(NamedTuple):
    """A call whose arguments are all held by its batch, its cache and the program: as long as these are there, it can
    be made again. `number` is the executable's, `tokens` how many it computes."""

    batch: weakref.ref[StepBatch]
    cache: weakref.ref[KVCache]
    number: int
    tokens: int


class StepProgram:
    """A step program bound to its weights. Threads may share it: steps are taken one at a time.

    Args:
        program: inputs are `step_inputs(caches)` in order, then the caches, K and V of each layer in turn, then with
            `lora` LORA_INPUTS, then EMBEDS_INPUTS where tokens may be given as embeddings; `prompt_embeds` is of which
            kind.
        caches: what each attention layer stores.
        block_size: tokens in one page.
        threads: CPU threads, 0 for PyTorch's number.
        device: where a program for a GPU runs, None for the current GPU.
        lora: the adapters that the program was made for; their memory is `adapters`.
        huge_pages: see `Executable`.

    Raises InputError for a program that takes something else.
    """

    def __init__(
        self,
        program: Program,
        caches: Sequence[CacheSpec],
        block_size: int,
        threads: int = 0,
        device: torch.device | None = None,
        lora: LoraSpec | None = None,
        huge_pages: bool = False,
    ) -> None:
        self.program, self.caches, self.block_size = program, list(caches), block_size
        searching = with_largest(program)
        self.executable = make_executable(searching or program, threads, device, huge_pages)
        self._largest = _Largest() if searching is not None else None
        self.graphs = DecodeGraphs(self.run) if program.target == "cuda" and not program.fallbacks else None
        self.input_names = tuple(step_inputs(caches))
        self._lock = threading.Lock()
        self.adapters = AdapterPool(lora, self.executable.device) if lora is not None else None
        self.prompt_embeds = _embeds_spec(program)
        # Stands for the embeddings of a step that has none.
        size, dtype = (self.prompt_embeds.size, self.prompt_embeds.dtype) if self.prompt_embeds else (0, torch.float32)
        self._no_embeds = torch.zeros((1, size), dtype=dtype, device=self.executable.device)
        self._no_index: dict[int, Tensor] = {}
        self.rows_computed = 0
        self.num_steps = 0
        self._latest: _Latest | None = None
        self._lent: Tensor | None = None

    def bind(self, weights: Sequence[Tensor]) -> None:
        """Sets the weights, in the program's order."""
        with self._lock:
            self.executable.bind(weights)

    def new_cache(self, num_blocks: int | Sequence[int], host_blocks: Sequence[int] | None = None) -> KVCache:
        """An empty KV cache for this program; arguments as those of `KVCache`."""
        return KVCache(self.caches, num_blocks, self.block_size, self.executable.device, host_blocks)

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return sum(self.bytes_per_block_of_groups())

    def bytes_per_block_of_groups(self) -> list[int]:
        """Bytes of one block over the layers of each group."""
        sizes = [0] * len(group_windows(self.caches))
        for spec in self.caches:
            sizes[spec.group] += self.block_size * spec.bytes_per_token()
        return sizes

    @property
    def vocab_size(self) -> Index:
        """V, the width of the logits."""
        return self.program.results[0].sizes[-1]

    def __call__(
        self, batch: StepBatch, cache: KVCache, *, lend: bool = False, adapters: AdapterPool | None = None
    ) -> Tensor:
        """Logits `[R, V]` of the rows that the batch asks for; keys and values of its tokens are in the cache then.

        `adapters` takes the place of the program's own.
        With `lend` the next such call may overwrite them: a step of sizes that were there before allocates nothing. The
        batch of the call before it, whose tensors may hold something else by now, costs hardly more than the kernels.
        One thread at a time may have logits lent; calls without, of any thread, touch nothing that is.
        """
        with self._lock:
            self.num_steps += 1
            latest = self._latest
            if lend and adapters is None and latest is not None and latest.batch() is batch and latest.cache() is cache:
                results = self.executable.again(latest.number)
                if results is not None:
                    self.rows_computed += latest.tokens
                    logits: Tensor = results[0]
                    return logits
            tokens = batch.input_ids.shape[0]
            self.rows_computed += tokens
            self._latest = None
            if lend:
                self._lent = None
            if self.graphs is not None and adapters is None:  # graphs hold the addresses of the program's own
                replayed = self.graphs(batch, cache, self.executable)
                if replayed is not None:
                    return replayed
            logits = self.run(batch, cache, lend=lend, adapters=adapters).cpu()
            if lend and self._largest is not None:
                self._lent = logits
                if adapters is None and (self.adapters is None or batch.adapter_index is not None):
                    # No argument was made for the call alone: what is bound now is still there at the next one.
                    number = self.executable.num_calls
                    self._latest = _Latest(weakref.ref(batch), weakref.ref(cache), number, tokens)
            return logits

    def _without_embeds(self, tokens: int) -> Tensor:
        """The index of a step whose tokens all have ids, in memory that stays: captured graphs hold its address."""
        room = 1 << max(4, (tokens - 1).bit_length())
        if room not in self._no_index:
            self._no_index[room] = torch.full((room,), -1, device=self.executable.device)
        return self._no_index[room][:tokens]

    def largest(self, logits: Tensor) -> tuple[list[float], list[int]] | None:
        """Value and place of the first largest element of each row, for the logits that were lent last.

        A NaN is larger than all. None for other logits, and where the program does not look for them. As the logits
        themselves, the numbers stay until the next call that lends.
        """
        return self._largest.found() if self._largest is not None and logits is self._lent else None

    def run(
        self, batch: StepBatch, cache: KVCache, *, lend: bool = False, adapters: AdapterPool | None = None
    ) -> Tensor:
        """As a call, launched kernel by kernel; logits stay on the program's device."""
        device = self.executable.device
        inputs, rows = batch.inputs(self.input_names), batch.logits_indices.shape[0]
        more: list[Tensor] = []
        if self.adapters is not None:
            index = batch.adapter_index
            if index is None:
                index = torch.full(batch.input_ids.shape, -1, dtype=torch.int32)
            more = [index, *(adapters or self.adapters).tensors]
        if self.prompt_embeds is not None:
            if batch.prompt_embeds_index is None or batch.prompt_embeds is None:
                more += [self._without_embeds(batch.input_ids.shape[0]), self._no_embeds]
            else:
                more += [batch.prompt_embeds_index, batch.prompt_embeds]
        if device.type != "cpu":
            inputs = [tensor.to(device, non_blocking=True) for tensor in inputs]
            more = [tensor.to(device, non_blocking=True) for tensor in more]
        # Weights follow among the program's arguments; they are bound already.
        rest = [None] * (len(self.program.inputs) - len(inputs) - len(cache.tensors) - len(more))
        found: tuple[Tensor, ...] = ()
        if self._largest is not None:
            found = self._largest.tensors(rows) if lend else _room_for_largest(rows)
        logits: Tensor = self.executable([*inputs, *cache.tensors, *more, *rest, *found], lend=lend)[0]
        return logits


def _embeds_spec(program: Program) -> EmbedsSpec | None:
    """The embeddings that a program takes, None for one that takes none; InputError for a program that is damaged."""
    for value in program.values:
        if (value.kind, value.name) == ("input", EMBEDS_INPUTS[1]):
            size = value.sizes[-1] if len(value.sizes) == 2 else None
            if not isinstance(size, int) or not value.dtype.is_floating_point:
                raise InputError("prompt_embeds are no rows of numbers")
            return EmbedsSpec(size, value.dtype)
    return None


def _room_for_largest(rows: int) -> tuple[Tensor, Tensor]:
    """Values and places of so many rows."""
    return torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)


class _Largest:
    """Where a step that lends its logits writes the largest to, read as numbers: an op of PyTorch would cost more than
    all of them."""

    def __init__(self) -> None:
        self._make_room(16)

    def _make_room(self, rows: int) -> None:
        self._tensors = _room_for_largest(rows)
        self._values, self._places = self._all = [tensor.numpy().data for tensor in self._tensors]

    def tensors(self, rows: int) -> tuple[Tensor, Tensor]:
        """Values and places for the next call, which gives so many rows."""
        if rows > len(self._all[0]):
            self._make_room(rows)
        self._values, self._places = (numbers[:rows] for numbers in self._all)
        return self._tensors

    def found(self) -> tuple[list[float], list[int]]:
        """What the latest call found, row by row."""
        values: list[Any] = self._values.tolist()  # of floats, which typeshed does not know
        return values, self._places.tolist()


__all__ = ["StepBatch", "StepProgram"]
