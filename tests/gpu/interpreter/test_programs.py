"""Whole step programs in Triton's interpreter: lowering, executor, arena, paged cache, padded decode steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gpu.devices import inverting, lower_for_cuda, to_cuda
from graphs.causal_models import HIDDEN, VOCABULARY, TinyCausal
from graphs.one_op import one_op_graph

from llmopt.codegen.cpu.native import KernelError
from llmopt.compiler import vocabulary  # noqa: F401  (declares the ops)
from llmopt.compiler.graph import placeholders
from llmopt.compiler.input_embeddings import marked
from llmopt.compiler.opspec import OPS
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.passes.pipeline import step_pipeline
from llmopt.runtime.cuda_executable import CudaExecutable
from llmopt.runtime.cuda_graphs import is_decode, pad_decode
from llmopt.runtime.prompt_embeds import place_embeds
from llmopt.runtime.step_batch import StepBatch
from llmopt.runtime.step_program import StepProgram
from llmopt.runtime.weights import WeightBinder
from llmopt.tracing import trace_forward

BLOCK = 4
CPU = torch.device("cpu")


def step_program(model: TinyCausal, prompt_embeds: bool = False) -> StepProgram:
    """The model as a step program for a GPU, run on the CPU."""
    with marked(model.embed) if prompt_embeds else nullcontext():
        captured, arguments = trace_forward(model, 40)
    for index, node in enumerate(placeholders(captured.graph)):
        node.meta["argument"], node.meta["weight"] = index, captured.weights[index]
    to_cuda(captured.graph)
    with inverting():
        run_pipeline(captured.graph, step_pipeline(BLOCK, prompt_embeds=prompt_embeds), Options())
    lowered = lower_for_cuda(captured.graph)
    assert not lowered.program.fallbacks
    specs: list[Any] = []
    for node in placeholders(captured.graph):
        if node.meta.get("cache") is not None and node.meta["cache"] not in specs:
            specs.append(node.meta["cache"])
    program = StepProgram(lowered.program, specs, BLOCK, device=CPU)
    own = [node.meta.get("argument") for node in placeholders(captured.graph)]
    binder = WeightBinder(captured.graph, lowered.weights)
    program.bind(binder.resolve([None if i is None else arguments[i] for i in own]))
    return program


def test_a_step_without_embeddings_reads_the_same_memory_after_longer_ones() -> None:
    """A captured graph holds its address."""
    program = step_program(TinyCausal(), prompt_embeds=True)
    before = program._without_embeds(3)
    assert before.tolist() == [-1] * 3
    assert program._without_embeds(40).tolist() == [-1] * 40
    assert program._without_embeds(2).data_ptr() == before.data_ptr()


def test_chunked_prefill_and_padded_decode_equal_eager() -> None:
    model = TinyCausal(layers=2)
    program = step_program(model)
    assert isinstance(program.executable, CudaExecutable)
    cache = program.new_cache(12)
    for memory in cache.tensors:
        memory.zero_()
    rows = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in (7, 3, 10)]
    blocks = [cache.allocate(len(row) + 1) for row in rows]
    expected = [model(torch.tensor([row]))[0].detach() for row in rows]
    # Two chunks, then the last token of each in one decode step.
    first = [row[:2] for row in rows]
    program(StepBatch.build(first, [0, 0, 0], blocks, BLOCK), cache)
    middle = [row[2:-1] for row in rows if len(row) > 3]
    held = [b for b, row in zip(blocks, rows, strict=True) if len(row) > 3]
    program(StepBatch.build(middle, [2, 2], held, BLOCK), cache)
    last = StepBatch.build([row[-1:] for row in rows], [len(row) - 1 for row in rows], blocks, BLOCK)
    wanted = torch.stack([logits[-1] for logits in expected])
    before = [t.clone() for t in cache.tensors]
    padded = program.run(pad_decode(last, 8, 16), cache)
    torch.testing.assert_close(padded[:3], wanted, rtol=1e-4, atol=1e-4)
    slots = set(last.slot_mapping.tolist())
    for old, new in zip(before, cache.tensors, strict=True):
        changed = (old != new).any(-1).any(1)  # [blocks, BLOCK]
        places = {block * BLOCK + at for block, at in changed.nonzero().tolist()}
        assert places <= slots, "the fillers of a padded step must not be stored"
    torch.testing.assert_close(program(last, cache), wanted, rtol=1e-4, atol=1e-4)
    assert program.executable.launched > 0


def test_tokens_that_are_given_as_embeddings() -> None:
    """Beside others in one step, and in a padded decode step, which has none."""
    model = TinyCausal()
    program = step_program(model, prompt_embeds=True)
    cache = program.new_cache(6)
    for memory in cache.tensors:
        memory.zero_()
    rows = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in (6, 5)]
    blocks = [cache.allocate(len(row) + 1) for row in rows]
    batch = StepBatch.build([[0] * 5, rows[1][:-1]], [0, 0], blocks, BLOCK)
    batch = place_embeds(batch, [model.embed(torch.tensor(rows[0][:5])).detach()], [range(5)])
    wanted = torch.stack([model(torch.tensor([row]))[0, -2:].detach() for row in rows], 1)
    torch.testing.assert_close(program(batch, cache), wanted[0], rtol=1e-4, atol=1e-4)
    last = StepBatch.build([row[-1:] for row in rows], [len(row) - 1 for row in rows], blocks, BLOCK)
    assert is_decode(last) and not is_decode(place_embeds(last, [torch.zeros(1, HIDDEN)], [range(1)]))
    torch.testing.assert_close(program.run(pad_decode(last, 4, 4), cache)[:2], wanted[1], rtol=1e-4, atol=1e-4)


def test_an_index_out_of_range_is_an_error_each_time() -> None:
    spec = OPS["moe"]
    x, ids, *rest = next(iter(spec.samples(torch.float32, torch.Generator().manual_seed(0))))
    graph, _ = one_op_graph(spec, (x, ids, *rest))
    executable = CudaExecutable(lower_for_cuda(graph).program, CPU)
    others = [r for r in rest if isinstance(r, torch.Tensor)]
    good = executable([x, ids, *others])[0]
    for bad in (-1, 4):
        with pytest.raises(KernelError, match="out of range"):
            executable([x, torch.full_like(ids, bad), *others])
    torch.testing.assert_close(executable([x, ids, *others])[0], good)
