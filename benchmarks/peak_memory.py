"""What the calls of one model take of memory at most, as one line of JSON: a child of `compile_cpu.py`.

usage: python benchmarks/peak_memory.py MODEL DTYPE PEER CACHES [--batch 1] [--threads 2] [--layers N] [--tokens N]

`peak_bytes` is the process's greatest resident size during calls that compile nothing, less its size before the model
was made: weights that stay alive, what the peer made of them, temporaries, and the compiled model itself. The peer's
modules are loaded before, by a call of a tiny model of the same kind: they do not grow with a model. `weights_bytes`
is the size of the parameters and buffers.
"""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

from child_process import parse

CALLS = 3
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
}


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def main() -> None:
    options = parse(__doc__)

    import torch
    from backends import compiled_forward
    from compile_models import build, inputs, reset

    torch.set_num_threads(options.threads)

    @torch.no_grad()
    def load_modules() -> None:
        tiny = build(options.model, options.dtype, 1, **TINY)
        compiled_forward(tiny, options.peer)(**inputs(tiny, options.batch, options.tokens))

    load_modules()
    torch.compiler.reset()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the tiny model leaves free must not be there for the model that is measured
    start_bytes = _status("VmRSS")

    model = build(options.model, options.dtype, options.layers)
    arguments = inputs(model, options.batch, options.tokens)
    forward = compiled_forward(model, options.peer)
    with torch.no_grad():
        forward(**arguments)
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the high-water mark starts anew
        for _ in range(CALLS):
            reset(arguments)
            forward(**arguments)
    weights = [*model.parameters(), *model.buffers()]
    found = {
        "peak_bytes": _status("VmHWM") - start_bytes,
        "weights_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
