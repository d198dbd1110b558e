"""What torch.compile promises holds: writes, aliases, fresh outputs, gradients, options, and visible fallbacks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmopt
from llmopt.backend import REPORT
from llmopt.errors import BackwardError, OptionError, UnsupportedError


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="llmopt", dynamic=True, options={"fallback": "error", **options})


class Small(nn.Module):
    """A linear, a norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.linear(self.norm(x)))


@torch.no_grad()
def test_inputs_that_are_written_to() -> None:
    """In-place writes reach the caller's tensors, parts and other inputs stay as they were."""

    def write(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        x.add_(y)
        y[:, 1:3].mul_(2.0)
        x.index_copy_(0, index, y[:1] + 1)
        return x * y

    run = compiled(write)
    for rows in (4, 7):
        x, y, index = torch.randn(rows, 6), torch.randn(rows, 6), torch.tensor([2])
        expected = (x.clone(), y.clone(), index.clone())
        result = write(*expected)
        pointers = x.data_ptr(), y.data_ptr()
        torch.testing.assert_close(run(x, y, index), result)
        for mine, other in zip((x, y, index), expected, strict=True):
            torch.testing.assert_close(mine, other)
        assert (x.data_ptr(), y.data_ptr()) == pointers


@torch.no_grad()
def test_a_strided_input_is_written_in_place() -> None:
    """The caller's tensor is a view of a larger one; its neighbours stay."""

    def write(x: Tensor) -> Tensor:
        x.mul_(3.0)
        return x + 1

    run = compiled(write)
    whole = torch.randn(5, 8)
    expected = whole.clone()
    torch.testing.assert_close(run(whole[:, 2:5]), write(expected[:, 2:5]))
    torch.testing.assert_close(whole, expected)
    whole, expected = torch.ones(6, 4).t(), torch.ones(6, 4).t()
    torch.testing.assert_close(run(whole), write(expected))
    torch.testing.assert_close(whole, expected)


@torch.no_grad()
def test_attention_over_heads_of_symbolic_size() -> None:
    """It runs, on ATen, and the report says why."""

    def attend(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.25)

    torch._dynamo.reset()
    run = compiled(attend, fallback="warn")
    for size in (12, 20):
        q = torch.randn(2, 3, 7, size)
        torch.testing.assert_close(run(q), attend(q))
    reasons = {item.reason for graph in REPORT.graphs for item in graph.fallbacks}
    assert all("heads of symbolic size" in reason for reason in reasons) and len(reasons) == 1


@torch.no_grad()
def test_returned_views_alias_inputs() -> None:
    def views(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        y.add_(1.0)
        return x, x[1:, ::2], x.t(), x.reshape(-1), y, y[0], x * 2

    run = compiled(views)
    for rows in (3, 5):
        x, y = torch.randn(rows, 4), torch.randn(rows, 4)
        results, expected = run(x, y), views(x.clone(), y.clone())
        for mine, other, source in zip(results, expected, (x, x, x, x, y, y, None), strict=True):
            assert (mine.shape, mine.stride(), mine.storage_offset()) == (
                other.shape,
                other.stride(),
                other.storage_offset(),
            )
            if source is not None:
                assert mine.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        x.fill_(7.0)
        assert (results[1] == 7).all() and (results[3] == 7).all()
        results[5].fill_(9.0)
        assert (y[0] == 9).all()
        assert results[6].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@torch.no_grad()
def test_a_check_of_the_callers_own_is_made() -> None:
    def checked(x: Tensor) -> Tensor:
        torch._assert_async(x.sum() > 0, "not positive")
        torch._assert_async(x[0, 0] < 9, "too large")
        return x + 1

    run = compiled(checked)
    for rows in (3, 4):
        torch.testing.assert_close(run(torch.ones(rows, 6)), torch.full((rows, 6), 2.0))
        for x, message in ((-torch.ones(rows, 6), "not positive"), (torch.full((rows, 6), 9.0), "too large")):
            with pytest.raises(RuntimeError, match=message):
                run(x)


CONVOLUTION = nn.Conv2d(3, 8, 4, stride=4)


def attended(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.nn.functional.scaled_dot_product_attention(x, x, x),)


def convolved(x: Tensor) -> tuple[Tensor, ...]:
    y = CONVOLUTION(x)
    return y, y.flatten(2).transpose(1, 2), y[0], y[:, :4]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("function", "shape"), [(attended, (2, 3, 8, 16)), (convolved, (2, 3, 8, 12))])
@torch.no_grad()
def test_results_lie_as_in_eager_mode(function: Any, shape: tuple[int, ...], dynamic: bool) -> None:
    """Dynamo traces what follows a graph break by the strides that eager mode gives; views still share memory."""
    x = torch.randn(shape)
    results, expected = torch.compile(function, backend="llmopt", dynamic=dynamic)(x), function(x)
    torch.testing.assert_close(results, expected)
    for mine, other in zip(results, expected, strict=True):
        assert (mine.stride(), mine.storage_offset()) == (other.stride(), other.storage_offset())
        assert mine.untyped_storage().data_ptr() == results[0].untyped_storage().data_ptr()
    assert not [item for graph in REPORT.graphs for item in graph.fallbacks]


@torch.no_grad()
def test_results_that_lie_right_are_not_copied() -> None:
    """One kernel computes the result and nothing follows it; two projections that are returned are two results."""
    heads = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    x = torch.randn(3, 6)
    first, second = compiled(lambda x: (heads[0](x), heads[1](x)))(x)
    assert first.is_contiguous() and second.is_contiguous()
    assert sum(kernel.calls for kernel in REPORT.graphs[-1].kernels) == 2


@torch.no_grad()
def test_results_that_do_not_depend_on_the_arguments() -> None:
    """They are computed when weights are bound, and yet the caller may write to them."""
    model = Small()

    def constants(x: Tensor) -> tuple[Tensor, ...]:
        return x + 1, torch.arange(4) * 2, model.linear.weight.cos(), model.linear.weight.clone()

    run, x = compiled(constants), torch.randn(3, 6)
    for _ in range(2):
        results = run(x)
        torch.testing.assert_close(results, constants(x))
        for result in results:
            result.fill_(7)


@torch.no_grad()
def test_a_returned_part_of_an_argument_that_begins_inside_its_memory() -> None:
    whole = torch.randn(6, 8)
    run = torch.compile(lambda x: (x[1:], x.t()), backend="llmopt")
    for mine, other in zip(run(whole[1:, 2:5]), (whole[2:, 2:5], whole[1:, 2:5].t()), strict=True):
        assert torch.equal(mine, other) and mine.data_ptr() == other.data_ptr()


@torch.no_grad()
def test_outputs_are_fresh() -> None:
    """Neither the next call nor a write to an output changes an earlier output or a weight."""
    model = Small()
    run = compiled(model)
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    first = run(x)
    saved = first.clone()
    second = run(y)
    assert torch.equal(first, saved)
    torch.testing.assert_close(second, model(y))
    second.zero_()
    torch.testing.assert_close(run(x), saved)
    outputs = [run(torch.full((3, 6), float(i))) for i in range(4)]
    assert len({out.data_ptr() for out in outputs}) == 4


@torch.no_grad()
def test_arguments_of_every_kind() -> None:
    def mixed(
        x: Tensor, scale: float, *more: Tensor, count: int = 2, bias: Tensor | None = None, flag: bool = False
    ) -> dict[str, Any]:
        total = x * scale + sum(more) + count
        if bias is not None:
            total = total + bias
        return {"total": -total if flag else total, "count": count + x.shape[0], "none": None, "flag": flag}

    run = compiled(mixed)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, 2.0), {}),
        ((x, 0.5, y), {"count": 5}),
        ((x, 0.5, y, x), {"count": 7, "bias": torch.randn(3)}),
        ((x, -1.5), {"flag": True}),
        ((torch.randn(9, 3), 3.25), {"count": 11}),
    ]
    for args, kwargs in calls:
        actual, expected = run(*args, **kwargs), mixed(*args, **kwargs)
        torch.testing.assert_close(actual.pop("total"), expected.pop("total"))
        assert actual == expected


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 33])
@pytest.mark.parametrize("columns", [6])
@torch.no_grad()
def test_sizes(rows: int, columns: int) -> None:
    model = Small()
    x = torch.randn(rows, columns)
    run = compiled(model)
    torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(run(torch.randn(2, 3, columns)[:, :1]).shape, torch.Size([2, 1, 5]))


@torch.no_grad()
def test_from_no_rows_to_many_and_back() -> None:
    """Empty tensors have a graph of their own; the one for many rows serves every other number."""
    model = Small()
    run = compiled(model)
    for rows in (5, 0, 7, 1, 0, 2, 64):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(run(x), model(x))
    assert len(llmopt.explain().graphs) == 3

    def reduce(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(0), torch.cat([x, x + 1]).softmax(-1)

    other = compiled(reduce)
    for rows in (3, 0, 1):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(other(x), reduce(x))


def test_forward_in_grad_mode_and_backward_that_explains() -> None:
    model = Small()
    run = compiled(model)
    x = torch.randn(3, 6)
    out = run(x)
    assert out.requires_grad
    torch.testing.assert_close(out.detach(), model(x).detach())
    with pytest.raises(BackwardError, match=r"computes inference only.*torch.no_grad"):
        out.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert not run(x).requires_grad
    model.requires_grad_(False)
    assert not run(x).requires_grad
    with pytest.raises(BackwardError):
        run(x.clone().requires_grad_()).sum().backward()


def test_inference_mode() -> None:
    model = Small()
    run = compiled(model)
    x = torch.randn(4, 6)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))
        torch.testing.assert_close(run(torch.ones(7, 6)), model(torch.ones(7, 6)))
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_modes_are_accepted(mode: str) -> None:
    model = Small()
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(model, backend="llmopt", mode=mode)(x), model(x))
    assert llmopt.explain().graphs[0].native_calls == 1


@pytest.mark.parametrize(
    ("options", "option", "value", "allowed"),
    [
        ({"quantisation": "int4"}, "quantisation", "int4", "'fallback'"),
        ({"threads": -1}, "threads", -1, "0 to 1024"),
        ({"fallback": "maybe"}, "fallback", "maybe", "'silent', 'warn', 'error'"),
        ({"dtype": "int4"}, "dtype", "int4", "'bfloat16'"),
        ({"dtype": "bfloat16"}, "dtype", "bfloat16", "'auto' under torch.compile"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype", "int8", "'auto' under torch.compile"),
        ({"batch_invariant": True}, "batch_invariant", True, "False under torch.compile"),
        ({"enable_lora": True}, "enable_lora", True, "False under torch.compile"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds", True, "False under torch.compile"),
        ({"disabled_passes": "fuse_residual_norm"}, "disabled_passes", "fuse_residual_norm", "tuple of pass names"),
    ],
)
def test_wrong_options_through_torch_compile(options: dict[str, Any], option: str, value: Any, allowed: str) -> None:
    """Dynamo wraps what a backend raises; the message names option, value and what is allowed."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Small(), backend="llmopt", options=options)(torch.randn(2, 6))
    error = caught.value.inner_exception
    assert isinstance(error, OptionError)
    assert (error.option, error.value) == (option, value)
    assert allowed in error.allowed
    assert str(error) in str(caught.value)


def test_an_unknown_mode() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"option 'mode': got 'fastest'.*max-autotune"):
        torch.compile(Small(), backend="llmopt", mode="fastest")(torch.randn(2, 6))


def unsupported(x: Tensor) -> Tensor:
    return x * 2 + 1


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (torch.ones(3, dtype=torch.complex64), "dtype torch.complex64"),
        (torch.ones(3, device="meta"), "device meta"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_unsupported_inputs_run_in_eager_mode_and_say_so(
    argument: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = unsupported if argument.layout == torch.strided else torch.sparse.sum
    result = torch.compile(function, backend="llmopt")(argument)
    assert result.dtype == argument.dtype and result.device == argument.device
    if argument.device.type == "cpu":
        assert torch.equal(result, function(argument))
    if argument.layout != torch.strided and not llmopt.explain().graphs:
        return  # Dynamo itself leaves sparse tensors out of graphs in some versions.
    (graph,) = llmopt.explain().graphs
    assert graph.refused is not None and reason in graph.refused
    assert f"runs in eager mode: {graph.refused}" in str(llmopt.explain())
    assert reason in caplog.text


@pytest.mark.parametrize("argument", [torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")])
def test_unsupported_inputs_are_errors_when_asked(argument: Tensor) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(unsupported)(argument)
    assert isinstance(caught.value.inner_exception, UnsupportedError)


def test_a_fraction_computed_from_sizes_runs_in_eager_mode() -> None:
    def function(x: Tensor) -> Tensor:
        return x * (x.shape[0] ** 0.5)

    x = torch.randn(5, 7)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="llmopt", dynamic=True)(x), function(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="computed from sizes, is no integer"):
        compiled(function)(x)


def test_an_op_without_a_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """It runs on ATen beside the kernels; what is said about it depends on the option."""

    def odd(x: Tensor) -> Tensor:
        return torch.linalg.inv(x * 2) + 1

    x = torch.eye(4) + 0.1
    torch.testing.assert_close(torch.compile(odd, backend="llmopt")(x), odd(x))
    (graph,) = llmopt.explain().graphs
    (fallback,) = graph.fallbacks
    assert "inv" in fallback.op and fallback.reason
    assert fallback.location is not None and Path(__file__).name in fallback.location
    assert graph.native_calls == 2
    assert "inv" not in caplog.text
    torch._dynamo.reset()
    torch.compile(odd, backend="llmopt", options={"fallback": "warn"})(x)
    assert "inv" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inv"):
        compiled(odd)(x)


WITHOUT_A_COMPILER = """
import sys, torch, llmopt
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.SiLU())
x = torch.randn(3, 6)
with torch.no_grad():
    result = torch.compile(model, backend="llmopt")(x)
    torch.testing.assert_close(result, model(x))
print(llmopt.explain().graphs[0].refused)
try:
    with torch.no_grad():
        torch.compile(torch.nn.Linear(6, 2), backend="llmopt", options={"fallback": "error"})(x)
except Exception as error:
    print(type(error.inner_exception).__name__)
"""


def test_without_a_compiler_everything_runs_on_aten_with_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/nonexistent", "PATH": str(tmp_path), "LLMOPT_CACHE_DIR": str(tmp_path / "c")}
    command = [sys.executable, "-c", WITHOUT_A_COMPILER]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert "apt install g++" in answer.stderr
    refused, kind = answer.stdout.splitlines()
    assert "no C++ compiler found" in refused and "apt install g++" in refused
    assert kind == "ToolchainError"


@torch.no_grad()
def test_two_threads_share_a_compiled_model() -> None:
    """Calls take turns: nobody sees another's arguments, weights or results."""
    model = Small()
    run = compiled(model)
    run(torch.randn(3, 6))
    wrong: list[int] = []

    @torch.no_grad()
    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(2 + int(torch.randint(0, 9, (), generator=generator)), 6, generator=generator)
            if not torch.allclose(run(x), model(x), atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_no_import_of_llmopt_is_needed() -> None:
    """The backend is found by its entry point."""
    program = (
        "import torch, sys\n"
        "assert not any(m.startswith('llmopt.') for m in sys.modules)\n"
        "assert 'llmopt' in torch._dynamo.list_backends()\n"
        "model = torch.nn.Linear(4, 4)\n"
        "with torch.no_grad():\n"
        "    out = torch.compile(model, backend='llmopt')(torch.ones(2, 4))\n"
        "    torch.testing.assert_close(out, model(torch.ones(2, 4)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
