"""llmopt's Triton kernels and decode step on an NVIDIA GPU against what PyTorch has, part by part.

Every part runs in a process of its own within a time budget and leaves its rows in a JSON file at once, so a run that
is cut off goes on where it stopped; `--again` measures anew. The table of all parts comes last. Beside the times stand
the GPU's own limits, probed in the same process: device-to-device copy (bytes read plus written) and a large cuBLAS
product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROOT, conditions
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

HIDDEN, INTERMEDIATE, HEADS, GROUPS, SIZE = 2048, 8192, 32, 8, 64  # Llama-3.2-1B


def seconds(run: Callable[[], object], budget: float = 0.4) -> float:
    """Median time of one call in seconds, over CUDA graph replays so that launches of small kernels do not count.

    Calls that cannot be captured are timed as they are.
    """
    run()
    torch.cuda.synchronize()
    target: Callable[[], object] = run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        target = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def probe() -> dict[str, float]:
    """Copy bandwidth in GB/s and bf16 product rate in TFLOP/s of this GPU, now."""
    source = torch.randn(1 << 28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / seconds(lambda: a @ b)
    return {"copy_gb_s": copy / 1e9, "gemm_tflop_s": product / 1e12}


def program_of(name: str, sample: tuple[Any, ...]) -> Callable[[], Any]:
    """A call of one op's program on fixed inputs, launched as the executable launches it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from graphs.one_op import one_op_graph  # type: ignore[import-not-found, unused-ignore]

    from llmopt.codegen.lower import lower
    from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)
    from llmopt.compiler.opspec import OPS
    from llmopt.runtime.cuda_executable import CudaExecutable

    graph, tensors = one_op_graph(OPS[name], sample)
    lowered = lower(graph)
    if lowered.program.fallbacks:
        raise RuntimeError(f"{name} runs on ATen: {lowered.program.fallbacks[0].reason}")
    executable = CudaExecutable(lowered.program)
    return lambda: executable(tensors)


def check(ours: Any, reference: torch.Tensor, what: str) -> None:
    """A wrong kernel has no time."""
    error = float((ours[0].float() - reference.float()).norm() / reference.float().norm())
    if not error < 2e-2:
        raise RuntimeError(f"{what}: relative error {error:.1e}")


def row(name: str, ours: float, peer: float, peer_name: str, moved: float, flops: float) -> Row:
    """One line of the table; times in microseconds."""
    return {
        "name": name,
        "us": ours * 1e6,
        "peer": peer_name,
        "peer_us": peer * 1e6,
        "gb_s": moved / ours / 1e9,
        "tflop_s": flops / ours / 1e12,
    }


def linears(rows: Sequence[int]) -> list[Row]:
    made = []
    shapes = {"qkv": (HIDDEN, 3072), "gate_up": (HIDDEN, 2 * INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}
    shapes["lm_head"] = (HIDDEN, 128256)
    for label, (k, n) in shapes.items():
        # Several copies in turn, so that no weight is still in the L2 cache.
        copies = max(1, -(-(256 << 20) // (2 * n * k)))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        for m in rows:
            x = torch.randn(1, m, k, device="cuda", dtype=torch.bfloat16)
            calls = [program_of("linear", (x, [w], [None])) for w in weights]
            check(calls[0](), F.linear(x, weights[0]), f"{label} {m}")
            ours = seconds(lambda calls=calls: [call() for call in calls]) / copies  # type: ignore[misc]
            peer = seconds(lambda x=x, weights=weights: [F.linear(x, w) for w in weights]) / copies  # type: ignore[misc]
            moved = 2 * (n * k + m * (n + k))
            made.append(row(f"{label} {m} x {k} x {n}", ours, peer, "cuBLAS", moved, 2 * m * n * k))
    return made


def gemv() -> list[Row]:
    return linears((1, 2, 4))


def gemm() -> list[Row]:
    return linears((16, 64, 512, 2048))


def attention_decode() -> list[Row]:
    made = []
    page = 16
    for batch, context in [(1, 512), (1, 8192), (8, 2048), (32, 4096)]:
        pages = -(-context // page)
        make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        q, k, v = make(1, batch, HEADS, SIZE), make(1, batch, GROUPS, SIZE), make(1, batch, GROUPS, SIZE)
        caches = [make(batch * pages, GROUPS, page, SIZE) for _ in range(2)]
        table = torch.randperm(batch * pages).int().view(batch, pages)
        slots = table[:, (context - 1) // page].long() * page + (context - 1) % page
        starts, lengths = torch.arange(batch + 1).int(), torch.full((batch,), context).int()
        indices = [t.cuda() for t in (slots, table, starts, lengths)]
        call = program_of("paged_attention", (q, k, v, *caches, *indices, SIZE**-0.5, 0.0, 0, None, None))
        result = call()
        keys, values = (c[indices[1].long()].transpose(2, 3).flatten(1, 2)[:, :context].transpose(1, 2) for c in caches)
        dense = [t.contiguous() for t in (q[0][:, :, None], keys, values)]
        attend = partial(F.scaled_dot_product_attention, dense[0], dense[1], dense[2], enable_gqa=True)
        check(result, attend()[:, :, 0][None], f"decode attention {batch} x {context}")
        moved = 2 * 2 * batch * context * GROUPS * SIZE
        peer = seconds(attend)
        flops = 4 * batch * context * HEADS * SIZE
        made.append(
            row(f"batch {batch}, context {context}, with kv_write", seconds(call), peer, "SDPA dense", moved, flops)
        )
    return made


def attention_prefill() -> list[Row]:
    made = []
    for length, heads, groups, size in [(512, 32, 8, 64), (4096, 32, 8, 64), (4096, 32, 8, 128), (8192, 32, 8, 128)]:
        make = lambda h: torch.randn(1, length, h, size, device="cuda", dtype=torch.bfloat16)  # noqa: B023, E731
        q, k, v = make(heads), make(groups), make(groups)
        call = program_of("attention", (q, k, v, None, True, size**-0.5, 0.0, 0, None, None))
        parts = [t.transpose(1, 2) for t in (q, k, v)]
        attend = partial(F.scaled_dot_product_attention, parts[0], parts[1], parts[2], is_causal=True, enable_gqa=True)
        check(call(), attend().transpose(1, 2), f"prefill attention {length}")
        flops = 2 * length * length * heads * size  # half of it is hidden by causality
        moved = 2 * length * size * 2 * (heads + groups)
        made.append(row(f"causal {length}, D {size}", seconds(call), seconds(attend), "SDPA", moved, flops))
    return made


def decode_1b() -> list[Row]:
    """Batch 1 at a context of 512 tokens, whole steps with argmax, host to host."""
    from decode_cpu import build_model, bytes_per_token
    from peers import Decoder, StepDecoder, inductor_decoder

    model = build_model(16, torch.bfloat16).cuda()
    prompt = torch.randint(0, model.config.vocab_size, (512,)).tolist()
    steps = 64
    torch._inductor.config.triton.cudagraphs = True
    made: dict[str, tuple[float, float]] = {}
    decoders: dict[str, Callable[[], Decoder]] = {
        "llmopt": lambda: StepDecoder(model, 512 + steps),
        "static cache + Inductor": lambda: inductor_decoder(model, 512 + steps, prefill="eager"),
    }
    for name, make in decoders.items():
        decoder = make()
        decoder.prefill(prompt)
        decoder.decode(steps)  # compiles, captures, warms up
        begin = time.perf_counter()
        decoder.prefill(prompt)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        decoder.decode(steps)
        torch.cuda.synchronize()
        made[name] = (middle - begin, (time.perf_counter() - middle) / steps)
    moved = bytes_per_token(model, 512)
    flops = 2.0 * moved / 2
    (prefill, step), (peer_prefill, peer_step) = made["llmopt"], made["static cache + Inductor"]
    return [
        row("step of one token", step, peer_step, "static cache + Inductor", moved, flops),
        row("prefill of 512 tokens", prefill, peer_prefill, "static cache, eager", moved, flops * 512),
    ]


# Part -> (what it measures, seconds it may take).
PARTS: dict[str, tuple[Callable[[], list[Row]], int]] = {
    "gemv": (gemv, 150),
    "gemm": (gemm, 240),
    "attention_decode": (attention_decode, 150),
    "attention_prefill": (attention_prefill, 150),
    "decode_1b": (decode_1b, 420),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="JSON file of all rows")
    parser.add_argument("--again", action="store_true", help="measure parts anew that the file already has")
    parser.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)  # the child process of a part
    return parser.parse_args(arguments)


def load(path: Path) -> dict[str, Any]:
    """What earlier runs left, an empty record otherwise."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1), "utf-8")
    temporary.replace(path)


def run_part(name: str, budget: int, path: Path) -> dict[str, Any]:
    """One part in a process of its own; what went wrong is part of the record."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--out", str(path)]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=budget, check=False, env=dict(os.environ)
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {budget} s"}
    if answer.returncode != 0:
        return {"failed": answer.stderr.strip().splitlines()[-1][:300] if answer.stderr.strip() else "no message"}
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def print_rows(record: dict[str, Any]) -> None:
    """The table of everything in a record."""
    for name, part in record.items():
        if "failed" in part:
            Console().print(f"[red]{name}: {part['failed']}")
            continue
        limits = part["limits"]
        speeds = f"copies {limits['copy_gb_s']:.0f} GB/s, cuBLAS {limits['gemm_tflop_s']:.0f} TFLOP/s"
        title = f"{name} on {part['gpu']}: {speeds}"
        table = Table("", "µs", "peer", "peer µs", "times as fast", "of copy", "of cuBLAS", title=title)
        for item in part["rows"]:
            table.add_row(
                item["name"],
                f"{item['us']:.1f}",
                item["peer"],
                f"{item['peer_us']:.1f}",
                f"{item['peer_us'] / item['us']:.2f}",
                f"{item['gb_s'] / limits['copy_gb_s']:.0%}",
                f"{item['tflop_s'] / limits['gemm_tflop_s']:.0%}",
            )
        Console(width=140).print(table)


def main() -> int:
    options = parse()
    path = options.out if options.out.is_absolute() else ROOT / options.out
    if not torch.cuda.is_available():
        print("gpu_bench needs an NVIDIA GPU and a PyTorch with CUDA", file=sys.stderr)
        return 2
    if options.one:
        limits = probe()
        torch.cuda.empty_cache()
        rows = PARTS[options.one][0]()
        gpu = torch.cuda.get_device_name()
        print(json.dumps({"gpu": gpu, "limits": limits, "rows": rows, "conditions": conditions(gpu=gpu)}))
        return 0
    record = load(path)
    for name in options.parts:
        if not options.again and "rows" in record.get(name, {}):
            print(f"{name}: already in {path.name}; --again measures anew")
            continue
        print(f"{name} (at most {PARTS[name][1]} s)", flush=True)
        record[name] = run_part(name, PARTS[name][1], path)
        save(record, path)
    print_rows(record)
    return int(any("failed" in part for part in record.values()))


if __name__ == "__main__":
    sys.exit(main())
