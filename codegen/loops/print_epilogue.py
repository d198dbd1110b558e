"""Prints an epilogue (`epilogue.py`) as a C++ translation unit that calls the product and is called back by it.

The product itself is compiled once and linked: a new epilogue costs what its own few lines cost.
"""

from __future__ import annotations

from llmopt.codegen.loops.epilogue import PRODUCT
from llmopt.codegen.loops.ir import Load, LoopKernel, Value
from llmopt.codegen.loops.print_cpp import STORAGE, SweepPrinter, indent


def print_epilogue(kernel: LoopKernel, entry: str, product: str) -> str:
    """The source of the `extern "C"` function `entry`: what `product` computes, with `kernel` behind it.

    Operands: tensors are the buffers in order without the product, then the product's own; ints are the symbols in
    order, then the product's own.
    """
    (nest,) = kernel.nests
    (sweep,) = nest.sweeps
    tensors, ints = len(kernel.buffers) - 1, len(kernel.symbols)
    body = ["const Args& a = *static_cast<const Args*>(state);"]
    body += [f"const std::int64_t {name} = a.ints[{n}];" for n, name in enumerate(kernel.symbols)]
    body += [f"static_cast<void>({name});" for name in kernel.symbols]
    used = {v.buffer for v in sweep.values if isinstance(v, Load)} | {store.buffer for store in sweep.stores}
    for buffer in sorted(used - {PRODUCT}):
        kind = ("const " if buffer < kernel.num_inputs else "") + STORAGE[kernel.buffers[buffer]]
        body.append(f"{kind}* __restrict__ b{buffer} = a.tensor<{kind}>({buffer - 1});")
    kind = STORAGE[kernel.buffers[PRODUCT]]
    body += [
        "const Range part{block.column, block.column + block.columns};",
        "for (std::int64_t i0 = block.row; i0 < block.row + block.rows; ++i0) {",
        f"  const auto* product = static_cast<const {kind}*>(block.values) + (i0 - block.row) * block.stride;",
        "  static_cast<void>(product);",
        *indent(_Printer(kernel, sweep, shared=False).row()),
        "}",
    ]
    lines = [
        f"// {kernel.name}",
        '#include "loops.h"',
        "",
        f'extern "C" void {product}(const llmopt::Args&, const llmopt::Worker&);',
        "",
        "namespace {",
        "",
        "using namespace llmopt;",
        "using namespace llmopt::loops;",
        "",
        f"void {entry}_block(const void* state, const Block& block) {{",
        *indent(body),
        "}",
        "",
        "}  // namespace",
        "",
        f"LLMOPT_KERNEL({entry}) {{",
        f"  const llmopt::Epilogue epilogue{{{entry}_block, &args}};",
        f"  {product}({{args.tensors + {tensors}, args.ints + {ints}, args.floats, &epilogue}}, worker);",
        "}",
        "",
    ]
    return "\n".join(lines)


class _Printer(SweepPrinter):
    """The loop over one row of a block, where the product's entries come from the block."""

    def _walks(self, number: int, value: Value) -> bool:
        return not _is_product(value) and super()._walks(number, value)

    def _load(self, number: int, value: Load, lanes: str) -> str:
        if not _is_product(value):
            return super()._load(number, value, lanes)
        place = "product + (j0 - block.column)"
        return f"get<V>({place})" if lanes else f"read({place})"


def _is_product(value: Value) -> bool:
    return isinstance(value, Load) and value.buffer == PRODUCT
