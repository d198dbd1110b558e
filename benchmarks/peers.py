"""The peers: eager PyTorch, Inductor, OpenVINO, and llmopt beside them.

Decoders have the same two methods, whoever runs them; those of torch.compile are in `backends.py`.

The peers use transformers' StaticCache, llmopt its step program; each runs a greedy loop of one forward and one argmax
per token, which is less work per token than `generate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from backends import compiled_forward
from compile_models import cache_name
from harness import Contestant
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.runtime.step_program import StepBatch


class StaticDecoder:
    """Greedy decoding of one sequence at a time with a StaticCache of `max_tokens`.

    Args:
        model: in eval mode.
        max_tokens: the cache's length; attention reads all of it at every step, so it should be no longer than needed.
        prefill, decode: callables with the model's signature, `model` itself or compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_tokens: int,
        prefill: Callable[..., Any] | None = None,
        decode: Callable[..., Any] | None = None,
    ) -> None:
        config = model.config
        self._prefill, self._decode = prefill or model, decode or model
        self._cache_name = cache_name(model)
        self._cache = StaticCache(config=config, max_cache_len=max_tokens)
        # Now, and not at the first update: the cache's tensors must not be made inside a compiled region.
        self._cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
        )
        self._length = 0
        self._device = model.device
        self._last = torch.zeros(1, 1, dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> int:
        """Forgets the last sequence, runs the prompt and returns the first new token."""
        self._cache.reset()
        self._length = len(tokens)
        positions = torch.arange(len(tokens), device=self._device)[None]
        ids = torch.tensor([list(tokens)], device=self._device)
        self._last = self._step(self._prefill, ids, positions)
        return int(self._last)

    @torch.no_grad()
    def decode(self, steps: int) -> list[int]:
        """Runs `steps` forward passes of one token each; returns the tokens that they chose."""
        chosen = []
        for _ in range(steps):
            self._last = self._step(self._decode, self._last, torch.tensor([[self._length]], device=self._device))
            self._length += 1
            chosen.append(int(self._last))
        return chosen

    def _step(self, forward: Callable[..., Any], tokens: Tensor, positions: Tensor) -> Tensor:
        out = forward(
            input_ids=tokens,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)


def eager_decoder(model: PreTrainedModel, max_tokens: int) -> StaticDecoder:
    """transformers' own modules, uncompiled."""
    return StaticDecoder(model, max_tokens)


def inductor_decoder(
    model: PreTrainedModel,
    max_tokens: int,
    *,
    prefill: Literal["compiled", "eager"] = "compiled",
    peer: Literal["inductor", "inductor-freezing"] = "inductor",
) -> StaticDecoder:
    """The same forward under `torch.compile`, with static shapes. Freezing makes a copy of the weights.

    `prefill="eager"` compiles decoding only, as transformers' own `generate` does: right for prompts of many lengths,
    each of which would be compiled anew.
    """
    compiled = compiled_forward(model, peer)
    return StaticDecoder(model, max_tokens, compiled if prefill == "compiled" else None, compiled)


class StepDecoder:
    """llmopt's step program under the same loop: one sequence in a paged cache of `max_tokens`, one step per token."""

    def __init__(self, model: PreTrainedModel, max_tokens: int, options: Options | None = None) -> None:
        self.report = Report()
        self._engine = ModelEngine(model, options or Options(), self.report)
        self._program = self._engine.program()
        self._cache = self._program.new_cache(-(-max_tokens // self._program.block_size))
        self._blocks = self._cache.allocate(max_tokens)
        self._length, self._last = 0, 0

    def prefill(self, tokens: Sequence[int]) -> int:
        """Forgets the last sequence, runs the prompt in one step and returns the first new token."""
        self._length = 0
        return self._step(list(tokens))

    def decode(self, steps: int) -> list[int]:
        """Runs `steps` steps of one token each; returns the tokens that they chose."""
        return [self._step([self._last]) for _ in range(steps)]

    def _step(self, tokens: list[int]) -> int:
        batch = StepBatch.build([tokens], [self._length], [self._blocks], self._program.block_size)
        self._length += len(tokens)
        self._last = int(self._program(batch, self._cache)[0].argmax())
        return self._last


class Decoder(Protocol):
    """What the three have in common."""

    def prefill(self, tokens: Sequence[int]) -> int: ...

    def decode(self, steps: int) -> list[int]: ...


def contestant(name: str, decoder: Decoder, prompt: Sequence[int], steps: int, **describe: Any) -> Contestant:
    """A contestant with the phases "prefill" (the prompt) and "decode" (`steps` more tokens)."""

    def prefill() -> int:
        decoder.prefill(prompt)
        return len(prompt)

    def decode() -> int:
        return len(decoder.decode(steps))

    return Contestant(name, {"prefill": prefill, "decode": decode}, describe)
