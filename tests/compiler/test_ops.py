"""Every op of the vocabulary: its schema, its kernel against its reference in each dtype, and its cost."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from graphs.one_op import run_compiled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import llmopt.compiler.vocabulary  # noqa: F401
from llmopt.compiler.errors import VerificationError
from llmopt.compiler.opspec import OPS, Cost, OpSpec, spec_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = sorted(OPS)


def samples(spec: OpSpec, dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    return spec.samples(dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_schema_and_fake_implementation(name: str, dtype: torch.dtype) -> None:
    spec = OPS[name]
    # The checks look at types and memory, not at numbers: every sample in one dtype, two in the others.
    for sample in itertools.islice(samples(spec, dtype), None if dtype == torch.float32 else 2):
        torch.library.opcheck(spec.overload, copy.deepcopy(sample), test_utils=("test_schema", "test_faketensor"))


# Operands that eager mode would broadcast, or that a kernel reads beyond: op -> (argument, dimension that is cut).
CUT = {
    "add_layer_norm": [(1, -1), (2, 0), (3, 0)],
    "add_rms_norm": [(1, -1), (2, 0)],
    "attention": [(1, 1), (1, -1), (2, 1)],
    "batched_linear": [(1, -1)],
    "gated_act": [(1, -1)],
    "grouped_linear": [(1, -1), (2, 0)],
    "layer_norm": [(1, 0), (2, 0)],
    "linear": [(1, -1), (2, 0)],
    "lora": [(1, 1), (3, 1), (4, 1)],
    "moe": [(1, 0), (2, 1), (3, 1), (4, 1)],
    "paged_attention": [(1, 1), (1, -1), (2, 1), (3, 1), (4, -1), (5, 0), (7, 0)],
    "rms_norm": [(1, 0)],
    "rope": [(1, 1), (2, -1)],
}


@pytest.mark.parametrize(("name", "place", "dim"), [(name, *cut) for name, cuts in CUT.items() for cut in cuts])
def test_operands_that_do_not_fit_are_refused(name: str, place: int, dim: int) -> None:
    def cut(operand: Any) -> Any:
        return [cut(operand[0]), *operand[1:]] if isinstance(operand, list) else operand.narrow(dim, 0, 1)

    first = lambda operand: operand[0] if isinstance(operand, list) else operand  # noqa: E731
    given = (s for s in samples(OPS[name], torch.float32) if first(s[place]) is not None)
    sample = list(next(s for s in given if first(s[place]).shape[dim] > 1))
    with FakeTensorMode() as mode:
        fake = lambda value: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value  # noqa: E731
        sample = pytree.tree_map(fake, sample)
        OPS[name].overload(*sample)
        sample[place] = cut(sample[place])
        with pytest.raises(VerificationError, match=rf"llmopt::{name}: .* is \[.*\], not \["):
            OPS[name].overload(*sample)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 1, 1), (1, 5, 1), (4,), (1, 1, 1, 1, 1)])
def test_a_mask_that_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
        options = (False, 1.0, 0.0, 0, None, None)
        assert OPS["attention"].overload(q, k, k, torch.randn(4, 1, 5), *options).shape == q.shape
        with pytest.raises(VerificationError, match="llmopt::attention: mask"):
            OPS["attention"].overload(q, k, k, torch.randn(shape), *options)
        with pytest.raises(VerificationError, match="4 heads do not share 3"):
            OPS["attention"].overload(q, torch.randn(1, 5, 3, 8), torch.randn(1, 5, 3, 8), None, *options)


def test_constant_is_known_to_fake_tensors() -> None:
    """`opcheck` finds no tensor among its arguments to make a fake of."""
    (values,) = next(samples(OPS["constant"], torch.float32))
    real = OPS["constant"].overload(values)
    with FakeTensorMode():
        fake = OPS["constant"].overload(values)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert real.tolist() == values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_against_reference(name: str, dtype: torch.dtype) -> None:
    spec = OPS[name]
    tolerance = spec.tolerances[dtype]
    for number, sample in enumerate(samples(spec, dtype, seed=1)):
        mine, theirs = copy.deepcopy(sample), copy.deepcopy(sample)
        results, lowered = run_compiled(spec, mine, threads=1 + number % 2)
        assert not lowered.program.fallbacks
        expected = spec.reference(*theirs)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        for result, want in zip(results, expected, strict=True):
            assert result.dtype == want.dtype
            torch.testing.assert_close(result, want, rtol=tolerance.rtol, atol=tolerance.atol)
        # What the op writes to must be equal as well, and what it only reads must not have changed.
        for result, want in zip(_tensors(mine), _tensors(theirs), strict=True):
            assert torch.equal(result, want)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])  # its argument is its result
def test_the_comparison_would_notice_a_wrong_kernel(name: str) -> None:
    """Samples are random enough that other data gives another result, far outside the tolerance."""
    spec = OPS[name]
    results = []
    for seed in (1, 2):
        result = spec.reference(*next(samples(spec, torch.bfloat16, seed)))
        results.append(result[0] if isinstance(result, tuple) else result)
    assert float((results[0] - results[1]).abs().max()) > 10 * spec.tolerances[torch.bfloat16].atol


def _tensors(args: Any) -> list[torch.Tensor]:
    if isinstance(args, torch.Tensor):
        return [args]
    return [t for arg in args for t in _tensors(arg)] if isinstance(args, list | tuple) else []


def cost_of(spec: OpSpec, sample: tuple[Any, ...]) -> Cost:
    cost = spec.cost(*sample)
    if spec.name != "paged_attention":
        return cost
    starts, lengths = sample[7].tolist(), sample[8].tolist()
    seen = sum((b - a) * n for a, b, n in zip(starts, starts[1:], lengths, strict=False))
    context = {sympy.Symbol("context", positive=True): sympy.Rational(seen, starts[-1])}
    return Cost(*((part + sympy.Integer(0)).subs(context) for part in vars(cost).values()))


@pytest.mark.parametrize("name", NAMES)
def test_cost_counts_real_work(name: str) -> None:
    spec = OPS[name]
    for sample in samples(spec, torch.bfloat16):
        cost = cost_of(spec, sample)
        assert all(part.is_number for part in vars(cost).values())
        assert (cost.flops == 0) if name == "constant" else (cost.flops > 0)
        result = spec.reference(*copy.deepcopy(sample))
        written = sum(t.nbytes for t in _tensors(result))
        if name == "paged_attention":
            rows = sample[1].shape[1] * sample[1].shape[2]
            written += rows * sum(cache.shape[-1] * cache.element_size() for cache in sample[3:5])
        assert cost.bytes_written == written
        if name not in ("moe", "lora", "paged_attention"):  # they read a part of the experts, adapters, cache
            operands = sample[:4] if name == "attention" else sample  # slopes and sinks are one number a head
            assert cost.bytes_read == sum(t.nbytes for t in _tensors(operands))


@pytest.mark.parametrize("name", ["linear", "attention", "paged_attention", "moe"])
def test_matrix_products_are_counted_as_pytorch_counts_them(name: str) -> None:
    spec = OPS[name]
    for sample in samples(spec, torch.float32):
        with FlopCounterMode(display=False) as counter:
            spec.reference(*copy.deepcopy(sample))
        assert cost_of(spec, sample).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ["linear", "rms_norm", "attention", "gated_act"])
def test_cost_is_an_expression_of_symbolic_sizes(name: str) -> None:
    spec = OPS[name]
    sample = list(samples(spec, torch.float32))[-1]
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(arg: Any) -> Any:
        if isinstance(arg, list):
            return [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arg]
        if not isinstance(arg, torch.Tensor) or arg.ndim < 3:
            return mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg
        sizes = [DimDynamic.DYNAMIC if dim == 1 else DimDynamic.STATIC for dim in range(arg.ndim)]
        return mode.from_tensor(arg, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    cost = spec.cost(*(fake(arg) for arg in sample))
    assert cost.flops.free_symbols
    assert cost.flops.free_symbols <= cost.bytes_read.free_symbols
    hints = {symbol: int(env.backed_var_to_val[symbol]) for symbol in cost.bytes_read.free_symbols}
    assert cost.flops.subs(hints) == spec.cost(*sample).flops
    assert cost.bytes_read.subs(hints) == spec.cost(*sample).bytes_read


def test_specs_are_found_by_target() -> None:
    assert spec_of(torch.ops.llmopt.linear.default) is OPS["linear"]
    assert spec_of(torch.ops.aten.linear.default) is None
    for spec in OPS.values():
        assert spec.reference.__doc__, f"{spec.name} does not say what it computes"
        assert all(tolerance.reason for tolerance in spec.tolerances.values())
        assert set(DTYPES) <= spec.tolerances.keys()
