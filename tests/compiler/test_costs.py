"""Costs of whole programs in symbolic sizes, lifetimes of temporaries, and the roofline over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import catch, randomise
from graphs.causal_models import HEADS, HIDDEN, VOCABULARY, TinyCausal, traced
from torch import Tensor, nn

from llmopt.codegen.index import evaluate as evaluate_index
from llmopt.codegen.index import from_sympy, to_sympy
from llmopt.codegen.lower import lower
from llmopt.compilation import compile_step
from llmopt.compiler.errors import OptionError
from llmopt.compiler.input_embeddings import marked
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.compiler.report import CallReport, Details, Limits, Report, Timing
from llmopt.compiler.roofline import call_times, check_sizes, evaluate, kernel_times, least_seconds, total
from llmopt.explaining.details import graph_details
from llmopt.passes.pipeline import BACKEND


def details_of(function: object, *args: Tensor, dynamic: bool = False) -> Details:
    caught = catch(function, *args, dynamic=dynamic)  # type: ignore[arg-type]
    run_pipeline(caught.graph, BACKEND, Options())
    return graph_details(caught.graph, lower(caught.graph, caught.captured.mutations), step=False)


def numbers(call: CallReport, sizes: dict[str, int]) -> tuple[float, ...]:
    return tuple(evaluate(part, sizes) for part in vars(call.cost).values())


def test_a_fused_loop_reads_its_inputs_once_and_writes_its_outputs() -> None:
    def chain(x: Tensor, row: Tensor) -> Tensor:
        return (torch.tanh(x * 2 + row.expand(6, 40)) - x).sum(-1)

    details = details_of(chain, torch.randn(6, 40), torch.randn(1, 40))
    (call,) = details.calls
    # mul, add, tanh, sub and the sum over 240 entries; a broadcast row is read once
    assert numbers(call, {}) == (5 * 240, 4 * (240 + 40), 4 * 6)


def test_gathers_read_the_rows_that_they_take() -> None:
    table, ids = torch.randn(1000, 16), torch.tensor([3, 5])
    (call,) = details_of(lambda table, ids: F.embedding(ids, table), table, ids).calls
    assert numbers(call, {}) == (0, 2 * 16 * 4 + 2 * 8, 2 * 16 * 4)


def test_costs_are_expressions_that_hold_for_every_size() -> None:
    linear = randomise(nn.Linear(24, 8, bias=False))
    details = details_of(lambda x: linear(x), torch.randn(5, 24), dynamic=True)
    (call,) = details.calls
    (name,) = details.symbols
    assert details.hints == {name: 5} and details.symbols[name].endswith(".shape[0]")
    for rows in (1, 5, 700):
        assert numbers(call, {name: rows}) == (2 * rows * 24 * 8, 4 * (rows * 24 + 24 * 8), 4 * rows * 8)
    assert call.location is not None and "test_costs.py" in call.location


def test_fallbacks_have_a_cost_and_a_reason() -> None:
    details = details_of(lambda x: F.conv2d(x, torch.ones(4, 3, 3, 3)), torch.randn(1, 3, 9, 9))
    call = next(c for c in details.calls if "conv" in c.origin)
    assert call.kernel is None
    assert numbers(call, {})[0] == 2 * 4 * 7 * 7 * 27


def test_embeddings_of_prompts_have_a_size_of_their_own() -> None:
    model = TinyCausal()
    with marked(model.embed):
        captured = traced(model)
    details = compile_step(captured, Options(), prompt_embeds=True).report.details
    assert details is not None
    assert set(details.symbols) == {"tokens", "requests", "pages", "rows", "cache_pages", "context", "embeddings"}


def test_step_program_in_named_sizes() -> None:
    """Every matrix product and attention of the model, counted by hand."""
    report = compile_step(traced(TinyCausal(layers=2)), Options(record_graphs=True)).report
    details = report.details
    assert details is not None
    assert set(details.symbols) == {"tokens", "requests", "pages", "rows", "cache_pages", "context"}
    sizes = details.sizes({"tokens": 12, "requests": 3, "rows": 3, "context": 100})
    times = call_times(report, sizes)
    assert len(times) == len(details.calls)
    by_op: dict[str, float] = {}
    for call, time in zip(details.calls, times, strict=True):
        by_op[call.origin] = by_op.get(call.origin, 0.0) + time.flops
    # qkv and out of two layers for every token, the head for the wanted rows; an epilogue adds once for every entry
    sums = [origin for origin in by_op if origin.startswith("llmopt.linear ")]
    assert sums == ["llmopt.linear aten.add.Tensor"]
    products = by_op["llmopt.linear"] + by_op[sums[0]] - 12 * HIDDEN
    assert products == 2 * 12 * (2 * 4 * HIDDEN * HIDDEN) + 2 * 3 * HIDDEN * VOCABULARY
    assert by_op["llmopt.paged_attention"] == 2 * (2 * 12 * HEADS * 100 * 2 * HIDDEN // HEADS)
    assert report.captured is not None and all(item.graph for item in report.passes)


def test_a_product_and_its_adapters_are_counted_apart() -> None:
    work: list[list[float]] = []
    for options in (Options(), Options(enable_lora=True, max_loras=2, max_lora_rank=3)):
        details = compile_step(traced(TinyCausal()), options).report.details
        assert details is not None
        sizes = details.sizes({"tokens": 12, "rows": 3})
        work.append([numbers(call, sizes)[0] for call in details.calls if "llmopt.linear" in call.origin])
    products = [(12, 3 * HIDDEN), (12, HIDDEN), (3, VOCABULARY)]
    plain = [2 * rows * HIDDEN * columns for rows, columns in products]
    assert work[0] == [plain[0], plain[1] + 12 * HIDDEN, plain[2]]  # a residual is added in the epilogue
    assert work[1][::2] == plain
    assert work[1][1::2] == [2 * rows * 3 * (HIDDEN + columns) for rows, columns in products]


def test_lifetimes_fit_into_the_arena_and_do_not_collide() -> None:
    report = compile_step(traced(TinyCausal(layers=3)), Options()).report
    details = report.details
    assert details is not None and details.lives
    for tokens in (1, 7, 64):
        sizes = details.sizes({"tokens": tokens})
        arena = evaluate(details.arena, sizes)
        placed = [(evaluate(v.offset, sizes), evaluate(v.size, sizes), v.first, v.last) for v in details.lives]
        for i, (start, size, first, last) in enumerate(placed):
            assert start >= 0 and start + size <= arena and first <= last
            for other, extent, begin, end in placed[i + 1 :]:
                if first <= end and begin <= last:
                    assert start + size <= other or other + extent <= start, "two living values share memory"


def test_details_are_made_on_demand_and_once() -> None:
    report = compile_step(traced(TinyCausal()), Options()).report
    assert report._details is None and report.captured is None
    assert report.details is report.details


def test_roofline_takes_the_slower_limit() -> None:
    limits = Limits(2, 10.0, {"float32": 100.0, "bfloat16": 200.0})
    assert least_seconds(limits, 1e9, 1e9, False) == (0.1, "memory")
    assert least_seconds(limits, 2e10, 1e9, False) == (0.2, "compute")
    assert least_seconds(limits, 2e10, 1e9, True) == (0.1, "memory")


def test_times_are_summed_by_kernel() -> None:
    report = compile_step(traced(TinyCausal()), Options()).report
    details = report.details
    assert details is not None
    seconds = [1e-6 * (i + 1) for i in range(len(details.calls))]
    report.timing = Timing(details.sizes(), seconds, 1, Limits(1, 10.0, {"float32": 100.0}))
    kernels = kernel_times(report)
    whole = total(list(kernels.values()))
    assert whole.measured == pytest.approx(sum(seconds))
    assert whole.flops == sum(time.flops for time in call_times(report))
    assert "of it" in str(Report([report]))


def test_sizes_are_checked() -> None:
    details = compile_step(traced(TinyCausal()), Options()).report.details
    assert details is not None
    with pytest.raises(OptionError, match="tokns"):
        check_sizes(details, {"tokns": 1})
    with pytest.raises(OptionError, match=r"'tokens'.*1 or more"):
        check_sizes(details, {"tokens": 0})
    attention = next(c.cost.flops for c in details.calls if "context" in str(c.cost.flops))
    with pytest.raises(OptionError, match="a whole number for context"):
        evaluate(attention, {"tokens": 1, "requests": 1})


def test_index_expressions_survive_the_way_to_sympy_and_back() -> None:
    import sympy

    a, b = sympy.Symbol("a", integer=True, positive=True), sympy.Symbol("b", integer=True, positive=True)
    for text in (3, "a", from_sympy(a * 4 + b), from_sympy(sympy.Max(a, b * 3)), from_sympy(sympy.Min(a + 7, b))):
        expression = to_sympy(text, {"a": a, "b": b})
        for values in ({"a": 5, "b": 2}, {"a": 1, "b": 90}):
            found = expression.subs({a: values["a"], b: values["b"]})
            assert int(found) == evaluate_index(text, values)
