"""Which of transformers' models llmopt compiles, and how much of them: a sweep over all causal types, and some others.

Every type is built tiny (`tiny_models.py`) and runs in a process of its own, forked after the imports: eager beside
`torch.compile(..., backend="llmopt", dynamic=True)` in float32, at several shapes and over greedy tokens. Counted are
the graphs, what runs on ATen and why, and the share of the FLOPs of matrix products and attention that llmopt's kernels
compute. Compilers' caches lie beside the records, and types share them.

    python benchmarks/model_coverage.py --jobs 2             # all types; finished ones are not run again
    python benchmarks/model_coverage.py --inductor           # Inductor, for the types without its results
    python benchmarks/model_coverage.py --types llama gpt2 --redo
    python benchmarks/model_coverage.py --table              # only render results/coverage.{json,md}
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from coverage_table import Record, summary, table
from harness import conditions, revision
from tiny_models import FIRST_TOKEN, OTHERS, TYPES, build, class_of, inputs
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from transformers import PreTrainedModel

from llmopt.backend import REPORT
from llmopt.compiler.opspec import spec_of

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "coverage"
RESULTS = Path(__file__).resolve().parent / "results"
Shapes = tuple[tuple[int, int], ...]
SHAPES: Shapes = ((2, 19), (1, 19), (3, 33))  # Dynamo compiles a batch of 1 apart
NEW_TOKENS = 8
TOLERANCE = 2e-3  # largest difference of logits, in standard deviations of eager's

Forward = Callable[[Mapping[str, Any]], Tensor]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    batch, heads, rows, size = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (size + value.shape[-1])


def _grouped_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Rows times the size of one expert's matrix; [T, K] by [E, K, N], or batched."""
    return 2 * left.numel() * int(right.shape[-1])


def _matrix_vector_flops(matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


# Ops that PyTorch's registry does not count, by name.
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "aten._grouped_mm": _grouped_flops,
    "transformers.grouped_mm_fallback": _grouped_flops,
    "aten.mv": _matrix_vector_flops,
    "aten.addmv": lambda bias, matrix, *_, **__: 2 * matrix.numel(),
    "aten.dot": _matrix_vector_flops,
}

# Ops of the vocabulary that are matrix products or attention.
_PRODUCTS = frozenset({"linear", "batched_linear", "grouped_linear", "moe", "attention", "paged_attention"})


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention that reach the dispatcher; convolutions are left out.

    llmopt's kernels do not pass the dispatcher, its fallbacks to ATen do. `FlopCounterMode` would not do: under a mode
    that does not say `ignore_compile_internals`, Dynamo runs the original code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.own: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        name = str(packet)
        if name in _FORMULAS:
            self.flops[name] += _FORMULAS[name](*args, **kwargs)
        elif packet in flop_registry and "conv" not in name:
            self.flops[name] += flop_registry[packet](*args, **kwargs, out_val=result)
        if name.startswith("llmopt."):  # a reference: the mode does not see what it calls
            self.own[name] += 1
            spec = spec_of(func)
            if spec is not None and name.removeprefix("llmopt.") in _PRODUCTS:
                self.flops[name] += int(spec.cost(*args, **kwargs).flops)
        return result

    @property
    def total(self) -> int:
        return sum(self.flops.values())


def _first_line(error: BaseException) -> str:
    """What went wrong, on one line: torch wraps the cause in `backend='llmopt' raised:` and lines of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if "raised:" not in line), "")
    return f"{type(error).__name__}: {text}"[:300]


def _where(error: BaseException) -> str:
    """The last frame of llmopt's own, else the last frame."""
    frames = traceback.extract_tb(error.__traceback__)
    while error.__cause__ is not None:
        error = error.__cause__
        frames += traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    roots = ("llmopt/", "/api/", "/compiler/", "/passes/", "/codegen/", "/runtime/")
    own = [f for f in frames if "site-packages" not in f.filename and any(root in f.filename for root in roots)]
    frame = (own or list(frames))[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"


def _forward_of(model: PreTrainedModel, function: Callable[..., Any]) -> Forward:
    """Calls `function` without a cache, where the model knows the setting."""
    takes_cache = hasattr(model.config.get_text_config(decoder=True), "use_cache")
    refused = False

    def forward(arguments: Mapping[str, Any]) -> Tensor:
        nonlocal refused
        if takes_cache and not refused:
            try:
                return _logits(function(**arguments, use_cache=False))
            except TypeError as error:
                if "use_cache" not in str(error):
                    raise
                refused = True
        return _logits(function(**arguments))

    return forward


def _logits(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["logits_per_image"]


def _greedy(forward: Forward, arguments: Mapping[str, Tensor]) -> list[list[int]] | None:
    """Greedy tokens by full recomputation, special ids left out; one list a row. None for a model without tokens."""
    name = "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
    if name not in arguments or (arguments.keys() & {"attention_mask"} and name == "input_ids"):
        return None
    start = arguments[name].shape[1]
    for _ in range(NEW_TOKENS):
        chosen = forward(arguments)[:, -1, FIRST_TOKEN:256].argmax(-1, keepdim=True) + FIRST_TOKEN
        arguments = {**arguments, name: torch.cat([arguments[name], chosen], 1)}
    return arguments[name][:, start:].tolist()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in standard deviations; infinite where shapes or finiteness differ."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max()) / _spread(theirs)


def _spread(logits: Tensor) -> float:
    """Their standard deviation; of a single one (one text beside one image), its size."""
    return float(logits.std() if logits.numel() > 1 else logits.abs().max())


class Eager:
    """A type's model in eager mode: its forward, logits at each shape, and greedy tokens."""

    def __init__(self, model_type: str, shapes: Shapes) -> None:
        self.model = build(model_type)
        self.forward = _forward_of(self.model, self.model.forward)
        self.logits = {shape: self.forward(inputs(self.model, *shape)) for shape in shapes}
        if not all(bool(e.isfinite().all()) and _spread(e) > 1e-3 for e in self.logits.values()):
            raise ArithmeticError("logits of the eager model are not finite, or all the same")
        self.tokens = _greedy(self.forward, inputs(self.model, *SHAPES[0]))


def _compare(eager: Eager, backend: str, reached: Callable[[str], None]) -> Record:
    """Compiles for one backend; the differences, the tokens and the seconds of the first call."""
    reached(f"{backend}: first call")
    model = eager.model
    forward = _forward_of(model, torch.compile(model.forward, backend=backend, dynamic=True))
    begin = time.perf_counter()
    forward(inputs(model, *SHAPES[0]))
    compile_s = time.perf_counter() - begin
    reached(f"{backend}: other shapes, after a first call of {compile_s:.0f} s")
    differences = [_difference(forward(inputs(model, *s)), e) for s, e in eager.logits.items()]
    reached(f"{backend}: greedy tokens, after differences of {max(differences):.1e}")
    ours = _greedy(forward, inputs(model, *SHAPES[0]))
    return {
        "compile_s": round(compile_s, 2),
        "difference": max(differences),
        "differences": differences,
        "tokens_equal": None if eager.tokens is None else ours == eager.tokens,
        "right": max(differences) <= TOLERANCE,
        "forward": forward,
    }


def _attempt(run: Callable[[], Record]) -> Record:
    """The record of a run, or what it raised."""
    try:
        return run()
    except Exception as error:
        return {"error": _first_line(error), "where": _where(error), "right": False}


def _graphs(record: Record) -> None:
    """Adds what llmopt's report and Dynamo's counters say."""
    record["graphs"] = len(REPORT.graphs)
    record["refused"] = [graph.refused for graph in REPORT.graphs if graph.refused is not None]
    found: Counter[tuple[str, str]] = Counter()
    for graph in REPORT.graphs:
        for fallback in graph.fallbacks:
            found[fallback.op, fallback.reason] += fallback.count
    record["fallbacks"] = [{"op": op, "reason": why, "count": n} for (op, why), n in found.most_common()]
    passes: dict[str, dict[str, Any]] = {}
    for report in (report for graph in REPORT.graphs for report in graph.passes):
        mine = passes.setdefault(report.name, {"matched": 0, "skipped": Counter()})
        mine["matched"] += report.matched
        mine["skipped"].update(report.skipped)
    record["passes"] = passes
    record["graph_breaks"] = sum(counters["graph_break"].values())
    record["graph_break_reasons"] = [re.sub(r"\s+", " ", text)[:200] for text in counters["graph_break"]]


def measure(model_type: str, shapes: Shapes, save: Callable[[Record], None]) -> Record:
    """llmopt's results for one type, in this process. `save` gets what is known so far before each longer step."""
    record: Record = {"type": model_type, "class": class_of(model_type), "revision": revision()}
    record["shapes"] = [list(shape) for shape in shapes]

    def reached(step: str) -> None:
        save(record | {"status": "unfinished", "step": step})

    reached("eager")
    try:
        eager = Eager(model_type, shapes)
        model, forward = eager.model, eager.forward
        record["repeatable"] = torch.equal(forward(inputs(model, *SHAPES[0])), eager.logits[SHAPES[0]])
        with FlopCount() as count:
            forward(inputs(model, *SHAPES[0]))
    except Exception as error:
        return record | {"status": "no eager", "error": _first_line(error), "where": _where(error)}
    record |= {"parameters": sum(p.numel() for p in model.parameters()), "flops": count.total}

    record |= _attempt(lambda: _compare(eager, "llmopt", reached))
    _graphs(record)
    compiled = record.pop("forward", None)
    if compiled is not None:
        with FlopCount() as rest:
            compiled(inputs(model, *SHAPES[0]))
        record["flops_on_aten"] = dict(rest.flops)
        record["own_ops_dispatched"] = dict(rest.own)
        record["flop_share"] = 1.0 - rest.total / count.total if count.total else None
    record["status"] = "right" if record["right"] else "error" if "error" in record else "wrong"
    if not record["right"]:
        for backend in ("eager", "aot_eager"):  # Dynamo or AOTAutograd alone may be what fails
            record[backend] = _peer(eager, backend)
    return record


def _peer(eager: Eager, backend: str) -> Record:
    """Another backend's results, or what it raised."""
    torch._dynamo.reset()
    found = _attempt(lambda: _compare(eager, backend, lambda _: None))
    found.pop("forward", None)
    return found


def measure_inductor(model_type: str, shapes: Shapes) -> Record:
    """Inductor's results for one type that runs in eager mode."""
    importlib.import_module("torch._inductor.compile_fx")  # llmopt's modules are loaded before its first call, too
    return _peer(Eager(model_type, shapes), "inductor")


def _worker(model_type: str, path: Path, log: Path, inductor: bool, shapes: Shapes) -> None:
    """What a type's process does: its output goes to `log`, and so does where it is when its time is over."""
    os.setsid()
    tqdm.set_lock(threading.RLock())  # the parent's may have been held at the fork, and torch.fx uses tqdm, too
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with torch.no_grad():
        if not _finished(path):
            _save(measure(model_type, shapes, partial(_save, path=path)), path)
        record = json.loads(path.read_text("utf-8"))
        if inductor and record["status"] != "no eager":
            batched = tuple(shape for shape in shapes if shape[0] > 1)  # a batch of 1 would be compiled apart
            _save(record | {"inductor": measure_inductor(model_type, batched)}, path)


def _save(record: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def _run(model_type: str, folder: Path, timeout: float, inductor: bool, shapes: Shapes, end: float) -> Record | None:
    """What a type lacks, in a process of its own; what ends it early is part of the record. None past `end`."""
    if time.monotonic() > end:
        return None
    path = folder / f"{model_type}.json"
    log = folder / f"{model_type}.log"
    process = multiprocessing.get_context("fork").Process(
        target=_worker, args=(model_type, path, log, inductor, shapes)
    )
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
            process.join(2.0)
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    record: Record = {"type": model_type, "class": class_of(model_type), "status": "unfinished"}
    if path.exists():
        record = json.loads(path.read_text("utf-8"))
    if not _complete(record, inductor):
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        error = f"no end within {timeout:.0f} s" if code is None else f"exit status {code}: {' '.join(tail)[:200]}"
        if record["status"] == "unfinished":
            status = "timeout" if code is None else "crash"
            record |= {"status": status, "error": f"{error} ({record.pop('step', 'start')})", "right": False}
        if inductor:
            record["inductor"] = {"error": error, "right": False}
        _save(record, path)
    return record


def _finished(path: Path) -> bool:
    """Whether llmopt's results are there."""
    return path.exists() and json.loads(path.read_text("utf-8"))["status"] != "unfinished"


def _complete(record: Record, inductor: bool) -> bool:
    """Whether nothing is left to run."""
    done = record["status"] != "unfinished"
    return done and (not inductor or "inductor" in record or record["status"] == "no eager")


def _records(folder: Path) -> Iterator[Record]:
    for model_type in (*TYPES, *OTHERS):
        path = folder / f"{model_type}.json"
        if path.exists():
            yield json.loads(path.read_text("utf-8"))


def render(folder: Path) -> None:
    """Writes results/coverage.json and .md from the records that there are."""
    records = list(_records(folder))
    where = conditions(shapes=[list(shape) for shape in SHAPES], new_tokens=NEW_TOKENS, tolerance=TOLERANCE)
    _save({"conditions": where, "summary": dict(summary(records)), "types": records}, RESULTS / "coverage.json")
    where["revision"] = ", ".join(dict.fromkeys(r["revision"] for r in records if "revision" in r))
    named = ("time", "revision", "cpu", "cores", "instruction_set", "torch", "transformers")
    text = table(records, SHAPES, TOLERANCE, {name: where[name] for name in named})
    (RESULTS / "coverage.md").write_text(text, "utf-8")
    print("\n".join(f"{name}: {value}" for name, value in summary(records)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TYPES, *OTHERS]
    parser.add_argument("--types", nargs="+", choices=names, metavar="TYPE", default=names, help="default: all")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for each type")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further type begins")
    parser.add_argument("--jobs", type=int, default=1, help="types at the same time")
    parser.add_argument("--redo", action="store_true", help="run finished types again")
    parser.add_argument("--quick", action="store_true", help="without a batch of 1, which is compiled apart")
    parser.add_argument("--inductor", action="store_true", help="compile with Inductor, too")
    parser.add_argument("--table", action="store_true", help="only render what there is")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the records, one file a type")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in ("LLMOPT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str((options.work / "caches" / name.split("_")[0].lower()).resolve())
    if not options.table:
        end = time.monotonic() + options.budget
        if options.redo:
            for model_type in options.types:
                (options.work / f"{model_type}.json").unlink(missing_ok=True)
        done = {record["type"] for record in _records(options.work) if _complete(record, options.inductor)}
        wanted = [model_type for model_type in options.types if model_type not in done]
        shapes = tuple(shape for shape in SHAPES if shape[0] > 1 or not options.quick)
        with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(wanted), unit="type") as bar:
            for record in pool.map(
                lambda t: _run(t, options.work, options.timeout, options.inductor, shapes, end), wanted
            ):
                bar.update()
                if record is None:
                    continue
                bar.write(f"{record['type']}: {record['status']} {record.get('error', '')}")
    render(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
