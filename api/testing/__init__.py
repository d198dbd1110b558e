"""Helpers to test what you add to llmopt, and to find what went wrong: ops, passes, bisection, minimal repros."""

from __future__ import annotations

from llmopt.testing.bisection import Found, bisect
from llmopt.testing.graphs import CapturedCall, capture_call, one_op_graph
from llmopt.testing.ops import check_op, run_op
from llmopt.testing.passes import Rewritten, check_must_not_fire, check_pass
from llmopt.testing.reproduction import write_repro

__all__ = [
    "CapturedCall",
    "Found",
    "Rewritten",
    "bisect",
    "capture_call",
    "check_must_not_fire",
    "check_op",
    "check_pass",
    "one_op_graph",
    "run_op",
    "write_repro",
]
