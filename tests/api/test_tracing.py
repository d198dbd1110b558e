"""Capturing a forward: what was captured before it plays no part."""

from __future__ import annotations

import torch
from torch import nn

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
