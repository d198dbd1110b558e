"""Views inside loops: every transform against eager, split loops for concatenations, factored ones for reshapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.loop_programs import check, compiled

aten = torch.ops.aten

VIEWS: dict[str, Callable[..., Any]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "t": lambda x: x[0].t(),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze_all": lambda x: x[:, :1].squeeze(),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    "expand_as": lambda x: x[:1].expand_as(x),
    "slice": lambda x: x[:, 1:-1, ::2],
    "slice_end": lambda x: x[..., -3:],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: x[:, -1],
    "split": lambda x: x.split(2, -1)[1],
    "split_sizes": lambda x: x.split([4, 8], -1)[1],
    "chunk": lambda x: x.chunk(3, -1)[2],
    "unbind": lambda x: x.unbind(-1)[2],
    "flatten": lambda x: x.flatten(1, 2),
    "flatten_all": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(-1, (4, 3)),
    "view_split": lambda x: x.view(x.shape[0], x.shape[1], 3, 4),
    "view_merge": lambda x: x.view(-1, 12),
    "view_other": lambda x: x.reshape(x.shape[0], 4, 3, -1),
    "view_as": lambda x: x.view_as(x + 1),
    "reshape_transposed": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "clone": lambda x: x.transpose(0, 2).clone(),
    "detach": lambda x: x.detach(),
    "repeat": lambda x: x.repeat(2, 1, 1, 3),
    "interleave": lambda x: x.repeat_interleave(2, 1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(-1, dims=-2),
    "roll_far": lambda x: x.roll(29, dims=-1),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2),
    "back": lambda x: x.view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "mix": lambda x: x.view(x.shape[0], x.shape[1], 3, 4)[:, :, 1:, ::2].permute(0, 2, 1, 3).flatten(2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view_between_two_ops(name: str) -> None:
    """Computed before and after, so that the transform is inside the kernel, on dense and on strided input."""
    view = VIEWS[name]

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [view(x.exp()) * 2, view(x) + 1]

    check(function, torch.randn(5, 7, 12), again=[[torch.randn(2, 3, 12)]], static=[-1])


@pytest.mark.parametrize("name", ["transpose", "slice", "heads", "reshape_transposed", "flatten"])
def test_view_of_strided_input(name: str) -> None:
    view = VIEWS[name]
    if name in ("heads", "flatten"):
        check(lambda x: view(x) + 1, torch.randn(7, 5, 24)[:, :, ::2].contiguous().transpose(0, 1).contiguous())
    else:
        check(lambda x: view(x) + 1, torch.randn(12, 7, 5).permute(2, 1, 0))


def test_views_of_claimed_results_are_addressed_not_copied() -> None:
    program = check(
        lambda x, w: torch.nn.functional.linear(x, w).view(x.shape[0], 3, 4).transpose(0, 1) * 2,
        torch.randn(5, 6),
        torch.randn(12, 6),
        claimed=[aten.linear.default],
        kernels=1,
    )
    (group,) = program.plan.groups
    assert [node.target for node in group.inputs] == [aten.linear.default]


def test_an_index_made_of_ranges_is_arithmetic() -> None:
    """How transformers reads a padding mask: by broadcast ranges of batch and key."""

    def function(mask: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(mask.shape[0]), torch.arange(1, mask.shape[1])
        return mask[rows[:, None, None], columns[None, None, :] - 1].expand(-1, 4, -1) + 1

    check(function, torch.randn(3, 7), again=[[torch.randn(5, 2)]])


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def test_rotation_of_halves_has_no_conditional() -> None:
    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rope(x.view(x.shape[0], -1, 4, 16).transpose(1, 2), cos, sin)

    program = check(function, torch.randn(2, 7, 64), torch.randn(7, 16), torch.randn(7, 16), kernels=1, static=[-1])
    (nest,) = program.plan.groups[0].kernel.nests
    sweeps = nest.sweeps
    assert [sweep.sizes for sweep in sweeps] == [(8,)]  # both halves at once: each is read once and used twice
    assert len(sweeps[0].stores) == 2
    assert all(getattr(v, "guard", -1) < 0 for sweep in sweeps for v in sweep.values)


def test_interleaved_rotation() -> None:
    """GPT-J's: pairs of neighbours, so the loops step by two."""

    def function(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * cos

    check(function, torch.randn(3, 5, 16), torch.randn(5, 16), kernels=1, static=[-1])


@pytest.mark.parametrize("threads", [1, 2])
def test_rope_tables_as_transformers_computes_them(threads: int) -> None:
    def function(positions: torch.Tensor, inverse: torch.Tensor) -> list[torch.Tensor]:
        wide = inverse[None, :, None].float().expand(positions.shape[0], -1, 1)
        angles = (wide.float() @ positions[:, None, :].float()).transpose(1, 2)
        table = torch.cat((angles, angles), -1)
        return [(table.cos() * 1.5).to(torch.bfloat16), (table.sin() * 1.5).to(torch.bfloat16)]

    inverse = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    far = torch.randint(0, 131072, (2, 9))
    check(
        function, torch.arange(33).repeat(3, 1), inverse, again=[[far, inverse]], kernels=1, static=[], threads=threads
    )


def test_growing_a_cache_copies_without_conditionals() -> None:
    program = check(
        lambda past, new: torch.cat([past, new * 2], 2),
        torch.randn(2, 3, 5, 8),
        torch.randn(2, 3, 7, 8),
        again=[[torch.randn(4, 2, 11, 8), torch.randn(4, 2, 2, 8)]],
        kernels=1,
        static=[-1],
    )
    (nest,) = program.plan.groups[0].kernel.nests
    assert len(nest.sweeps) == 2
    assert all(getattr(v, "guard", -1) < 0 for sweep in nest.sweeps for v in sweep.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_copies_keep_every_bit(dtype: torch.dtype) -> None:
    """NaN payloads too: a run of elements is moved, not converted."""
    bits = torch.randint(0, 2**15, (2, 6, 5, 16)).to(torch.int16)
    x = bits.view(torch.bfloat16) if dtype == torch.bfloat16 else bits.to(dtype)
    program = compiled(lambda x: x.transpose(1, 2).contiguous(), x, static=[-1])
    actual = program(x)
    expected = x.transpose(1, 2).contiguous()
    raw = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(dtype, dtype)
    assert torch.equal(actual.view(raw), expected.view(raw))


def test_concatenation_behind_an_unknown_offset_chooses_by_element() -> None:
    """The cut lies inside the second half of a strided view: no loop can be split there."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y], 0)[::3] + 1

    check(function, torch.randn(5, 4), torch.randn(8, 4), again=[[torch.randn(2, 4), torch.randn(3, 4)]])


def test_nested_concatenations() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([x, y * 2, x + 1], 1)
        return torch.cat([inner, inner.flip(1)[:, :3]], 1)[:, 2:-1] * 3

    check(function, torch.randn(3, 4), torch.randn(3, 6))


def test_dimensions_without_entries() -> None:
    """Nothing is divided by their size."""
    check(lambda x: (x.reshape(4, 0) + 1).reshape(0, 2, 2), torch.randn(0, 4), static=[-1, -2])
    check(lambda x: (x + 1).reshape(0).reshape(5, 0, 3), torch.randn(0, 4), static=[-1, -2])
    check(lambda x: [x.roll(1, 0) * 2, x.repeat(2, 3) + 1], torch.randn(0, 4), static=[-1, -2])
    check(lambda x: x[2, 0].repeat(2, 3) + 1, torch.randn(3, 4), static=[-1, -2])


def test_empty_piece_of_a_concatenation() -> None:
    check(
        lambda x, y: torch.cat([x, y], 0) + 1,
        torch.randn(4, 3),
        torch.randn(5, 3),
        again=[[torch.randn(0, 3), torch.randn(5, 3)]],
    )


def test_partial_rotation_of_split_projections() -> None:
    """One merged projection, split in three, a slice of the head rotated (GPT-NeoX)."""

    def function(qkv: torch.Tensor, cos: torch.Tensor) -> list[torch.Tensor]:
        heads = qkv.view(qkv.shape[0], qkv.shape[1], 3, 48).transpose(1, 2)
        q, k, v = heads.chunk(3, -1)
        turned = rope(q[..., :8], cos, 1 - cos)
        return [torch.cat([turned, q[..., 8:]], -1), k * 2, v + 1]

    check(
        function,
        torch.randn(2, 5, 144),
        torch.randn(5, 8),
        again=[[torch.randn(3, 9, 144), torch.randn(9, 8)]],
        static=[-1],
    )


def test_graph_outputs_that_are_views_are_their_bases() -> None:
    program = compiled(lambda x: (x + 1).transpose(0, 1), torch.randn(3, 5))
    (group,) = program.plan.groups
    assert [node.target for node in group.outputs] == [aten.add.Tensor]
