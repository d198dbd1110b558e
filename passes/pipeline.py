"""The order of all passes, on one screen."""

from __future__ import annotations

from llmopt.compiler import pass_manager
from llmopt.compiler.pass_manager import Pass
from llmopt.passes.eliminate_common import EliminateCommon
from llmopt.passes.fuse_residual_norm import FuseResidualNorm
from llmopt.passes.insert_kv_cache import InsertKVCache
from llmopt.passes.insert_lora import InsertLora
from llmopt.passes.insert_prompt_embeds import InsertPromptEmbeds
from llmopt.passes.merge_linears import MergeLinears
from llmopt.passes.normalize import Normalize, SimplifyViews
from llmopt.passes.raise_activations import RaiseActivations
from llmopt.passes.raise_batched_linear import RaiseBatchedLinear
from llmopt.passes.raise_convolution import RaiseConvolution
from llmopt.passes.raise_gated_act import RaiseGatedAct
from llmopt.passes.raise_grouped_linear import RaiseGroupedLinear
from llmopt.passes.raise_linear import RaiseLinear
from llmopt.passes.raise_moe import RaiseMoe
from llmopt.passes.raise_norms import RaiseNorms
from llmopt.passes.raise_rope import RaiseRope
from llmopt.passes.registry import register_pass, unregister_pass, with_registered
from llmopt.passes.split_complex import SplitComplex
from llmopt.passes.substitute_attention import SubstituteAttention

# Any captured graph: from ATen to the vocabulary.
RAISING: tuple[Pass, ...] = (
    Normalize(),
    EliminateCommon(),
    SplitComplex(),
    RaiseConvolution(),
    RaiseLinear(),
    RaiseNorms(),
    SubstituteAttention(),
    RaiseRope(),
    RaiseActivations(),
    RaiseGatedAct(),
    RaiseMoe(),
    RaiseGroupedLinear(),
    RaiseBatchedLinear(),
    SimplifyViews(),
)

# After that, and after KV-cache insertion where a step graph is made.
FUSING: tuple[Pass, ...] = (
    MergeLinears(),
    FuseResidualNorm(),
    SimplifyViews(),
    EliminateCommon(),
)

# The backend: a graph with the caller's own inputs, caches and masks.
BACKEND: tuple[Pass, ...] = RAISING + FUSING


def backend_pipeline() -> tuple[Pass, ...]:
    """BACKEND with the passes that users have registered."""
    return with_registered(BACKEND)


def step_pipeline(
    block_size: int, kv_dtype: str = "auto", lora: InsertLora | None = None, *, prompt_embeds: bool = False
) -> tuple[Pass, ...]:
    """The step program: a cache-less graph becomes one step over a paged cache with pages of `block_size` tokens.

    With `lora`, each token may have an adapter; with `prompt_embeds`, an embedding of its own.
    """
    merge, *rest = FUSING
    cached = InsertKVCache(block_size=block_size, kv_dtype=kv_dtype)
    given = (InsertPromptEmbeds(),) if prompt_embeds else ()
    adapted = (lora,) if lora is not None else ()
    return with_registered((*RAISING, cached, *given, merge, *adapted, *rest))


pass_manager.ALL_PASS_NAMES.update(item.name for item in step_pipeline(16, lora=InsertLora(), prompt_embeds=True))

__all__ = [
    "BACKEND",
    "FUSING",
    "RAISING",
    "InsertLora",
    "InsertPromptEmbeds",
    "backend_pipeline",
    "register_pass",
    "step_pipeline",
    "unregister_pass",
]
