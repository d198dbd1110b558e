"""The linear kernel against this machine's limits and against torch.nn.functional.linear, interleaved.

    python benchmarks/kernels_linear.py --dtype bfloat16 --k 2048 --n 8192 --rows 1 8 512

Every run walks through several copies of the weight, together larger than any cache. The columns: the kernel's time;
the weight bytes per second and their share of a pure read loop; operations per second and their share of the float
multiply-add peak; how many times faster than PyTorch. Each figure stands on the best of the rounds, which is what least
depends on whatever else the machine does.
"""

from __future__ import annotations

import argparse

import torch
from machine_limits import Limits, interleave, kernel_plan

CPP_TYPE = {"float32": "float", "bfloat16": "llmopt::bf16", "float16": "llmopt::f16"}


def measure(rows: int, k: int, n: int, dtype: str, rounds: int, limits: Limits, megabytes: int) -> str:
    """One line of the table."""
    kind = getattr(torch, dtype)
    weight_bytes = n * k * kind.itemsize
    copies = max(1, -(-(megabytes << 20) // weight_bytes)) if rows <= 32 else 2
    weights = [torch.randn(n, k).to(kind) for _ in range(copies)]
    x = torch.randn(rows, k).to(kind)
    out = torch.empty(rows, n, dtype=kind)
    source = f'#include "linear.h"\nLLMOPT_KERNEL(bench) {{ llmopt::linear<{CPP_TYPE[dtype]}>(args, worker); }}\n'
    run = kernel_plan(source, "bench", [x, out, weights[0], None], [rows, k, k, n, 1, n])

    def ours() -> None:
        for weight in weights:
            run([x, out, weight, None])

    def theirs() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        seconds = interleave({"ours": ours, "read": limits.read, "fma": limits.multiply_add, "torch": theirs}, rounds)
        error = (out.float() - torch.nn.functional.linear(x.float(), weights[-1].float())).abs().max().item()
    if error > 0.05 * k**0.5:
        raise RuntimeError(f"wrong result: off by {error}")
    moved, flop = copies * weight_bytes, copies * 2 * rows * n * k
    best = {name: min(times) for name, times in seconds.items()}
    each = best["ours"]
    return (
        f"{rows:5d} {each / copies * 1e3:9.3f} {moved / each / 1e9:8.2f} "
        f"{(moved / each) / (limits.bytes / best['read']):7.3f} "
        f"{flop / each / 1e9:9.1f} {(flop / each) / (limits.flop / best['fma']):7.3f} {best['torch'] / each:8.2f}x"
    )


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(CPP_TYPE), default="bfloat16")
    parser.add_argument("--k", type=int, default=2048, help="input features")
    parser.add_argument("--n", type=int, default=8192, help="output features")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=256, help="weights that one run walks through")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = Limits(options.megabytes, options.threads)
    print(f"linear {options.dtype} K={options.k} N={options.n}, {options.threads} threads, torch {torch.__version__}")
    print(" rows   time ms     GB/s  of read   GFLOP/s of peak  vs torch")
    for rows in options.rows:
        print(measure(rows, options.k, options.n, options.dtype, options.rounds, limits, options.megabytes), flush=True)


if __name__ == "__main__":
    main()
