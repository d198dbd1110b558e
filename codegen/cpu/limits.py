"""What this machine can do at best: memory reads and multiply-adds, measured by kernels as llmopt compiles them.

A shared machine's memory speed swings by half within minutes, so a figure in GB/s means little alone: probe in the same
minute as whatever is compared with it, and state ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmopt.codegen.cpu.native import PUSH, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.toolchain import build_library, host_level

_PROBES = r"""
#include "simd.h"
#include "abi.h"
using namespace llmopt;

// tensors: data, sink [workers * kLanes] float; ints: bytes. Sums all of the data with four vector accumulators.
LLMOPT_KERNEL(read_memory) {
  const Range mine = share(worker, args.ints[0], 4 * kVectorBytes);
  const char* p = args.tensor<const char>(0);
  vi sum[4] = {};
  for (std::int64_t i = mine.begin; i + 4 * kVectorBytes <= mine.end; i += 4 * kVectorBytes)
    for (int j = 0; j < 4; ++j) {
      vi v;
      std::memcpy(&v, p + i + j * kVectorBytes, sizeof v);
      sum[j] += v;
    }
  const vi total = sum[0] + sum[1] + sum[2] + sum[3];
  std::memcpy(args.tensor<float>(1) + worker.index * kLanes, &total, sizeof total);
}

// tensors: sink [workers * kLanes] float; ints: iterations of kChains multiply-adds of kLanes lanes on each worker.
constexpr int kChains = 12;  // covers latency 4 on three pipes, and fits 16 registers
LLMOPT_KERNEL(multiply_add) {
  vf acc[kChains], a = splat(0.5f), b = splat(1.0f + static_cast<float>(worker.index));
  for (int j = 0; j < kChains; ++j) acc[j] = splat(static_cast<float>(j));
  const std::int64_t iterations = args.ints[0];
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) acc[j] = fma(acc[j], a, b);
  }
  for (int j = 1; j < kChains; ++j) acc[0] += acc[j];
  store(args.tensor<float>(0) + worker.index * kLanes, acc[0]);
}

// The same in bfloat16: each lane adds two products. Zero where the processor has no such instruction.
LLMOPT_KERNEL(multiply_add_bfloat16) {
#if defined(__AVX512BF16__)
  vf acc[kChains];
  const vu a = vu{} + (0x3f003f00u + 0x10001u * static_cast<std::uint32_t>(worker.index));
  for (int j = 0; j < kChains; ++j) acc[j] = splat(static_cast<float>(j));
  const std::int64_t iterations = args.ints[0];
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) acc[j] = x86::dot_bf16(acc[j], a, a);
  }
  for (int j = 1; j < kChains; ++j) acc[0] += acc[j];
  store(args.tensor<float>(0) + worker.index * kLanes, acc[0]);
#endif
}
"""

_ITERATIONS = 4_000_000  # about 15 ms
_CHAINS = 12  # kChains
_LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "portable": 4}  # floats in a vector at each level


def kernel_plan(
    source: str, entry: str, tensors: Sequence[torch.Tensor | None], ints: Sequence[int], floats: Sequence[float] = ()
) -> Callable[..., None]:
    """Compiles `source` and returns `run(other=None, threads=None)`, which runs `entry`.

    `other` are tensors to use in place of `tensors`; `threads` is PyTorch's number when None.
    """
    operands = tuple(TensorOperand(-1 if t is None else i) for i, t in enumerate(tensors))
    call = NativeCall(entry, operands, tuple((PUSH, int(i)) for i in ints), tuple(floats))
    plan = NativePlan(build_library([source]), [call])
    default = [0 if t is None else t.data_ptr() for t in tensors]

    def run(
        other: Sequence[torch.Tensor | None] | None = None, threads: int | None = None, _kept: Any = tensors
    ) -> None:
        bases = default if other is None else [0 if t is None else t.data_ptr() for t in other]
        plan.run(bases, [], threads)

    return run


class Limits:
    """Runnable probes: `read()` passes once over `bytes` bytes of memory, `multiply_add()` performs `flop` operations.

    Both use `threads` threads (PyTorch's number when None).
    """

    def __init__(self, megabytes: int = 256, threads: int | None = None) -> None:
        threads = threads or torch.get_num_threads()
        self.bytes = megabytes << 20
        self._data = torch.ones(self.bytes // 4, dtype=torch.int32)
        self._sink = torch.zeros(threads, max(_LANES.values()))
        self._read = kernel_plan(_PROBES, "read_memory", [self._data, self._sink], [self.bytes])
        self._fma = kernel_plan(_PROBES, "multiply_add", [self._sink], [_ITERATIONS])
        self._dot = kernel_plan(_PROBES, "multiply_add_bfloat16", [self._sink], [_ITERATIONS])
        self._threads = threads
        self.multiply_add()
        given = int(self._sink.flatten()[:: _LANES[host_level().name]].count_nonzero())  # each worker wrote its vector
        self.flop = 2 * _LANES[host_level().name] * _CHAINS * _ITERATIONS * given

    def read(self) -> None:
        self._read(threads=self._threads)

    def multiply_add(self) -> None:
        self._fma(threads=self._threads)

    def multiply_add_bfloat16(self) -> None:
        """Twice as many operations, where the processor has them."""
        self._dot(threads=self._threads)


def probe(threads: int | None = None, megabytes: int = 256, rounds: int = 4) -> tuple[float, dict[str, float]]:
    """(bytes read per second / 1e9, operations per second / 1e9 by dtype): the best of `rounds` readings each."""
    limits = Limits(megabytes, threads)

    def best(run: Callable[[], None], amount: int) -> float:
        run()
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return amount / min(seconds) / 1e9

    peaks = {"float32": best(limits.multiply_add, limits.flop)}
    if host_level().name == "avx512_bf16":
        peaks["bfloat16"] = best(limits.multiply_add_bfloat16, 2 * limits.flop)
    return best(limits.read, limits.bytes), peaks
