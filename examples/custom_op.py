"""An op, a pass and a C++ kernel of your own: squared ReLU (So et al., 2021), as nanoGPT-like models use it.

Importing this file registers all three; `docs/extending.md` goes through it line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import llmopt
from llmopt.codegen.cpu.registry import FLOATS, KernelSpec, Plan, PlannedCall, layout
from llmopt.compiler.graph import Rewriter, aten, is_op, nodes_of, tensor
from llmopt.compiler.opspec import Cost, nbytes, numel
from llmopt.compiler.pass_manager import PassContext, PassReport

# ---- the op: schema, meaning, shape, cost, samples -----------------------------------------------------------------


def samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for shape in [(1, 1), (3, 17), (2, 5, 130)]:
        yield ((torch.randn(shape, generator=rng) * 2).to(dtype),)


@llmopt.register_op(
    "squared_relu(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    cost=lambda x: Cost(2 * numel(x), nbytes(x), nbytes(x)),
    samples=samples,
    row_local=True,
)
def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`, elementwise."""
    return torch.relu(x).square()


squared_relu_op = torch.ops.llmopt.squared_relu.default

# ---- the pass: where models write it out ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RaiseSquaredRelu(llmopt.Pass):
    """Before: `pow(relu(x), 2)`. After: `llmopt.squared_relu(x)`."""

    name = "raise_squared_relu"

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        rewriter = Rewriter(graph)
        for power in nodes_of(graph, aten.pow.Tensor_Scalar):
            relu, exponent = power.args
            if not is_op(relu, aten.relu.default):
                report.skipped["what is squared is no relu"] += 1
                continue
            if exponent != 2:
                report.skipped["the exponent is not 2"] += 1
                continue
            if not context.burn():
                break
            with rewriter.before(power):
                new = rewriter.call(squared_relu_op, relu.args[0])
            rewriter.replace(power, new)
            report.matched += 1
        return report


# ---- the kernel: a C++ template, and when it is taken --------------------------------------------------------------

SOURCE = r"""
#include "abi.h"
#include "rows.h"

// tensors: x [count] T, out [count] T; ints: count. out = max(x, 0)^2 in float, rounded once.
namespace llmopt {
template <class T>
void squared_relu(const Args& a, const Worker& w) {
  const T* x = a.tensor<const T>(0);
  T* out = a.tensor<T>(1);
  const Range mine = share(w, a.ints[0], 64);
  for_vectors(mine.begin, mine.end, [&](std::int64_t i, auto access) {
    const vf y = access.load(x + i);
    const vf positive = y < 0.0f ? vf{} : y;  // NaN stays
    access.store(out + i, positive * positive);
  });
}
}  // namespace llmopt
"""


def plan(node: fx.Node) -> Plan:
    x = node.args[0]
    dtype = FLOATS.get(tensor(x).dtype)
    if dtype is None:
        return f"no kernel for {tensor(x).dtype}"
    if not (layout(x).is_contiguous and layout(node).is_contiguous):
        return "the operand is not contiguous"
    return [PlannedCall(KernelSpec("squared_relu", (dtype,)), (x, node), (layout(x).numel,), (), (node,))]


llmopt.register_kernel(squared_relu_op, "squared_relu", SOURCE, plan)
llmopt.register_pass(RaiseSquaredRelu(), before="raise_gated_act")


# ---- in use --------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """The feed-forward layer of a transformer with squared ReLU."""

    def __init__(self, hidden: int = 64, inner: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) ** 2)


def main() -> None:
    from llmopt.testing import check_op, check_pass

    print(f"{check_op('squared_relu', kernel='squared_relu')} comparisons with the reference")
    model, x = FeedForward(), torch.randn(2, 9, 64)
    check_pass(RaiseSquaredRelu(), model, x, after="raise_linear")
    report = llmopt.explain(model, x)
    print(report)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="llmopt")(x), model(x))


if __name__ == "__main__":
    main()
