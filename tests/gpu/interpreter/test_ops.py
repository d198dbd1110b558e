"""Every op of the vocabulary on Triton kernels against its reference, on the op's own samples."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu.devices import interpreted, is_refused, lower_for_cuda
from graphs.one_op import one_op_graph

from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)
from llmopt.compiler.opspec import OPS

# All but `constant`, which is computed when weights are bound.
KERNELS = [name for name in OPS if name != "constant"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_samples(name: str, dtype: torch.dtype) -> None:
    spec = OPS[name]
    for sample in spec.samples(dtype, torch.Generator().manual_seed(3)):
        expected_arguments = copy.deepcopy(sample)
        expected = spec.reference(*expected_arguments)
        graph, tensors = one_op_graph(spec, sample)
        lowered = lower_for_cuda(graph)
        if is_refused(sample):
            assert "does not take" in lowered.program.fallbacks[0].reason
            continue
        assert not lowered.program.fallbacks, lowered.program.fallbacks[0].reason
        results = interpreted(lowered, tensors)
        tolerance = spec.tolerances[dtype]
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance.rtol, atol=tolerance.atol)
        for got, wanted in zip(sample, expected_arguments, strict=True):
            if isinstance(got, torch.Tensor):  # what the op writes to
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)
