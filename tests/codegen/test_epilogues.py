"""Loops as epilogues of the products before them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import catch
from torch import Tensor, nn

from llmopt.codegen.lower import Lowered, lower
from llmopt.codegen.program import KernelCall
from llmopt.codegen.program_json import from_json, to_json
from llmopt.compiler.errors import ProgramFileError
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import BACKEND


def _lowered(module: nn.Module, *inputs: Tensor) -> Lowered:
    caught = catch(module, *inputs, dynamic=True)
    run_pipeline(caught.graph, BACKEND, Options())
    return lower(caught.graph, caught.captured.mutations)


def _kernels(lowered: Lowered) -> list[tuple[str, bool]]:
    """Template of every call, and whether it has an epilogue."""
    specs = [lowered.program.kernels[s.kernel] for s in lowered.program.steps if isinstance(s, KernelCall)]
    return [(spec.template, spec.product is not None) for spec in specs]


class Layer(nn.Module):
    """`function(x, product of x, second product of x)`, where x is [batch, length, 24]."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], object], width: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, width), nn.Linear(24, width, bias=False)
        self.rows, self.columns = nn.Parameter(torch.randn(16, width)), nn.Parameter(torch.randn(width))
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)  # type: ignore[arg-type, call-arg]


def _by_rows(m: Layer, x: Tensor) -> Tensor:
    return m.first(x) * 2 + m.rows[: x.shape[1]]


def _by_batch(m: Layer, x: Tensor) -> Tensor:
    return m.first(x) * x[:, :1, :1]


FUSED: dict[str, Callable[[Layer, Tensor], object]] = {
    "silu": lambda m, x: F.silu(m.first(x)),
    "gelu": lambda m, x: F.gelu(m.first(x)),
    "gelu_tanh": lambda m, x: F.gelu(m.first(x), approximate="tanh"),
    "relu": lambda m, x: m.first(x).relu(),
    "residual": lambda m, x: x + m.first(x),
    "scaled residual": lambda m, x: torch.add(x, m.second(x), alpha=0.22),
    "row of factors": lambda m, x: m.second(x) * m.columns,
    "table of positions": _by_rows,
    "a number for each sequence": _by_batch,
    "soft cap": lambda m, x: torch.tanh(m.first(x) / 30) * 30,
    "cast": lambda m, x: m.first(x).to(torch.float64),
    "cast down": lambda m, x: m.first(x).to(torch.float16),
    "condition": lambda m, x: torch.where(x > 0, m.first(x), x),
    "mask": lambda m, x: m.first(x) > 0,
    "two results": lambda m, x: ((y := m.first(x)) * 2, y.tanh()),
    "split heads": lambda m, x: m.first(x).unflatten(-1, (4, 6)) * 2,
    "another view": lambda m, x: x.flatten(0, 1) + m.first(x).flatten(0, 1),
    "positions": lambda m, x: m.first(x) + torch.arange(24),
}
APART: dict[str, tuple[Callable[[Layer, Tensor], object], str]] = {
    "returned": (lambda m, x: ((y := m.first(x)), F.gelu(y)), "the product is read elsewhere, too"),
    "transposed": (
        lambda m, x: m.first(x).transpose(1, 2).contiguous() * 2,
        "the loop does not walk through the product in its order",
    ),
    "flipped": (lambda m, x: m.first(x).flip(-1) * 2, "the loop does not walk through the product in its order"),
    "reduced": (lambda m, x: m.first(x).sum(-1), "the loop reduces along rows"),
    "half of it": (
        lambda m, x: m.first(x)[..., :12] * x[..., :12],
        "the loop does not walk through the product in its order",
    ),
    "the first sequence": (lambda m, x: m.first(x)[:1] * 2, "the loop covers only some rows of the product"),
    "all but the last": (lambda m, x: m.first(x)[:-1] * x[1:], "the loop covers only some rows of the product"),
}
# Of sizes that are numbers, in which a place in the product and one in a part of it have the same index.
PARTS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a token": lambda m, x: m.first(x)[:, :1] * 2,
    "a token without its dimension": lambda m, x: m.first(x)[:, 0].relu(),
    "some tokens": lambda m, x: m.first(x)[0, :3] * x[0, :3],
    "one number": lambda m, x: m.first(x)[:, :1, :1] * 2,
    "rows as a table": lambda m, x: m.first(x).flatten(0, 1)[:2] * 2 + 1,
    "no row": lambda m, x: m.first(x)[:, :0] * 2,
    "a row and all": lambda m, x: m.first(x)[:, :1] + m.first(x),
}


@pytest.mark.parametrize("name", FUSED)
def test_it_becomes_an_epilogue(name: str) -> None:
    lowered = _lowered(Layer(FUSED[name]), torch.randn(2, 5, 24))
    assert [kernel for kernel in _kernels(lowered) if kernel[0] == "linear"] == [("linear", True)]
    assert not lowered.selection.rejected
    again = from_json(to_json(lowered.program))
    assert again == lowered.program


@pytest.mark.parametrize("name", APART)
def test_it_stays_a_loop_and_says_why(name: str) -> None:
    function, reason = APART[name]
    lowered = _lowered(Layer(function), torch.randn(2, 5, 24))
    assert ("loop", False) in _kernels(lowered)
    assert f"no epilogue of the product before it: {reason}" in lowered.selection.rejected.values()


def test_of_two_products_the_later_one_has_the_epilogue() -> None:
    lowered = _lowered(Layer(lambda m, x: (m.first(x.tanh()) * m.second(x.sin())).cos()), torch.randn(2, 5, 24))
    assert [fused for template, fused in _kernels(lowered) if template == "linear"] == [False, True]
    (step,) = [s for s in lowered.program.steps if isinstance(s, KernelCall) and "cos" in s.origin]
    assert step.origin.startswith("llmopt.linear aten.")


def test_a_norm_takes_the_sum_before_a_product_does() -> None:
    norm = nn.LayerNorm(24)
    lowered = _lowered(Layer(lambda m, x: norm(x + m.first(x))), torch.randn(2, 5, 24))
    assert _kernels(lowered) == [("linear", False), ("layer_norm", False)]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_product_is_no_epilogue_of_all_of_it(name: str) -> None:
    """The product would compute the loop for its other rows, too, and store them behind the results' ends."""
    torch.manual_seed(0)
    model = Layer(PARTS[name])
    for x in (torch.randn(1, 6, 24), torch.randn(1, 1, 24)):
        caught = catch(model, x, dynamic=False)
        run_pipeline(caught.graph, BACKEND, Options())
        program = lower(caught.graph, caught.captured.mutations).program
        numel = math.prod(program.results[0].sizes)
        for step in program.steps:
            assert isinstance(step, KernelCall)
            spec = program.kernels[step.kernel]
            if spec.loop is not None and spec.product is not None:
                assert step.ints[len(spec.loop.symbols)] * 24 == numel
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="llmopt", dynamic=False)(x), model(x))


class Picked(nn.Module):
    """A product beside one of its rows, at a place whose sign is unknown: no index of a loop, but a view of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor, place: int) -> Tensor:
        product = self.linear(x)
        return product * 2 + product[place]


def test_a_product_whose_memory_is_viewed_is_stored() -> None:
    model, x = Picked(), torch.randn(5, 24)
    caught = catch(model, x, -2, dynamic=True)
    run_pipeline(caught.graph, BACKEND, Options())
    lowered = lower(caught.graph, caught.captured.mutations)
    assert ("linear", False) in _kernels(lowered)
    assert any("a view of the product is read" in reason for reason in lowered.selection.rejected.values())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="llmopt", dynamic=True)
        for place in (-2, 3):
            torch.testing.assert_close(compiled(x, place), model(x, place))


# Written for products as wide as their input.
SQUARE = ("residual", "scaled residual", "condition", "another view", "split heads", "positions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "width"), [(n, w) for n in FUSED for w in (1, 24, 150) if w == 24 or n not in SQUARE])
def test_values(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Layer(FUSED[name], width).to(dtype).eval()
    compiled = torch.compile(model, backend="llmopt", dynamic=True)
    with torch.no_grad():
        # Few rows, rows of several blocks, and enough of them for the other algorithm and both workers.
        for shape in ((2, 3, 24), (3, 16, 24), (41, 13, 24)):
            x = torch.randn(shape).to(dtype)
            expected, actual = model(x), compiled(x)
            near = 1e-5 if dtype == torch.float32 and name != "cast down" else 2e-2
            torch.testing.assert_close(actual, expected, rtol=near, atol=near)


def test_a_residual_is_added_to_the_rounded_product() -> None:
    """As eager adds it: to the bit, where the product itself has the same bits."""
    torch.manual_seed(0)
    model = Layer(lambda m, x: x + m.second(x)).to(torch.bfloat16).eval()
    model.second.weight.data = torch.eye(24).to(torch.bfloat16) * 1.375
    compiled = torch.compile(model, backend="llmopt", dynamic=True)
    with torch.no_grad():
        for shape in ((1, 3, 24), (30, 16, 24)):
            x = torch.randn(shape).to(torch.bfloat16)
            assert torch.equal(compiled(x), model(x))


def test_a_malformed_epilogue_is_refused() -> None:
    program = _lowered(Layer(FUSED["residual"]), torch.randn(2, 5, 24)).program
    good = to_json(program)

    def broken(change: Callable[[list[object]], object]) -> dict[str, object]:
        data = to_json(program)
        (row,) = [row for row in data["kernels"] if row[0] == "linear"]
        change(row)
        return data

    def loop(row: list[object]) -> dict[str, object]:
        assert isinstance(row[2], dict)
        return row[2]

    def values(row: list[object]) -> list[list[object]]:
        return loop(row)["nests"][0]["sweeps"][0]["values"]  # type: ignore[index, no-any-return]

    from_json(good)
    changes: list[Callable[[list[object]], object]] = [
        lambda row: row.__setitem__(0, "softmax"),
        lambda row: row.__setitem__(1, ["llmopt::bf16"]),
        lambda row: row.__setitem__(1, []),
        lambda row: loop(row).update(nests=[]),
        lambda row: loop(row).update(nests=loop(row)["nests"] * 2),  # type: ignore[operator]
        lambda row: loop(row)["nests"][0].update(sizes=[]),  # type: ignore[index]
        lambda row: next(v for v in values(row) if v[2] == 0).__setitem__(3, "j0"),
    ]
    for change in changes:
        with pytest.raises(ProgramFileError):
            from_json(broken(change))
    fewer = to_json(program)
    (step,) = [step for step in fewer["steps"] if fewer["kernels"][step[0]][0] == "linear"]
    rows = len(fewer["kernels"][step[0]][2]["symbols"])
    step[2][rows] = ["+", step[2][rows], 1]
    with pytest.raises(ProgramFileError, match="rows of its product"):
        from_json(fewer)
