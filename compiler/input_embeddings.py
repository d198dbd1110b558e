"""Marks where a model takes the embeddings of its tokens, so that a pass finds the place in the captured graph.

What `inputs_embeds` of a transformers model stands for is the result of its embedding module, whatever that computes:
some scale it. A graph does not say where a module ends, hence a mark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

Tensor = torch.Tensor

# Not one of the vocabulary: it stands in graphs from capture to the pass `insert_prompt_embeds`, which removes it.
_LIBRARY = torch.library.Library("llmopt_mark", "DEF")
_LIBRARY.define("input_embeddings(Tensor embeddings) -> Tensor", tags=(torch.Tag.pointwise,))
_LIBRARY.impl("input_embeddings", lambda embeddings: embeddings.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("llmopt_mark::input_embeddings", torch.empty_like, lib=_LIBRARY)

INPUT_EMBEDDINGS: Any = torch.ops.llmopt_mark.input_embeddings.default


@contextlib.contextmanager
def marked(embedding: torch.nn.Module) -> Iterator[None]:
    """Within the block the results of `embedding` are marked; what they are does not change."""
    handle = embedding.register_forward_hook(lambda module, arguments, result: INPUT_EMBEDDINGS(result))
    try:
        yield
    finally:
        handle.remove()
