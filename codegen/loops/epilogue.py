"""Fused loops in the form in which a product can compute them: entry by entry, while its results are in the cache.

An epilogue is a `LoopKernel` of one nest over the product's rows (i0) and columns (j0), whose buffer 0 is the product
and is read at its own place only. On a product that lies in memory it is an ordinary loop that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy
from torch.utils._sympy import functions as torch_functions

from llmopt.codegen import index as indices
from llmopt.codegen.index import Index
from llmopt.codegen.loops.ir import DType, IndexValue, Load, LoopKernel, Nest, Position, Sweep, Value
from llmopt.compiler.errors import ProgramFileError, UnsupportedError

PRODUCT = 0  # the buffer that an epilogue does not read from memory
_ROW, _COLUMN = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("i0", "j0"))


def as_epilogue(kernel: LoopKernel, product: int, columns: int) -> LoopKernel | str:
    """`kernel` as the epilogue of a dense product `[rows, columns]`, which is its buffer `product`, or why it is none.

    The other buffers keep their order behind the product. Whether the loop covers all of it, `covers` tells.
    """
    if len(kernel.nests) != 1:
        return "the loop has several nests"
    (nest,) = kernel.nests
    if nest.accumulators or len(nest.sweeps) != 1 or len(nest.sweeps[0].sizes) != 1:
        return "the loop reduces along rows"
    (sweep,) = nest.sweeps
    if any(isinstance(value, Position) for value in sweep.values):
        return "the loop reads where an index tensor says"
    loops = [*(f"i{n}" for n in range(len(nest.sizes))), "j0"]
    symbols = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in (*kernel.symbols, *loops)}
    sizes = [indices.to_sympy(size, symbols) for size in (*nest.sizes, *sweep.sizes)]
    position = sympy.Integer(0)
    for name, size in zip(loops, sizes, strict=True):
        position = position * size + symbols[name]
    for value in sweep.values:
        if isinstance(value, Load) and value.buffer == product:
            away = sympy.expand(indices.to_sympy(value.index, symbols) - position)
            if value.guard >= 0 or away != 0:
                return "the loop does not walk through the product in its order"
    per_row = sympy.cancel(sizes[-1] / columns)
    if sympy.fraction(per_row)[1] != 1:
        return "the loop does not walk through whole rows of the product"
    places = _places([symbols[name] for name in loops], [*sizes[:-1], per_row], columns)
    rows = sympy.expand(sympy.prod(sizes[:-1]) * per_row)

    variables = {symbols[name] for name in loops}
    flat = _ROW * columns + _COLUMN

    def moved(index: Index) -> Index:
        here = indices.to_sympy(index, symbols)
        step = here.coeff(symbols["j0"], 1)
        rest = sympy.expand(here - step * position)
        if variables.isdisjoint(rest.free_symbols | step.free_symbols):  # walks as the product does
            return indices.from_sympy(sympy.expand(step * flat + rest))
        return indices.from_sympy(sympy.expand(here.xreplace(places)))

    order = [product, *(n for n in range(len(kernel.buffers)) if n != product)]
    try:
        values = tuple(_moved(value, moved, order) for value in sweep.values)
        stores = tuple(replace(s, buffer=order.index(s.buffer), index=moved(s.index)) for s in sweep.stores)
        sizes_now = (indices.from_sympy(rows),)
    except UnsupportedError as error:
        return str(error)
    inside = Nest(sizes_now, (), (Sweep((columns,), values, (), stores),))
    buffers = tuple(kernel.buffers[n] for n in order)
    return replace(kernel, buffers=buffers, nests=(inside,))


def _places(loops: list[sympy.Symbol], sizes: list[sympy.Expr], columns: int) -> dict[sympy.Expr, sympy.Expr]:
    """The loops' variables in terms of row i0 and column j0; the last loop walks over `sizes[-1]` whole rows."""
    places: dict[sympy.Expr, sympy.Expr] = {}
    rest: sympy.Expr = _ROW
    for number in reversed(range(len(loops))):
        size = sizes[number]
        outermost = number == 0
        here = rest if outermost else sympy.Integer(0) if size == 1 else torch_functions.PythonMod(rest, size)
        rest = rest if outermost or size == 1 else torch_functions.FloorDiv(rest, size)
        places[loops[number]] = here * columns + _COLUMN if number == len(loops) - 1 else here
    return places


def _moved(value: Value, moved: Callable[[Index], Index], order: list[int]) -> Value:
    if isinstance(value, Load):
        return replace(value, buffer=order.index(value.buffer), index=moved(value.index))
    return replace(value, index=moved(value.index)) if isinstance(value, IndexValue) else value


def covers(kernel: LoopKernel, symbols: Sequence[sympy.Expr], rows: sympy.Expr) -> bool:
    """Whether an epilogue called with these values of its symbols walks over exactly the `rows` of its product.

    A product computes its epilogue on every row that it has. The buffers behind a loop over a part of them end earlier.
    """
    (nest,) = kernel.nests
    (size,) = nest.sizes
    walked = indices.to_sympy(size, dict(zip(kernel.symbols, symbols, strict=True)))
    return bool(sympy.expand(walked - rows) == 0)


def check_epilogue(kernel: LoopKernel, dtype: DType | None) -> None:
    """Raises ProgramFileError for a loop that is not in the form of an epilogue of a product stored as `dtype`."""
    fits = len(kernel.nests) == 1 and kernel.num_inputs > PRODUCT and kernel.buffers[PRODUCT] == dtype
    if fits:
        (nest,) = kernel.nests
        fits = len(nest.sizes) == 1 and not nest.accumulators and len(nest.sweeps) == 1
        fits = fits and len(nest.sweeps[0].sizes) == 1 and not nest.sweeps[0].accumulates
    if fits:
        (sweep,) = kernel.nests[0].sweeps
        own = indices.add(indices.multiply("i0", sweep.sizes[0]), "j0")
        places = [v for v in sweep.values if isinstance(v, Load) and v.buffer == PRODUCT]
        fits = all(same_place(v.index, own) and v.guard < 0 for v in places)
        fits = fits and not any(isinstance(v, Position) for v in sweep.values)
    if not fits:
        raise ProgramFileError("malformed epilogue of a product")


def same_place(left: Index, right: Index) -> bool:
    """Whether two sums are equal but for the order of their terms."""
    if isinstance(left, indices.Binary) and isinstance(right, indices.Binary) and left.operator == right.operator:
        straight = same_place(left.left, right.left) and same_place(left.right, right.right)
        swapped = left.operator in "+*" and same_place(left.left, right.right) and same_place(left.right, right.left)
        return straight or swapped
    return left == right
