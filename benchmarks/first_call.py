"""The first call of one compiled model in this process, as one line of JSON: a child of `compile_cpu.py`.

usage: python benchmarks/first_call.py MODEL DTYPE PEER CACHES [--batch 1] [--threads 2] [--layers N] [--tokens N]

`first_call_s` runs from `torch.compile` to the first result. Of it, `import_s` is spent on loading the compiler's own
modules, `dynamo_s` on Dynamo's tracing and guards, outside of the backend. A call that compiles nothing takes
`later_call_s`. What is left of the first, `compiler_s`, is the compiler's own, its modules included.
"""

from __future__ import annotations

import json
import statistics
import time

from child_process import parse

LATER_CALLS = 3


def main() -> None:
    options = parse(__doc__)

    import torch
    from backends import compiled_forward, import_backend
    from compile_models import build, inputs, reset

    torch.set_num_threads(options.threads)
    model = build(options.model, options.dtype, options.layers)
    arguments = inputs(model, options.batch, options.tokens)

    with torch.no_grad():
        begin = time.perf_counter()
        import_backend(options.peer)
        import_s = time.perf_counter() - begin
        forward = compiled_forward(model, options.peer)
        forward(**arguments)
        first_call_s = time.perf_counter() - begin
        later = []
        for _ in range(LATER_CALLS):
            reset(arguments)
            begin = time.perf_counter()
            forward(**arguments)
            later.append(time.perf_counter() - begin)

    dynamo_s = 0.0
    if options.peer != "eager":
        from torch._dynamo.utils import compilation_time_metrics as spent

        dynamo_s = sum(spent["_compile.compile_inner"]) - sum(spent["OutputGraph.call_user_compiler"])
    later_call_s = statistics.median(later)
    print(
        json.dumps(
            {
                "first_call_s": first_call_s,
                "import_s": import_s,
                "dynamo_s": dynamo_s,
                "later_call_s": later_call_s,
                "compiler_s": first_call_s - dynamo_s - later_call_s,
            }
        )
    )


if __name__ == "__main__":
    main()
