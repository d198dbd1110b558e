"""A graph of a single op of the vocabulary, lowered and run as every compiled graph is."""

from __future__ import annotations

from llmopt.testing import one_op_graph
from llmopt.testing import run_op as run_compiled

__all__ = ["one_op_graph", "run_compiled"]
