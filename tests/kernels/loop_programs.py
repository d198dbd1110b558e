"""Runs a traced function with its fused loops compiled and everything else in eager.

In a process with TRITON_INTERPRET=1 the loops are Triton kernels instead of C++, run in Triton's interpreter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from llmopt.codegen.cpu.native import SYMBOL, KernelError, NativeCall, NativePlan, TensorOperand
from llmopt.codegen.cpu.toolchain import InstructionSet, build_library, host_level, supported_levels
from llmopt.codegen.loops import (
    LoopGroup,
    LoopKernel,
    LoopPlan,
    is_alias,
    kernel_from_json,
    kernel_to_json,
    plan_loops,
    print_kernel,
)
from llmopt.codegen.triton.launch import run as run_launches
from llmopt.codegen.triton.loops import loop_launches

aten = torch.ops.aten
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

VARIANTS: dict[str, tuple[InstructionSet, dict[str, int]]] = {
    "host": (host_level(), {}),
    **{level.name: (level, {}) for level in supported_levels()},
    "avx512_emulated": (host_level(), {"LLMOPT_VECTOR_BYTES": 64}),
}


def trace(function: Callable[..., Any], *inputs: torch.Tensor, static: Collection[int] = ()) -> GraphModule:
    """The function as a functional ATen graph, as captured programs have it.

    Sizes are symbolic (equal ones share a symbol, 0 and 1 are constants), but for those of the dimensions in `static`,
    which count from the last one as -1.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(x: torch.Tensor) -> torch.Tensor:
        kinds = [DimDynamic.STATIC if d - x.dim() in static else DimDynamic.DUCK for d in range(x.dim())]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    with torch.no_grad(), mode:
        return make_fx(function, pre_dispatch=True)(*map(fake, inputs))


def outputs_of(graph: torch.fx.Graph) -> list[Node]:
    """The nodes that leave the graph."""
    return list(next(node for node in graph.nodes if node.op == "output").all_input_nodes)


@functools.cache
def native(kernels: tuple[LoopKernel, ...], variant: str = "host") -> dict[LoopKernel, NativePlan]:
    """The kernels compiled as one unit; each goes through its JSON form first, so that every test also tests that."""
    sources, entries = [], []
    for kernel in kernels:
        data = json.loads(json.dumps(kernel_to_json(kernel), allow_nan=False))
        again = kernel_from_json(data)
        assert again == kernel
        entries.append("loop_" + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16])
        sources.append(print_kernel(again, entries[-1]))
    level, defines = VARIANTS[variant]
    library = build_library(["\n".join(sources)], level, defines)
    plans = {}
    for kernel, entry in zip(kernels, entries, strict=True):
        operands = tuple(TensorOperand(n) for n in range(len(kernel.buffers)))
        ints = tuple((SYMBOL, n) for n in range(len(kernel.symbols)))
        plans[kernel] = NativePlan(library, [NativeCall(entry, operands, ints, ())])
    return plans


@dataclass
class Program:
    """A traced function and its loop plan."""

    module: GraphModule
    plan: LoopPlan
    threads: int = 2
    variant: str = "host"

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph on inputs of any sizes that the symbols admit."""
        values: dict[Node, Any] = {}
        sizes: dict[sympy.Symbol, int] = {}
        places = {group.nodes[-1]: group for group in self.plan.groups}
        inside = {node for group in self.plan.groups for node in group.nodes}
        waiting = iter(inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(waiting)
                _bind(node.meta["val"], values[node], sizes)
            elif node.op == "get_attr":
                values[node] = functools.reduce(getattr, str(node.target).split("."), self.module)
            elif node.op == "output":
                return tree_map(lambda a: self._value(a, values), node.args[0])
            elif node in places:
                self._run(places[node], values, sizes)
            elif node not in inside and not self._is_view(node):
                self._value(node, values)
        raise AssertionError("a graph without output")

    @staticmethod
    def _is_view(node: Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor) and is_alias(node)

    def _value(self, node: Any, values: dict[Node, Any]) -> Any:
        """A node's value in eager; that of a view when it is asked for, because its group may stand after it."""
        if not isinstance(node, Node):
            return node
        if node not in values:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    def _run(self, group: LoopGroup, values: dict[Node, Any], sizes: dict[sympy.Symbol, int]) -> None:
        for node in group.outputs:
            fake = node.meta["val"]
            shape, strides = ([_size(n, sizes) for n in numbers] for numbers in (fake.shape, fake.stride()))
            # Poisoned, so that an element that nobody writes is seen.
            elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
            poison = True if fake.dtype == torch.bool else 99
            values[node] = torch.full((elements,), poison, dtype=fake.dtype).as_strided(shape, strides)
        buffers = [self._value(node, values) for node in (*group.inputs, *group.outputs)]
        if INTERPRETED:
            self._interpret(group.kernel, buffers, [sizes[s] for s in group.symbols])
            return
        plan = native(tuple(dict.fromkeys(g.kernel for g in self.plan.groups)), self.variant)[group.kernel]
        plan.run([b.data_ptr() for b in buffers], [sizes[s] for s in group.symbols], self.threads)

    @staticmethod
    def _interpret(kernel: LoopKernel, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        status = torch.zeros(1, dtype=torch.int32)
        flat = [
            torch.empty(0, dtype=b.dtype).set_(b.untyped_storage(), b.storage_offset(), (1,), (1,)) for b in buffers
        ]
        run_launches(loop_launches(kernel, flat, sizes, status))
        if status.item():
            raise KernelError(1, 0, kernel.name)


def _size(value: Any, sizes: dict[sympy.Symbol, int]) -> int:
    return int(value.node.expr.subs(sizes)) if isinstance(value, torch.SymInt) else int(value)


def _bind(fake: Any, real: Any, sizes: dict[sympy.Symbol, int]) -> None:
    pairs = [(fake, real)]
    if isinstance(fake, torch.Tensor):
        pairs = [*zip(fake.shape, real.shape, strict=True), *zip(fake.stride(), real.stride(), strict=True)]
    for symbolic, number in pairs:
        if isinstance(symbolic, torch.SymInt) and isinstance(symbolic.node.expr, sympy.Symbol):
            sizes.setdefault(symbolic.node.expr, int(number))


def compiled(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    claimed: Collection[Any] = (),
    static: Collection[int] = (),
    threads: int = 2,
    variant: str = "host",
) -> Program:
    """Traces on `inputs` and plans; ops in `claimed` are run by eager."""
    module = trace(function, *inputs, static=static)
    plan = plan_loops(module.graph, lambda node: node.target in claimed, outputs_of(module.graph))
    return Program(module, plan, threads, variant)


def check(
    function: Callable[..., Any],
    *inputs: Any,
    again: Sequence[Sequence[Any]] = (),
    claimed: Collection[Any] = (),
    kernels: int | None = None,
    rejected: Sequence[str] = (),
    tolerance: float | None = None,
    **options: Any,
) -> Program:
    """Compares the compiled function with eager on `inputs`, and on every other set in `again`."""
    program = compiled(function, *inputs, claimed=claimed, **options)
    found = sorted(str(node.target) for node in program.plan.rejected)
    assert found == sorted(rejected), program.plan.rejected
    if kernels is not None:
        assert len(program.plan.groups) == kernels, [[n.name for n in g.nodes] for g in program.plan.groups]
    for sample in (inputs, *again):
        compare(program(*sample), function(*sample), tolerance)
    return program


def compare(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Equality up to the rounding of the dtype; integers and bools exactly."""
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            compare(one, other, tolerance)
        return
    assert actual.shape == expected.shape
    # Half types: a fused kernel keeps intermediates in float32 where eager rounds each one.
    default = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5, torch.float64: 1e-12}
    near = default.get(expected.dtype, 0.0) if tolerance is None else tolerance
    torch.testing.assert_close(actual, expected, rtol=near, atol=near, equal_nan=True)
