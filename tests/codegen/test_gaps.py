"""Values whose strides leave gaps: a copy into a slice keeps the strides of the slice."""

from __future__ import annotations

import pytest
import torch
from graphs.capturing import catch

from llmopt.codegen.layout import layout
from llmopt.codegen.lower import lower, storage_bytes
from llmopt.compiler.graph import nodes_of

aten = torch.ops.aten


def keys(content: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """How latent attention puts its keys together."""
    whole = content.new_empty((*content.shape[:-1], content.shape[-1] + rotary.shape[-1]))
    whole[..., : content.shape[-1]].copy_(content)
    whole[..., content.shape[-1] :].copy_(rotary.expand_as(content[..., : rotary.shape[-1]]))
    return whole.transpose(1, 2).contiguous() * 2


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_copies_into_slices(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(keys, backend="llmopt", dynamic=dynamic, options={"fallback": "error"})
    content, rotary = torch.randn(2, 4, 19, 16), torch.randn(2, 1, 19, 8)
    assert torch.equal(compiled(content, rotary), keys(content, rotary))


def test_memory_covers_the_gaps() -> None:
    caught = catch(keys, torch.randn(2, 4, 5, 16), torch.randn(2, 1, 5, 8))
    copies = list(nodes_of(caught.graph, aten.copy.default))
    assert copies, "the graph as it is captured holds them"
    for node in copies:
        value = node.meta["val"]
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        assert reach > value.numel() and storage_bytes(layout(node)) >= reach * value.element_size()
    lowered = lower(caught.graph)
    assert lowered.program.values
