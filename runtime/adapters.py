"""LoRA adapters that requests may bring: their names, their content, and the memory that a step reads them from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmopt.compiler.errors import AdapterError, InputError
from llmopt.compiler.step import LoraSpec

Tensor = torch.Tensor

MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for a request: a name of your own, and the folder that PEFT wrote it to.

    The folder is read when a name is first used, and again when its files have changed; requests that run go on with
    what they began with. Raises InputError for a name or path that is no text.
    """

    lora_name: str
    lora_path: str | Path

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not 0 < len(self.lora_name) <= MAX_NAME_LENGTH:
            raise InputError(
                f"lora_name must be a text of 1 to {MAX_NAME_LENGTH} characters, got {self.lora_name!r:.80}"
            )
        if not isinstance(self.lora_path, str | Path):
            raise InputError(f"lora_path must be the path of a folder, got {self.lora_path!r:.80}")


@dataclass(frozen=True)
class AdapterPart:
    """What an adapter does to one product: `scale * (x @ a^T) @ b`, a `[rank, in]`, b `[rank, out]`."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as read for one program.

    key: the digest of its files: equal keys, equal results.
    parts: by the number of the target in `LoraSpec.targets`.
    """

    key: str
    parts: Mapping[int, AdapterPart]


class AdapterPool:
    """The slots of a step program's adapters, as its kernels read them: `[pool, ranks, scales]`, see `LoraSpec`.

    Written in place, between steps. What lies behind an adapter's rank is never read.
    """

    def __init__(self, spec: LoraSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        table = (len(spec.targets), spec.max_loras)
        pool = torch.zeros((spec.max_loras, spec.slot_elements), dtype=spec.dtype, device=device)
        ranks = torch.zeros(table, dtype=torch.int32, device=device)
        self.tensors = [pool, ranks, torch.zeros(table, dtype=torch.float32, device=device)]
        self._held: list[str | None] = [None] * spec.max_loras
        self.num_loads = 0

    def load(self, slot: int, adapter: Adapter) -> None:
        """Puts an adapter into a slot, unless it is there."""
        if self._held[slot] == adapter.key:
            return
        spec, (pool, ranks, scales) = self.spec, self.tensors
        self._held[slot] = None
        numbers = torch.zeros(len(spec.targets), dtype=torch.int32)
        factors = torch.zeros(len(spec.targets))
        for index, part in adapter.parts.items():
            begin, behind = spec.places(index)
            pool[slot, begin : begin + part.a.numel()] = part.a.flatten()
            pool[slot, behind : behind + part.b.numel()] = part.b.flatten()
            numbers[index], factors[index] = len(part.a), part.scale
        ranks[:, slot], scales[:, slot] = numbers.to(ranks.device), factors.to(scales.device)
        self._held[slot] = adapter.key
        self.num_loads += 1


# State of an adapter's files: whoever changes one of them changes this.
Stamp = tuple[tuple[int, int, int], ...]


class Adapters:
    """The adapters of one engine, by name. Threads may share it.

    Args:
        spec: of the program.
        stamp: the state of an adapter's files, to notice changes.
        read: reads a folder for a program.
    """

    def __init__(
        self, spec: LoraSpec, stamp: Callable[[Path], Stamp], read: Callable[[Path, LoraSpec], Adapter]
    ) -> None:
        self._spec, self._stamp, self._read = spec, stamp, read
        self._known: dict[str, tuple[Path, Stamp, Adapter]] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> set[str]:
        """The names that are known."""
        return set(self._known)

    def add(self, request: LoRARequest) -> Adapter:
        """The adapter of that name, read if it is new or its files have changed.

        Raises AdapterError for a name that stands for another folder, and for what cannot be read or does not fit;
        UnsupportedError for an adapter of another kind.
        """
        path = Path(request.lora_path).resolve()
        with self._lock:
            known = self._known.get(request.lora_name)
            if known is not None and known[0] != path:
                raise AdapterError(
                    f"lora_name {request.lora_name!r} is the adapter in {known[0]} already; remove_lora forgets it"
                )
            stamp = self._stamp(path)
            if known is not None and known[1] == stamp:
                return known[2]
            adapter = self._read(path, self._spec)
            self._known[request.lora_name] = path, stamp, adapter
            return adapter

    def remove(self, name: str) -> bool:
        """Forgets a name; whether it was known. Requests that use the adapter go on."""
        with self._lock:
            return self._known.pop(name, None) is not None
