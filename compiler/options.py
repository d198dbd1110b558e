"""Every setting of llmopt, in one frozen dataclass that is validated once. The only reader of `LLMOPT_*` variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.compiler.errors import OptionError
from llmopt.compiler.kv_formats import KV_CACHE_DTYPES

# Slots of adapters in one program: kMaxSlots of codegen/cpu/kernels/lora.h.
MAX_LORAS = 256

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Options:
    """Settings of a compilation and of the engine around it.

    dtype: "auto" keeps the model's own type; "float32", "bfloat16" or "float16" casts the weights.
    threads: CPU threads of a step; 0 means as many as `torch.get_num_threads()` says at each call.
    block_size: tokens in one page of the KV cache.
    kv_cache_dtype: how the KV cache stores keys and values: "auto" in the model's own type; "fp8" (e4m3), "int8" or
        "int4" quantized, with scales for every token and head.
    kv_cache_memory_bytes: memory of the KV cache; 0 leaves it to `gpu_memory_utilization`.
    gpu_memory_utilization: the fraction of the available memory (of the GPU, or of the machine and its control groups)
        that the KV cache may take, up to what `max_num_seqs` of the longest sequences could hold; on a
        CPU, pages take memory once used.
    swap_space_bytes: memory of the host, besides the KV cache, to which preempted requests' pages may be copied instead
        of being computed again; 0 is none. On a GPU it holds what the GPU's memory does not.
    enable_prefix_caching: requests whose tokens begin alike share the pages of what they have in common.
    max_model_len: longest sequence, prompt included; 0 takes the model's own limit.
    max_num_seqs: requests that are decoded together.
    max_num_batched_tokens: most tokens of one step; longer prompts are prefilled in several.
    max_num_queued: requests that may wait for their first step; 0 is no limit.
    async_scheduling: begin each step before the results of the one before it are handed out, so that what callers do
        with these (text, streaming) goes on beside it. "auto" does so where a GPU computes, not where CPUs do.
    batch_invariant: the logits of a request are the same to the bit alone and in any batch, in whatever chunks its
        prompt is computed, on any number of threads. Step programs only; prefill is slower.
    enable_lora: requests may bring a LoRA adapter each. Step programs only.
    max_loras: adapters that one step may use; others wait for their turn.
    max_lora_rank: largest rank of an adapter.
    enable_prompt_embeds: prompts may be given as embeddings (`{"prompt_embeds": tensor}`). Step programs only.
    disabled_passes: names of passes that are left out (also `LLMOPT_DISABLE`, comma separated).
    fuel: stop rewriting after so many matches, to bisect a wrong result; -1 is unlimited (also `LLMOPT_FUEL`).
    verify: run the graph before and after each pass on random inputs and raise when a pass exceeds its error budget
        (also `LLMOPT_VERIFY=1`). "revert" undoes what exceeded it instead, goes on, and says so in `explain` (also
        `LLMOPT_VERIFY=revert`).
    record_graphs: keep the printed graph before the passes and after each, for `explain`.
    rewrite_log: a file to which every compilation appends one line of JSON about the rewrites it made, the last one in
        full; what bisection reads (also `LLMOPT_REWRITE_LOG`).
    huge_pages: move weights to huge pages of memory, in the background, once a program is called again; decoding mostly
        reads them faster then. Linux 6.1 and newer, weights on the CPU that are not mapped from a file.
    graph_cache: keep compiled graphs, and the step programs of folders, beside the kernels and take them from there in
        later processes (also `LLMOPT_GRAPH_CACHE=0`).
    fallback: what happens to ops without a kernel: "warn" runs them on ATen and says so once, "silent" only records
        it for `explain`, "error" refuses the graph.
    """

    dtype: str = "auto"
    threads: int = 0
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_memory_bytes: int = 0
    gpu_memory_utilization: float = 0.5
    swap_space_bytes: int = 0
    enable_prefix_caching: bool = True
    max_model_len: int = 0
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_num_queued: int = 4096
    async_scheduling: bool | str = "auto"
    batch_invariant: bool = False
    enable_lora: bool = False
    max_loras: int = 4
    max_lora_rank: int = 16
    enable_prompt_embeds: bool = False
    disabled_passes: tuple[str, ...] = ()
    fuel: int = -1
    verify: bool | str = False
    record_graphs: bool = False
    rewrite_log: str = ""
    huge_pages: bool = False
    graph_cache: bool = True
    fallback: str = "silent"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _RULES[field.name](field.name, getattr(self, field.name))

    @staticmethod
    def make(options: Mapping[str, Any] | Options | None = None, **more: Any) -> Options:
        """Options from keyword arguments and the environment; an unknown name raises OptionError.

        What the caller gives wins over the environment.
        """
        if isinstance(options, Options):
            return dataclasses.replace(options, **_checked(more)) if more else options
        return Options(**{**_from_environment(), **_checked({**(options or {}), **more})})

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to cast to, or None to keep the model's."""
        return _DTYPES[self.dtype]


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(Options)]
    for name, val in given.items():
        if name not in known:
            raise OptionError(name, val, known)
    result = dict(given)
    if isinstance(result.get("dtype"), torch.dtype):
        result["dtype"] = str(result["dtype"]).removeprefix("torch.")
    if isinstance(result.get("disabled_passes"), list | set | frozenset):
        result["disabled_passes"] = tuple(result["disabled_passes"])
    return result


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if disabled := os.environ.get("LLMOPT_DISABLE"):
        found["disabled_passes"] = tuple(name.strip() for name in disabled.split(",") if name.strip())
    if fuel := os.environ.get("LLMOPT_FUEL"):
        try:
            found["fuel"] = int(fuel)
        except ValueError:
            raise OptionError("LLMOPT_FUEL", fuel, "a whole number, -1 for unlimited") from None
    if verify := os.environ.get("LLMOPT_VERIFY"):
        if verify not in ("0", "1", "revert"):
            raise OptionError("LLMOPT_VERIFY", verify, ("0", "1", "revert"))
        found["verify"] = verify if verify == "revert" else verify == "1"
    if cache := os.environ.get("LLMOPT_GRAPH_CACHE"):
        if cache not in ("0", "1"):
            raise OptionError("LLMOPT_GRAPH_CACHE", cache, ("0", "1"))
        found["graph_cache"] = cache == "1"
    if log := os.environ.get("LLMOPT_REWRITE_LOG"):
        found["rewrite_log"] = log
    return found


def _whole(least: int, most: int = 1 << 62) -> Callable[[str, Any], None]:
    def check(name: str, val: Any) -> None:
        if not isinstance(val, int) or isinstance(val, bool) or not least <= val <= most:
            limit = f" to {most}" if most < 1 << 62 else " or more"
            raise OptionError(name, val, f"a whole number, {least}{limit}")

    return check


def _fraction(name: str, val: Any) -> None:
    if not isinstance(val, int | float) or isinstance(val, bool) or not 0 < val <= 1:
        raise OptionError(name, val, "a number above 0, up to 1")


def _one_of(*allowed: Any) -> Callable[[str, Any], None]:
    def check(name: str, val: Any) -> None:
        if val not in allowed or isinstance(val, bool) is not isinstance(allowed[0], bool):
            raise OptionError(name, val, allowed)

    return check


def _names(name: str, val: Any) -> None:
    if not isinstance(val, tuple) or not all(isinstance(item, str) for item in val):
        raise OptionError(name, val, "a tuple of pass names")


def _choice(*allowed: bool | str) -> Callable[[str, Any], None]:
    """As `_one_of` for truth values and strings, where 1 is not True."""

    def check(name: str, val: Any) -> None:
        if not any(val is choice or (isinstance(val, str) and val == choice) for choice in allowed):
            raise OptionError(name, val, allowed)

    return check


def _path(name: str, val: Any) -> None:
    if not isinstance(val, str):
        raise OptionError(name, val, "the path of a file as a string, empty for none")


_RULES: dict[str, Callable[[str, Any], None]] = {
    "dtype": _one_of(*_DTYPES),
    "threads": _whole(0, 1024),
    "block_size": _whole(1, 1024),
    "kv_cache_dtype": _one_of(*KV_CACHE_DTYPES),
    "kv_cache_memory_bytes": _whole(0),
    "gpu_memory_utilization": _fraction,
    "swap_space_bytes": _whole(0),
    "enable_prefix_caching": _one_of(True, False),
    "max_model_len": _whole(0),
    "max_num_seqs": _whole(1, 4096),
    "max_num_batched_tokens": _whole(1),
    "max_num_queued": _whole(0),
    "async_scheduling": _choice(True, False, "auto"),
    "batch_invariant": _one_of(True, False),
    "enable_lora": _one_of(True, False),
    "max_loras": _whole(1, MAX_LORAS),
    "max_lora_rank": _whole(1, 512),
    "enable_prompt_embeds": _one_of(True, False),
    "disabled_passes": _names,
    "fuel": _whole(-1),
    "verify": _choice(True, False, "revert"),
    "record_graphs": _one_of(True, False),
    "rewrite_log": _path,
    "huge_pages": _one_of(True, False),
    "graph_cache": _one_of(True, False),
    "fallback": _one_of("silent", "warn", "error"),
}
