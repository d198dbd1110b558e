"""Capturing a forward: what was captured before it plays no part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmopt
from llmopt.compiler.errors import UnsupportedError
from llmopt.tracing import trace_forward


class _Sliced(nn.Module):
    """Logits from as many columns of an embedding as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.width, self.scale = 4, 0.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)[..., : self.width] * self.scale


def test_numbers_that_have_changed_since_an_earlier_capture_are_no_arguments() -> None:
    model = _Sliced()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids)  # type: ignore[no-any-return]

    first, _ = trace_forward(forward, 12)
    model.width, model.scale = 6, 0.25
    second, arguments = trace_forward(forward, 12)
    assert second.weights == first.weights and len(arguments) == len(second.weights)


def test_what_cannot_be_traced_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that do not fit, and a failure of PyTorch's export, which the backend answers by eager mode."""
    model = _Sliced()
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        trace_forward(lambda ids: model(ids) @ torch.ones(5, 2), 12)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("odd tensors")

    monkeypatch.setattr("torch._functorch.aot_autograd.aot_export_module", broken)
    with pytest.raises(UnsupportedError, match="cannot export the graph: odd tensors") as caught:
        trace_forward(model.forward, 12)
    assert isinstance(caught.value.__cause__, RuntimeError)
    torch._dynamo.reset()
    ids, options = torch.arange(4)[None], {"graph_cache": False}
    with torch.no_grad():
        found = torch.compile(model.forward, backend="llmopt", options=options)(ids)
    torch.testing.assert_close(found, model(ids))
    assert "odd tensors" in str(llmopt.explain().graphs[-1].refused)
