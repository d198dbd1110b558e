"""Capture: weights are slots, writes and aliases are recorded, sizes stay symbolic, what is not handled is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs.capturing import Caught, catch, randomise
from torch import Tensor, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import aten, is_tensor, nodes_of, outputs, placeholders, tensor, to_expr
from llmopt.compiler.verify import Level, find_violation


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6, bias=False)])
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return x


def test_weights_stay_placeholders_with_their_names() -> None:
    caught = catch(randomise(Mlp()), torch.randn(3, 6))
    named = [name for name in caught.captured.weights if name is not None]
    assert sorted(name.removeprefix("self.") for name in named) == [
        "blocks.0.bias",
        "blocks.0.weight",
        "blocks.1.weight",
        "scale",
    ]
    assert caught.captured.weights.count(None) == 1
    assert len(caught.captured.weights) == len(placeholders(caught.graph)) == len(caught.arguments)
    assert find_violation(caught.graph, Level.CAPTURED) is None
    assert all(n.op != "get_attr" for n in caught.graph.nodes)


def test_no_weight_is_baked_in() -> None:
    """The same graph with other weights computes the other model."""
    model, other = randomise(Mlp(), 1), randomise(Mlp(), 2)
    other.scale = torch.rand(6)  # type: ignore[assignment]
    x = torch.randn(3, 6)
    caught = catch(model, x)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    arguments = [
        argument if name is None else state[name.removeprefix("self.")]
        for name, argument in zip(caught.captured.weights, caught.arguments, strict=True)
    ]
    torch.testing.assert_close(caught.run(), [model(x)])
    torch.testing.assert_close(caught.run(arguments), [other(x)])
    assert not torch.allclose(model(x), other(x), atol=1e-2)


def test_composite_ops_stay_whole() -> None:
    def model(q: Tensor, w: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return nn.functional.gelu(nn.functional.linear(nn.functional.silu(y), w), approximate="tanh")

    graph = catch(model, torch.randn(1, 2, 5, 8), torch.randn(4, 8)).graph
    targets = {n.target for n in graph.nodes if n.op == "call_function"}
    whole = (aten.scaled_dot_product_attention.default, aten.silu.default, aten.linear.default, aten.gelu.default)
    assert targets >= set(whole)


def test_dropouts_that_do_nothing_may_be_written_to() -> None:
    """XLM does; exporting refuses a write to a dropout's result."""

    def model(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.dropout(x * 2, p=0.1, training=False)
        y *= mask
        z = torch.dropout(x.cos(), 0.0, True)
        z.add_(1)
        return y, z

    x, mask = torch.randn(3, 4), torch.rand(3, 4)
    caught = catch(model, x, mask)
    for result, expected in zip(caught.run(), model(x, mask), strict=True):
        torch.testing.assert_close(result, expected)
    kept = catch(lambda x: nn.functional.dropout(x, 0.5), x).graph
    assert list(nodes_of(kept, aten.dropout.default))


def write_rows(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    cache[:, index] = rows  # what a static cache does
    return cache[:, :2], rows * 2


def test_writes_become_values() -> None:
    cache, rows = torch.zeros(2, 7, 3), torch.randn(2, 2, 3)
    index = torch.tensor([4, 1])
    caught = catch(write_rows, cache, index, rows)
    (written,) = caught.captured.mutations
    assert caught.arguments[written].shape == cache.shape
    assert caught.captured.num_returned == 2 and len(outputs(caught.graph)) == 3
    expected = torch.zeros(2, 7, 3)
    returned = write_rows(expected, index, rows)
    fresh = [torch.zeros(2, 7, 3) if i == written else a for i, a in enumerate(caught.arguments)]
    new, *results = caught.run(fresh)
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(results, list(returned))
    assert float(fresh[written].abs().max()) == 0, "the graph itself is functional"


def test_a_buffer_that_the_model_writes_is_state_and_no_weight() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x * self.weight + self.seen

    caught = catch(Counter(), torch.randn(3, 4))
    (written,) = caught.captured.mutations
    assert str(caught.captured.weights[written]).endswith("seen")
    assert "weight" not in placeholders(caught.graph)[written].meta  # so nothing derived from it is kept
    assert [n.meta.get("weight") is not None for n in placeholders(caught.graph)].count(True) == 1


def test_a_returned_view_of_an_argument_is_a_view_in_the_graph() -> None:
    graph = catch(lambda x: (x.transpose(0, 1), x + 1), torch.randn(3, 4)).graph
    view, fresh = outputs(graph)
    assert view.args[0] is placeholders(graph)[0]
    assert tensor(view).stride() == (1, 4) and tensor(fresh).stride() == (4, 1)


def test_sizes_are_symbolic() -> None:
    caught = catch(randomise(Mlp()), torch.randn(5, 6), marked=[(0, 0)])
    (result,) = outputs(caught.graph)
    assert to_expr(tensor(result).shape[0]).free_symbols
    model = randomise(Mlp())
    x = next(i for i, node in enumerate(placeholders(caught.graph)) if is_tensor(node) and not node.meta.get("weight"))
    for rows in (2, 9):
        arguments = list(caught.arguments)
        arguments[x] = torch.randn(rows, 6)
        arguments = [rows if isinstance(a, int) else a for a in arguments]
        (got,) = caught.run(arguments)
        state = {str(n).removeprefix("self."): a for n, a in zip(caught.captured.weights, arguments, strict=True) if n}
        torch.testing.assert_close(got, torch.func.functional_call(model, state, (arguments[x],)))


class Scaled(nn.Module):
    """A float attribute: Dynamo makes it an argument under `dynamic=True`."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _floats(caught: Caught) -> list[float]:
    return list(caught.captured.float_values.values())


def test_floats_are_specialised_and_recorded() -> None:
    graphs: list[Caught] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        captured = capture(gm, example_inputs)
        graphs.append(Caught(captured, [*example_inputs, *captured.constants]))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, eps: Scaled(1.0)(x) * eps, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(3, 4), 0.25)
    (caught,) = graphs
    assert _floats(caught) == [0.25]
    numbers = [a for n in nodes_of(caught.graph, aten.mul.Tensor) for a in n.args if isinstance(a, float)]
    assert numbers == [0.25]
    x = next(a for a in caught.arguments if isinstance(a, Tensor) and a.ndim == 2)
    torch.testing.assert_close(caught.run(), [Scaled(1.0)(x) * 0.25])


def test_tensors_made_from_numbers_are_further_arguments() -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0])

    x = torch.randn(3, 4)
    caught = catch(model, x)
    assert [c.tolist() for c in caught.captured.constants] == [[1.0, 2.0, 3.0, 4.0]]
    assert caught.captured.weights[-1] == "constant.0" and len(caught.captured.weights) == len(caught.arguments)
    torch.testing.assert_close(caught.run(), [model(x)])


def test_a_tensor_made_from_one_number_is_an_op() -> None:
    def model(x: Tensor) -> Tensor:
        low = torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype)
        return torch.where(x > 0, x, low) + torch.where(x > 1, low, x)

    x = torch.randn(3, 4)
    caught = catch(model, x)
    assert caught.captured.constants == []
    assert {n.args[1] for n in nodes_of(caught.graph, aten.full.default)} == {torch.finfo(torch.float32).min}
    torch.testing.assert_close(caught.run(), [model(x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_supported_dtypes(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(3, 4).to(dtype)
    caught = catch(lambda x: x * 2 + 1, x)
    assert torch.equal(caught.run()[0], x * 2 + 1)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (lambda: torch.randn(3, 4, dtype=torch.complex64), r"dtype torch.complex64 of .*x.* is not supported"),
        (lambda: torch.randn(3, 4).to(torch.float8_e4m3fn), r"dtype torch.float8_e4m3fn of .*x.* is not supported"),
        (lambda: torch.randn(3, 4, device="meta"), r"device meta of .*x.* is not supported; .*: cpu"),
    ],
)
def test_what_is_not_supported_is_named(argument: Any, reason: str) -> None:
    # Dynamo wraps what a backend raises.
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        catch(lambda x: x.reshape(4, 3), argument())
    assert isinstance(caught.value.inner_exception, UnsupportedError)
    with pytest.raises(UnsupportedError, match=reason):
        raise caught.value.inner_exception


def test_an_unsupported_parameter_is_named() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.freqs_cis = nn.Parameter(torch.randn(4, dtype=torch.complex64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(self.freqs_cis).sum() + x

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"torch.complex64 of .*freqs_cis"):
        catch(Complex(), torch.randn(4))


def test_a_function_without_arguments() -> None:
    caught = catch(lambda: torch.tensor([1.0, 2.0]) + torch.tensor([3.0, 4.0]))
    assert caught.run()[0].tolist() == [4.0, 6.0]
