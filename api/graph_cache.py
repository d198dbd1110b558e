"""Compiled graphs, kept between processes: one that was compiled before skips capture, passes and lowering.

An entry lies in the kernel cache's folder under its `graph_key`, sealed as kernels are, and is typed JSON: program,
recipe of the weights, constants, and what `explain` reports. Only graphs whose compilation left Dynamo's guards alone
are kept, because a graph from the cache cannot add a guard.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.codegen import program_json
from llmopt.codegen.cpu import object_cache
from llmopt.codegen.program import Program
from llmopt.compiler.errors import LlmoptError, UnsupportedError
from llmopt.compiler.pass_manager import PassReport
from llmopt.compiler.report import Fallback, GraphReport
from llmopt.runtime import weight_recipe

log = logging.getLogger(__name__)

_MAX_CONSTANT_BYTES = 1 << 16


@dataclass(frozen=True)
class KeptGraph:
    """What is left of a compilation.

    graph, weights: as `WeightBinder` takes them.
    constants: the graph's further arguments.
    report: without what is worked out from the program.
    more: what was kept beside it, as plain data that nobody has looked at.
    """

    program: Program
    graph: fx.Graph
    weights: list[Node]
    constants: list[torch.Tensor]
    report: GraphReport
    more: Mapping[str, Any]


def find(key: str) -> KeptGraph | None:
    """The entry of that key; None where there is none, or where it cannot be read."""
    content = object_cache.read(_file(key))
    if content is None:
        return None
    try:
        data = json.loads(content)
        graph, weights = weight_recipe.from_json(data["weights"])
        return KeptGraph(
            program_json.from_json(data["program"]),
            graph,
            weights,
            [_tensor(item) for item in data["constants"]],
            _report(data["report"]),
            data["more"],
        )
    except (LlmoptError, LookupError, TypeError, ValueError, RuntimeError) as error:
        log.warning("the kept graph %s cannot be used (%s); compiling it again", key, error)
        return None


def keep(
    key: str,
    program: Program,
    graph: fx.Graph,
    weights: Sequence[Node],
    constants: Sequence[torch.Tensor],
    report: GraphReport,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Keeps a compilation; one that cannot be written down is left out, and a folder that takes nothing is no error."""
    try:
        data = {
            "program": program_json.to_json(program),
            "weights": weight_recipe.to_json(graph, weights),
            "constants": [_constant(tensor) for tensor in constants],
            "more": dict(more or {}),
            "report": {
                "kind": report.kind,
                "inputs": report.inputs,
                "passes": [{**vars(item), "skipped": dict(item.skipped)} for item in report.passes],
                "rejected": [vars(item) for item in report.rejected],
            },
        }
        content = json.dumps(data).encode()
    except (UnsupportedError, TypeError, ValueError) as error:
        log.debug("a graph is not kept: %s", error)
        return
    try:
        object_cache.write(_file(key), content)
    except OSError as error:
        log.warning("a compiled graph could not be kept: %s", error)


def _file(key: str) -> str:
    return f"{key}.graph"


def _report(data: Any) -> GraphReport:
    passes = [PassReport(**{**item, "skipped": Counter(item["skipped"])}) for item in data["passes"]]
    rejected = [Fallback(**item) for item in data["rejected"]]
    return GraphReport(str(data["kind"]), list(data["inputs"]), passes, rejected=rejected, from_cache=True)


def _constant(tensor: torch.Tensor) -> list[Any]:
    if tensor.nbytes > _MAX_CONSTANT_BYTES or tensor.device.type != "cpu":
        raise UnsupportedError("it holds a large constant, or one on a GPU")
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex() if tensor.numel() else ""
    return [program_json.dtype_name(tensor.dtype), list(tensor.shape), content]


def _tensor(data: Any) -> torch.Tensor:
    name, shape, content = data
    dtype = program_json.read_dtype(name)
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray.fromhex(content), dtype=torch.uint8).view(dtype).reshape(shape).clone()
