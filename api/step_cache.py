"""Compiled step programs, kept between processes as `graph_cache` keeps graphs: beside the kernels, under a `step_key`.

An entry holds what a graph's does, and the caches, adapters and names of weights of a step. The weights themselves are
the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.fx.node import Node

from llmopt import graph_cache
from llmopt.codegen.program import Program
from llmopt.compiler.errors import ProgramFileError
from llmopt.compiler.report import GraphReport
from llmopt.compiler.step import CacheSpec, LoraSpec
from llmopt.graph_cache import KeptGraph
from llmopt.runtime import step_json

log = logging.getLogger(__name__)

# Where an argument of a step's graph comes from: a parameter or buffer by its name, a constant, or the call itself.
Source: TypeAlias = str | torch.Tensor | None


@dataclass(frozen=True)
class KeptStep:
    """What is left of a compilation: the graph's part, and what makes a step of it; see `StepProgram`."""

    kept: KeptGraph
    sources: list[Source]
    caches: list[CacheSpec]
    lora: LoraSpec | None


def find(key: str, names: Collection[str]) -> KeptStep | None:
    """The entry of that key; None where there is none, or where it cannot be used with weights of these names."""
    kept = graph_cache.find(key)
    if kept is None:
        return None
    try:
        sources = [_source(item, kept.constants, names) for item in kept.more["sources"]]
        lora = step_json.lora_from_json(kept.more["lora"])
        step_json.check_lora(kept.program, lora)
        return KeptStep(kept, sources, step_json.caches_from_json(kept.more["caches"]), lora)
    except (ProgramFileError, LookupError, TypeError) as error:
        log.warning("the kept step program %s cannot be used (%s); compiling it again", key, error)
        return None


def keep(
    key: str,
    program: Program,
    graph: fx.Graph,
    weights: Sequence[Node],
    sources: Sequence[Source],
    caches: Sequence[CacheSpec],
    lora: LoraSpec | None,
    report: GraphReport,
) -> None:
    """Keeps a compilation; arguments and failures as `graph_cache.keep`, `sources` for each placeholder of `graph`."""
    constants = [source for source in sources if isinstance(source, torch.Tensor)]
    number = iter(range(len(constants)))
    more = {
        "sources": [next(number) if isinstance(source, torch.Tensor) else source for source in sources],
        "caches": step_json.caches_to_json(caches),
        "lora": step_json.lora_to_json(lora),
    }
    graph_cache.keep(key, program, graph, weights, constants, report, more)


def _source(item: Any, constants: Sequence[torch.Tensor], names: Collection[str]) -> Source:
    if item is None or (isinstance(item, str) and item in names):
        return item
    if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(constants):
        return constants[item]
    raise ProgramFileError(f"unknown source of an argument {str(item)[:40]!r}")
