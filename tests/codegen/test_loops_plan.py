"""Grouping: what shares a kernel, what must not, in which order groups run, and equal kernels for equal layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from kernels.loop_programs import Program, check, compiled, outputs_of, trace

from llmopt.codegen.loops import plan_loops

aten = torch.ops.aten
LINEAR = [aten.linear.default]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def layers(count: int) -> Callable[..., torch.Tensor]:
    """Pre-norm gated MLPs, as a decoder stacks them."""

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for n in range(count):
            scale, gate, up, down = weights[4 * n : 4 * n + 4]
            inner = norm(x, scale)
            hidden = torch.nn.functional.silu(torch.nn.functional.linear(inner, gate))
            hidden = hidden * torch.nn.functional.linear(inner, up)
            x = x + torch.nn.functional.linear(hidden, down)
        return x

    return function


def layer_inputs(count: int, rows: int = 5) -> list[torch.Tensor]:
    x = [torch.randn(2, rows, 24)]
    for _ in range(count):
        x += [torch.rand(24) + 0.5, torch.randn(40, 24) / 5, torch.randn(40, 24) / 5, torch.randn(24, 40) / 6]
    return [t.bfloat16() for t in x]


def members(program: Program) -> list[set[str]]:
    return [{node.name for node in group.nodes} for group in program.plan.groups]


def assert_runs_in_order(program: Program, claimed: Collection[Any] = ()) -> None:
    """Every buffer is written before it is read, each group standing at its last node."""
    position = {node: n for n, node in enumerate(program.module.graph.nodes)}
    written = {}
    for group in program.plan.groups:
        assert [position[n] for n in group.nodes] == sorted(position[n] for n in group.nodes)
        written.update(dict.fromkeys(group.outputs, position[group.nodes[-1]]))
    places = [position[group.nodes[-1]] for group in program.plan.groups]
    assert places == sorted(places)
    for group, place in zip(program.plan.groups, places, strict=True):
        for node in group.inputs:
            assert written.get(node, position[node]) < place
    for node in program.module.graph.nodes:
        if node.target in claimed:
            for source in node.all_input_nodes:
                assert written.get(source, -1) < position[node]


def test_equal_layers_share_kernels() -> None:
    program = check(
        layers(4), *layer_inputs(4), again=[layer_inputs(4, rows=9)], claimed=LINEAR, static=[-1], tolerance=0.1
    )
    kernels = {group.kernel for group in program.plan.groups}
    assert len(program.plan.groups) == 9
    assert len(kernels) == 4  # first norm, gate, add + norm, last add
    assert_runs_in_order(program, LINEAR)


def test_symbols_are_numbered_by_structure() -> None:
    """The same computation over other sizes of the same graph is the same kernel."""

    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [norm(x, x[0, 0]), norm(y, y[0, 0])]

    program = check(function, torch.randn(9, 3, 16), torch.randn(5, 11, 16), static=[-1], kernels=2)
    first, second = program.plan.groups
    assert first.kernel == second.kernel
    assert hash(first.kernel) == hash(second.kernel)
    assert set(first.symbols).isdisjoint(second.symbols)
    assert not {n.name for n in program.module.graph.nodes} & {first.kernel.name, *first.kernel.symbols}


def test_pointwise_producers_consumers_and_siblings_are_one_kernel() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        total = x.exp() + y
        return [total.tanh() * 0.5, total.sigmoid(), x.cos()]

    check(function, torch.randn(3, 5), torch.randn(5), kernels=1)


def test_claimed_nodes_are_barriers() -> None:
    program = check(
        lambda x, w: torch.nn.functional.linear(x.exp(), w).exp() + x.exp(),
        torch.randn(3, 5),
        torch.randn(5, 5),
        claimed=LINEAR,
        kernels=2,
    )
    assert_runs_in_order(program, LINEAR)
    assert [n.target for n in program.plan.groups[1].inputs if n.op == "call_function"].count(LINEAR[0]) == 1


def test_no_group_around_a_barrier() -> None:
    """a -> linear -> c and a -> c: one kernel for a and c would have to run before and after the linear."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a = x.exp()
        return a.tanh() + torch.nn.functional.linear(a, w) * a

    program = check(function, torch.randn(4, 6), torch.randn(6, 6), claimed=LINEAR)
    assert_runs_in_order(program, LINEAR)
    assert len(program.plan.groups) == 2


def test_interleaved_barriers_do_not_make_a_cycle() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        linear = torch.nn.functional.linear
        a, b = x.exp(), x.sin()
        c, d = linear(a, w), linear(b, w)
        e, f = c.tanh() + b, d.tanh() + a
        return [linear(e, w) * f, linear(f, w) * e, e.cos(), f.cos()]

    program = check(function, torch.randn(4, 6), torch.randn(6, 6), claimed=LINEAR, tolerance=1e-3)
    assert_runs_in_order(program, LINEAR)


def test_rejected_nodes_have_reasons_and_are_barriers() -> None:
    program = check(
        lambda x: x.exp().sort(-1)[0] * 2 + x.cumsum(0).exp(),
        torch.randn(5, 7),
        rejected=["aten.sort.default", "aten.cumsum.default"],
    )
    assert_runs_in_order(program)
    reasons = {str(node.target): why for node, why in program.plan.rejected.items()}
    assert reasons["aten.sort.default"] == "aten.sort.default has no loop form"
    check(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2) + 1, torch.randn(3, 2), rejected=COMPLEX)


COMPLEX = ["aten.mul.Tensor", "aten.view_as_complex.default", "aten.view_as_real.default"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: aten.linalg_vector_norm(x, 3, [-1]), "order 3"),
        (lambda x: aten.pow(x.to(torch.int64), x.abs().to(torch.int64)), "computed power"),
        (lambda x: aten.slice_scatter(x, x[::2], 0, 0, 4, 2), "with a step"),
        (lambda x: aten.constant_pad_nd(x, [-1, 0]), "crops"),
    ],
)
def test_forms_of_an_op_that_are_not_covered_are_rejected_alone(function: Callable[..., Any], reason: str) -> None:
    """What surrounds the op is still fused."""
    program = compiled(lambda x: function(x + 1).exp().cos(), torch.randn(4, 5), static=[-1, -2])
    assert [reason in why for why in program.plan.rejected.values()] == [True]
    assert {"exp", "cos"} in members(program)


def test_expensive_values_are_not_computed_again_for_every_broadcast() -> None:
    program = check(lambda x, y: [y * x.cos(), y + x.cos().unsqueeze(0)], torch.randn(7, 16), torch.randn(5, 7, 16))
    for group in program.plan.groups:
        targets = {node.target for node in group.nodes}
        assert not {aten.cos.default, aten.mul.Tensor} <= targets


def test_cheap_values_are_computed_where_they_are_used() -> None:
    """A cast of a weight is never stored."""
    program = check(
        lambda x, w, v: [x * (w.float() + 1), torch.nn.functional.linear(x, v) * (w.float() + 1)],
        torch.randn(3, 8),
        torch.randn(8).bfloat16(),
        torch.randn(8, 8),
        claimed=LINEAR,
    )
    outputs = [node.target for group in program.plan.groups for node in group.outputs]
    assert outputs == [aten.mul.Tensor, aten.mul.Tensor]


def test_views_needed_by_others_are_not_computed_but_copies_are() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scaled = x * 2
        return torch.nn.functional.linear(scaled.transpose(0, 1), w) + torch.nn.functional.linear(
            x.transpose(0, 1).contiguous(), w
        )

    program = check(function, torch.randn(6, 5), torch.randn(3, 6), claimed=LINEAR)
    outputs = [node.target for group in program.plan.groups for node in group.outputs]
    assert aten.mul.Tensor in outputs
    assert aten.transpose.int not in outputs
    assert aten.clone.default in outputs or aten.contiguous.default in outputs


def test_dead_code_is_dropped_and_a_plain_graph_has_no_groups() -> None:
    def dead(x: torch.Tensor) -> torch.Tensor:
        x.exp()
        return x.cos()

    (group,) = compiled(dead, torch.randn(3)).plan.groups
    assert [node.target for node in group.nodes] == [aten.cos.default]
    module = trace(lambda x: x.view(-1), torch.randn(3, 4))
    plan = plan_loops(module.graph, lambda node: False, outputs_of(module.graph))
    assert plan.groups == ()
    assert plan.rejected == {}


def test_long_chains_are_cut() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for n in range(130):
            x = (x * 1.01).sin() + n / 100
        return x

    program = check(function, torch.randn(3, 5), tolerance=1e-3)
    assert len(program.plan.groups) > 2
    assert_runs_in_order(program)


def test_diamonds_do_not_grow() -> None:
    """x = x * x + x, thirty times: written out as a tree this would be 2^30 loads."""

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            x = (x * 0.5 + x.sin() * x).tanh()
        return x

    program = check(function, torch.randn(3, 5), tolerance=1e-3)
    assert sum(len(s.values) for g in program.plan.groups for n in g.kernel.nests for s in n.sweeps) < 400


def test_planning_does_not_touch_the_graph() -> None:
    module = trace(layers(2), *layer_inputs(2))
    before = str(module.graph)
    plans = [plan_loops(module.graph, lambda n: n.target in LINEAR, outputs_of(module.graph)) for _ in range(2)]
    assert str(module.graph) == before
    assert plans[0] == plans[1]
