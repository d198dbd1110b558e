"""The probes of the machine's limits, on more workers than the machine has CPUs."""

from __future__ import annotations

import weakref

import torch

from llmopt.codegen.cpu.limits import Limits, kernel_plan


def test_the_sink_has_room_for_every_worker() -> None:
    limits = Limits(1, threads=70)
    assert len(limits._sink) == 70
    limits.read()
    one = Limits(1, threads=1)
    assert limits.flop == 70 * one.flop


def test_a_plan_keeps_its_tensors() -> None:
    source = """#include "abi.h"
    LLMOPT_KERNEL(add_one) { if (worker.index == 0) *args.tensor<std::int64_t>(0) += 1; }"""
    given = torch.zeros(1, dtype=torch.int64)
    run, alive = kernel_plan(source, "add_one", [given], []), weakref.ref(given)
    del given
    run()
    kept = alive()
    assert kept is not None
    assert int(kept) == 1
