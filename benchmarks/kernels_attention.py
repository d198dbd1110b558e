"""The paged attention kernel against this machine's limits and PyTorch's scaled_dot_product_attention, interleaved.

    python benchmarks/kernels_attention.py --dtype bfloat16 float32 --prefill 512 --decode 512 4096

Every run walks through the caches of several layers, in decode together larger than any cache of the processor, in one
native call. PyTorch is measured in the two ways it can be called, with `enable_gqa` and with keys and values expanded
beforehand (not timed), and the faster counts. Operations are those of a causal mask (what is masked does not count);
bytes are the keys and values, once. Each figure stands on the best of the rounds, which is what least depends on
whatever else runs.
"""

from __future__ import annotations

import argparse

import torch
from machine_limits import Limits, interleave

from llmopt.codegen.cpu.native import ABSENT, PUSH, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.toolchain import build_library

CPP_TYPE = {"float32": "float", "bfloat16": "llmopt::bf16", "float16": "llmopt::f16"}
BLOCK_SIZE = 16


def measure(
    queries: int, context: int, dtype: str, shape: tuple[int, int, int], rounds: int, limits: Limits, megabytes: int
) -> str:
    """One line of the table: one sequence of `context` keys, `queries` of them new; shape = heads, kv heads, size."""
    heads, groups, dim = shape
    kind = getattr(torch, dtype)
    read = 2 * groups * context * dim * kind.itemsize
    layers = max(2, -(-(megabytes << 20) // read)) if queries == 1 else 2
    blocks = -(-context // BLOCK_SIZE)
    q = torch.randn(queries, heads, dim).to(kind)
    out = torch.empty_like(q)
    # The pages of a sequence are scattered over the pool.
    order = torch.randperm(blocks)
    caches = [torch.randn(2, blocks, groups, BLOCK_SIZE, dim).to(kind) for _ in range(layers)]
    table = order.int()[None].contiguous()
    starts, lengths = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    source = f'#include "attention.h"\nLLMOPT_KERNEL(bench) {{ llmopt::attention<{CPP_TYPE[dtype]}>(args, worker); }}\n'
    ints = [1, heads, groups, dim, dim, BLOCK_SIZE, blocks, heads * dim, dim, heads * dim, dim, 0, queries, blocks]
    tensors = [q, table, starts, lengths, out, *(cache[i] for cache in caches for i in (0, 1))]
    calls = [
        NativeCall(
            "bench",
            (*(TensorOperand(i) for i in (0, 5 + 2 * layer, 6 + 2 * layer, 1, 2, 3, 4)), ABSENT, ABSENT),
            tuple((PUSH, value) for value in ints),
            (dim**-0.5, 0.0),
        )
        for layer in range(layers)
    ]
    plan = NativePlan(build_library([source]), calls)

    def contiguous(cache: torch.Tensor) -> torch.Tensor:
        return cache[order].transpose(0, 1).reshape(1, groups, -1, dim)[:, :, :context].contiguous()

    grouped = [(contiguous(cache[0]), contiguous(cache[1])) for cache in caches]
    expanded = [tuple(t.repeat_interleave(heads // groups, 1) for t in pair) for pair in grouped]
    query = q.transpose(0, 1)[None].contiguous()
    causal = queries > 1

    def ours() -> None:
        plan.run([t.data_ptr() for t in tensors], [])

    def torch_grouped() -> None:
        for k, v in grouped:
            torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=causal, enable_gqa=True)

    def torch_expanded() -> None:
        for k, v in expanded:
            torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=causal)

    with torch.inference_mode():
        seconds = interleave(
            {
                "ours": ours,
                "read": limits.read,
                "fma": limits.multiply_add,
                "grouped": torch_grouped,
                "expanded": torch_expanded,
            },
            rounds,
        )
        k, v = (t.float() for t in grouped[-1])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.float(), k, v, is_causal=causal, enable_gqa=True
        )
    error = (out.float() - expected[0].transpose(0, 1)).abs().max().item()
    if error > 0.02:
        raise RuntimeError(f"wrong result: off by {error}")
    best = {name: min(times) for name, times in seconds.items()}
    each = best["ours"] / layers
    theirs = min(best["grouped"], best["expanded"]) / layers
    seen = sum(range(context - queries + 1, context + 1))
    flop = 4 * seen * heads * dim
    return (
        f"{dtype:>9} {queries:5d} {context:6d} {each * 1e3:9.3f} {flop / each / 1e9:9.1f} "
        f"{flop / each / (limits.flop / best['fma']):6.3f} {read / each / 1e9:8.2f} "
        f"{read / each / (limits.bytes / best['read']):6.3f} {theirs * 1e3:9.3f} {theirs / each:7.2f}x"
    )


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=sorted(CPP_TYPE), default=["bfloat16", "float32"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="lengths of prompts")
    parser.add_argument("--decode", type=int, nargs="*", default=[512, 4096], help="contexts of one new token")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=256, help="size of all caches together, in decode")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    limits = Limits(threads=arguments.threads)
    shape = (arguments.heads, arguments.kv_heads, arguments.head_dim)
    print(f"torch {torch.__version__}, {arguments.threads} threads, heads {shape[0]}/{shape[1]}, size {shape[2]}")
    print("    dtype     q   keys        ms    GFLOP/s  /peak     GB/s  /read  torch ms  speedup")
    for dtype in arguments.dtype:
        for queries, context in [(n, n) for n in arguments.prefill] + [(1, n) for n in arguments.decode]:
            print(measure(queries, context, dtype, shape, arguments.rounds, limits, arguments.megabytes), flush=True)


if __name__ == "__main__":
    main()
