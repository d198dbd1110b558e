"""The lora kernel beside the products that it adds to: the layers of a Llama-3.2-1B shape, adapters on all of them.

    python benchmarks/kernels_lora.py --rows 1 8 128 --rank 16 --adapters 0 1 4 8

One native call computes all products of some layers, each followed by what the adapters add. The columns: time of the
products, of the adapters, and the share of the latter. Each figure stands on the best of the rounds, in which all
numbers of adapters take turns.
"""

from __future__ import annotations

import argparse

import torch

from llmopt.codegen.cpu.native import ABSENT, PUSH, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.toolchain import build_library

CPP_TYPE = {"float32": "float", "bfloat16": "llmopt::bf16"}
HIDDEN, INNER, KEYS = 2048, 8192, 512
# K, and the sizes of projections that are merged: query, key, value; output; gate, up; down.
PRODUCTS = ((HIDDEN, (HIDDEN, KEYS, KEYS)), (HIDDEN, (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)))


class Layers:
    """The products of some layers for `rows` rows, with as many slots as `adapters` has at most."""

    def __init__(self, layers: int, rows: int, rank: int, slots: int, dtype: str) -> None:
        kind, cpp = getattr(torch, dtype), CPP_TYPE[dtype]
        sources = [
            f'#include "{name}.h"\nLLMOPT_KERNEL(bench_{name}) {{ llmopt::{name}<{cpp}>(args, worker); }}\n'
            for name in ("linear", "lora")
        ]
        some = (torch.randn(1 << 20) * 0.02).to(kind)
        self.index = torch.full((rows,), -1, dtype=torch.int32)
        self.tensors: list[torch.Tensor] = []
        calls = []
        for k, sizes in PRODUCTS * layers:
            n, parts, end = sum(sizes), [], 0
            for number, size in enumerate(sizes):
                parts += [number, sum(sizes[:number]), size, end]
                end += rank * (k + size)
            weights = [some.repeat(-(-size * k // len(some)))[: size * k] for size in sizes]
            pool = some.repeat(-(-slots * end // len(some)))[: slots * end]
            x, out = torch.randn(rows, k).to(kind), torch.empty(rows, n, dtype=kind)
            ranks, scales = torch.full((len(sizes), slots), rank, dtype=torch.int32), torch.ones(len(sizes), slots)
            space = torch.empty(128 + 4 * rows * (1 + len(sizes) * rank), dtype=torch.uint8)
            operands = [t for weight in weights for t in (self._operand(weight), ABSENT)]
            product = [rows, k, k, n, len(sizes), *sizes]
            added = [rows, k, k, n, n, n, slots, end, rank, len(sizes), *parts]
            shared = [self._operand(t) for t in (x, out)]
            rest = [self._operand(t) for t in (self.index, pool, ranks, scales, space)]
            calls.append(self._call("bench_linear", [*shared, *operands], product))
            calls.append(self._call("bench_lora", [shared[0], ABSENT, shared[1], *rest], added))
        self.plan = NativePlan(build_library(sources), calls)

    def _operand(self, tensor: torch.Tensor) -> TensorOperand:
        self.tensors.append(tensor)
        return TensorOperand(len(self.tensors) - 1)

    @staticmethod
    def _call(entry: str, operands: list[TensorOperand], ints: list[int]) -> NativeCall:
        return NativeCall(entry, tuple(operands), tuple((PUSH, number) for number in ints), ())

    def seconds(self, adapters: int, threads: int) -> tuple[float, float]:
        """Of the products, and of what `adapters` adapters in turn add to them."""
        rows = torch.arange(len(self.index), dtype=torch.int32)
        self.index.copy_(rows % adapters if adapters else torch.full_like(rows, -1))
        self.plan.profile(True)
        self.plan.run([tensor.data_ptr() for tensor in self.tensors], [], threads)
        return float(self.plan.seconds[::2].sum()), float(self.plan.seconds[1::2].sum())


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(CPP_TYPE), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2, help="together larger than any cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.layers} layers, {options.dtype}, rank {options.rank}, {options.threads} threads")
    print(" rows  adapters  products ms  adapters ms   share")
    for rows in options.rows:
        layers = Layers(options.layers, rows, options.rank, max(1, *options.adapters), options.dtype)
        best = dict.fromkeys(options.adapters, (float("inf"), float("inf")))
        for _ in range(options.rounds + 1):
            for count, so_far in best.items():
                product, added = layers.seconds(count, options.threads)
                best[count] = min(so_far[0], product), min(so_far[1], added)
        for count, (product, added) in best.items():
            print(f"{rows:5d} {count:9d} {product * 1e3:12.2f} {added * 1e3:12.3f} {added / product:7.1%}", flush=True)


if __name__ == "__main__":
    main()
