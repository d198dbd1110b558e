"""New inputs and new sizes of a step graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.node import Node

from llmopt.compiler.graph import Rewriter

# Hints of the new symbols: distinct, and neither 0 nor 1, which PyTorch would specialise.
_HINTS = {
    "num_seqs": 5,
    "max_blocks": 7,
    "num_rows": 3,
    "num_blocks": 23,
    "num_window_blocks": 19,
    "num_prompt_embeds": 11,
}


def new_size(rewriter: Rewriter, name: str) -> torch.SymInt:
    """A size that each call decides."""
    env: Any = rewriter.mode.shape_env
    source = ConstantSource(name)
    symbol = env.create_symbol(_HINTS[name], source, DimDynamic.DYNAMIC, None)
    return env.create_symintnode(symbol, hint=_HINTS[name], source=source)


def add_input(
    rewriter: Rewriter, before: Node, name: str, shape: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> Node:
    """A placeholder in front of `before`."""
    with rewriter.graph.inserting_before(before):
        node = rewriter.graph.placeholder(name)
    with rewriter.mode:
        node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=device)
    return node


def behind_caches(nodes: Sequence[Node]) -> Node:
    """What follows the last cache among the placeholders of a step graph: further inputs stand in front of it."""
    return [node for node in nodes if "cache" in node.meta][-1].next
