"""A tiny causal language model with a place for one more computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from graphs.capturing import mark_weights, randomise
from torch import Tensor, nn

from llmopt.compiler.capture import Captured
from llmopt.tracing import trace_forward

VOCABULARY, HIDDEN, HEADS, POSITIONS = 23, 16, 2, 64
Extra = Callable[["TinyCausal", Tensor, Tensor], Tensor]


class TinyCausal(nn.Module):
    """Embeddings of tokens and positions, layers of causal attention, a head.

    extra: (model, hidden[1, S, 16], positions[S]) -> hidden, called before the last layer.
    positions: length -> the index of each position in the table.
    windows: of each layer how many of the latest tokens it looks at, 0 for all; instead of `layers`.
    """

    def __init__(
        self,
        extra: Extra | None = None,
        positions: Callable[[int], Tensor] = torch.arange,
        layers: int = 1,
        windows: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.extra, self.positions = extra, positions
        self.windows = windows or (0,) * layers
        layers = len(self.windows)
        self.embed, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        self.qkv = nn.ModuleList([nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(layers)])
        self.out = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(layers)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, groups=HIDDEN)
        randomise(self)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.positions(ids.shape[1])
        x = self.embed(ids) + self.places(positions)
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            if layer == len(self.qkv) - 1 and self.extra is not None:
                x = self.extra(self, x, positions)
            q, k, v = qkv(self.norm(x)).view(1, -1, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
            mask = None
            if window := self.windows[layer]:
                places = torch.arange(ids.shape[1])
                mask = (places <= places[:, None]) & (places > places[:, None] - window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + out(y.transpose(1, 2).reshape(1, -1, HIDDEN))
        return self.head(self.norm(x))


def traced(model: Callable[[Tensor], Tensor], length: int = 12) -> Captured:
    """The graph of a forward, ready for the step pipeline."""
    captured, _ = trace_forward(model, length)
    mark_weights(captured)
    return captured
