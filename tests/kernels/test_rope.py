"""rope against float64, both pairings."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

# One rounding of the result; in float32 the two products round as well, and may cancel.
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 1e-6), torch.float16: (5e-4, 1e-6)}


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rotary = cos.shape[-1]
    out, head = x.double(), x.double()[..., :rotary]
    if interleaved:
        rotated = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
    else:
        rotated = torch.cat((-head[..., rotary // 2 :], head[..., : rotary // 2]), -1)
    turned = head * cos.double()[:, None] + rotated * sin.double()[:, None]
    return torch.cat((turned, out[..., rotary:]), -1)


def tables(tokens: int, rotary: int, interleaved: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, rotary // 2) * 100
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype: torch.dtype, interleaved: bool, variant: str) -> None:
    sizes = [(1, 1, 2, 2), (1, 9, 64, 64), (5, 3, 80, 32), (3, 2, 33, 10), (2, 5, 128, 128), (4, 1, 7, 6)]
    for (tokens, heads, dim, rotary), threads, same in itertools.product(sizes, (1, 2), (True, False)):
        table = dtype if same else torch.float32
        call = f"rope<{CPP_TYPE[dtype]}, {CPP_TYPE[table]}, {str(interleaved).lower()}>"
        wide = torch.randn(tokens, heads + 2, dim).to(dtype)
        x = wide[:, 1:-1]
        cos, sin = tables(tokens, rotary, interleaved, table)
        expected = reference(x, cos, sin, interleaved)
        if rotary > 2:
            assert not torch.allclose(expected, reference(x, cos, sin, not interleaved))
        out = torch.empty(tokens, heads, dim, dtype=dtype)
        ints = [tokens, heads, dim, rotary, x.stride(0), x.stride(1)]
        run_kernel("rope.h", call, [x, cos, sin, out], [*ints, *out.stride()[:2], rotary, tokens], threads=threads,
                   variant=variant)  # fmt: skip
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)

        before = wide.clone()
        run_kernel("rope.h", call, [x, cos, sin, x], [*ints, *x.stride()[:2], rotary, tokens], threads=threads,
                   variant=variant)  # fmt: skip
        assert torch.equal(x, out), "in place differs"
        assert torch.equal(wide[:, [0, -1]], before[:, [0, -1]]), "touched other heads"


def test_a_batch_shares_one_table() -> None:
    batch, tokens, heads, dim = 3, 5, 2, 16
    x = torch.randn(batch, tokens, heads, dim)
    cos, sin = tables(tokens, dim, False, torch.float32)
    out = torch.empty_like(x)
    ints = [batch * tokens, heads, dim, dim, heads * dim, dim, heads * dim, dim, dim, tokens]
    run_kernel("rope.h", "rope<float, float, false>", [x, cos, sin, out], ints)
    for row in range(batch):
        torch.testing.assert_close(out[row].double(), reference(x[row], cos, sin, False), rtol=1e-5, atol=1e-5)
