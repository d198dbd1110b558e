"""The attention ops of the vocabulary: over contiguous keys, and over a paged cache for a ragged batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch

from llmopt.compiler.errors import VerificationError
from llmopt.compiler.graph import may_equal, to_expr
from llmopt.compiler.kv_formats import load_pages, row_bytes, store_rows
from llmopt.compiler.opspec import Cost, Tolerance, check_sizes, nbytes, numel, register_op

Tensor = torch.Tensor

_SOFTMAX = {
    torch.float32: Tolerance(1e-5, 1e-5, "softmax by online rescaling sums in another order"),
    torch.bfloat16: Tolerance(1.6e-2, 1e-2, "scores in float32; eager's float32 softmax is rounded before the product"),
    torch.float16: Tolerance(2e-3, 2e-3, "scores in float32; eager's float32 softmax is rounded before the product"),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of `q[B, S, H, D]` over `k[B, L, G, D]`, `v[B, L, G, E]` (G divides H) in float32: `[B, S, H, E]`.

    Scores are scaled, capped to `softcap * tanh(score / softcap)` if softcap > 0, biased, and masked where `visible`
    (broadcast to `[B, H, S, L]`) is false. A row that sees nothing gives zeros. `sinks[H]` are logits that take part in
    the softmax and carry no value.
    """
    repeat = q.shape[2] // k.shape[2]
    qt, kt, vt = (t.transpose(1, 2).float() for t in (q, k, v))
    kt, vt = kt.repeat_interleave(repeat, 1), vt.repeat_interleave(repeat, 1)
    scores = qt @ kt.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)
    weights = torch.where(torch.isnan(weights), torch.zeros(()), weights)
    return (weights[..., : k.shape[1]] @ vt).transpose(1, 2).to(q.dtype).contiguous()


def _attention_cost(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> Cost:
    batch, queries, heads, width = (to_expr(size) for size in q.shape)
    keys, value_width = to_expr(k.shape[1]), to_expr(v.shape[3])
    # Keys that a causal rule or a window hides are counted: what is skipped depends on the kernel.
    flops = 2 * batch * queries * heads * keys * (width + value_width)
    written = batch * queries * heads * value_width * q.element_size()
    return Cost(flops, nbytes(q, k, v, mask), written)


def _attention_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    make = lambda *shape: torch.randn(shape, generator=rng).to(dtype)  # noqa: E731
    for batch, s, length, heads, groups, size in [(1, 1, 5, 2, 1, 8), (2, 9, 9, 4, 2, 16), (1, 33, 40, 3, 3, 20)]:
        q, k, v = make(batch, s, heads, size), make(batch, length, groups, size), make(batch, length, groups, size)
        scale = size**-0.5
        yield q, k, v, None, False, scale, 0.0, 0, None, None
        yield q, k, v, None, True, scale, 2.0, 4, None, None
        yield q, k, v, None, True, scale, 0.0, 0, torch.rand(heads, generator=rng), None
        mask = torch.rand(batch, 1, s, length, generator=rng) > 0.3
        mask[..., 0] = True
        yield q, k, v, mask, False, scale, 0.0, 0, None, None
        additive = torch.randn(1, heads, s, length, generator=rng).to(dtype)
        yield q, k, v, additive, False, scale, 0.0, 0, None, None


def _check_heads(op: str, heads: Any, groups: Any, slopes: Tensor | None, sinks: Tensor | None) -> None:
    if not may_equal(heads % groups, 0):
        raise VerificationError(f"llmopt::{op}: {heads} heads do not share {groups} of keys and values evenly")
    check_sizes(op, "alibi_slopes", slopes, (heads,))
    check_sizes(op, "sinks", sinks, (heads,))


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    check_sizes("attention", "k", k, (batch, keys, groups, width))
    check_sizes("attention", "v", v, (batch, keys, groups, v.shape[-1]))
    _check_heads("attention", heads, groups, *rest[-2:])
    if mask is not None:
        scores = (batch, heads, queries, keys)[4 - min(mask.ndim, 4) :]
        seen = [size if not may_equal(given, 1) else 1 for given, size in zip(mask.shape, scores, strict=False)]
        check_sizes("attention", "mask", mask, seen)
    return q.new_empty((batch, queries, heads, v.shape[3]))


@register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, float softcap, int window,"
    " Tensor? alibi_slopes, Tensor? sinks) -> Tensor",
    fake=_attention_fake,
    cost=_attention_cost,
    samples=_attention_samples,
    tolerances=_SOFTMAX,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    window: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over contiguous keys: `q[B, S, H, D]`, `k[B, L, G, D]`, `v[B, L, G, E]` -> `[B, S, H, E]`.

    `mask` broadcasts to `[B, H, S, L]`: boolean (true may attend) or additive. `causal`: query i sees keys j <= i, as
    `scaled_dot_product_attention(is_causal=True)`; `window` > 0 additionally asks j > i - window. `alibi_slopes[H]` and
    `sinks[H]` as in `paged_attention`.
    """
    visible = bias = None
    if mask is not None and mask.dtype == torch.bool:
        visible = mask
    elif mask is not None:
        bias = mask.float()
    if causal or window:
        i = torch.arange(q.shape[1], device=q.device)[:, None]
        j = torch.arange(k.shape[1], device=q.device)[None, :]
        rule = j <= i
        if window:
            rule = rule & (j > i - window)
        visible = rule if visible is None else visible & rule
    if alibi_slopes is not None:
        slope = alibi_slopes.view(1, -1, 1, 1) * torch.arange(k.shape[1], device=q.device)
        bias = slope if bias is None else bias + slope
    return attend(q, k, v, visible, bias, scale, softcap, sinks)


# The context of a batch is data, not a size: the keys that a query sees on average.
CONTEXT = sympy.Symbol("context", positive=True)


def _paged_cost(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Cost:
    write, attend = paged_stages(q, k, v, *rest)
    return write + attend


def paged_stages(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Cost, Cost]:
    """What `paged_attention` costs by stage: writing this step's keys and values into the cache, and attending."""
    heads, width = (to_expr(size) for size in q.shape[-2:])
    groups, value_width = to_expr(k.shape[-2]), to_expr(v.shape[-1])
    tokens = numel(q) / (heads * width)
    requests = to_expr(rest[5].shape[0])
    kv_dtype = rest[11] if len(rest) > 11 else "auto"
    row = groups * (width + value_width) * k.element_size()
    if kv_dtype != "auto":
        row = groups * sum(row_bytes(kv_dtype, int(t.shape[-1])) for t in (k, v))
    cached = requests * CONTEXT * row
    flops = 2 * tokens * heads * CONTEXT * (width + value_width)
    written = tokens * heads * value_width * q.element_size()
    return Cost(sympy.Integer(0), nbytes(k, v), tokens * row), Cost(flops, nbytes(q) + cached, written)


def _paged_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[tuple[Any, ...]]:
    make = lambda *shape: torch.randn(shape, generator=rng).to(dtype)  # noqa: E731
    block_size = 4
    for heads, groups, size, kv_dtype, options in [
        (4, 2, 16, "auto", (0.0, 0, None, None)),
        (2, 1, 9, "auto", (1.5, 3, None, None)),
        (3, 3, 8, "auto", (0.0, 0, torch.rand(3, generator=rng), None)),
        (4, 2, 8, "auto", (0.0, 5, None, torch.randn(4, generator=rng))),
        (4, 2, 16, "int8", (0.0, 0, None, None)),
        (2, 1, 9, "fp8", (1.5, 3, None, None)),
        (3, 3, 24, "int4", (0.0, 0, torch.rand(3, generator=rng), None)),
    ]:
        query_lengths, lengths = [1, 5, 3], [7, 5, 18]
        blocks = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(blocks) + 2, generator=rng).tolist()
        table = torch.zeros(3, max(blocks), dtype=torch.int32)
        slots = []
        for row, (count, n) in enumerate(zip(query_lengths, lengths, strict=True)):
            mine, order = order[: blocks[row]], order[blocks[row] :]
            table[row, : blocks[row]] = torch.tensor(mine, dtype=torch.int32)
            slots += [mine[p // block_size] * block_size + p % block_size for p in range(n - count, n)]
        tokens, pool = sum(query_lengths), sum(blocks) + 2
        softcap, window, slopes, sinks = options
        caches = [make(pool, groups, block_size, size) for _ in range(2)]
        if kv_dtype != "auto":
            every = torch.arange(pool * block_size)
            shape = (pool, groups, block_size, row_bytes(kv_dtype, size))
            for index, rows in enumerate(caches):
                caches[index] = torch.zeros(shape, dtype=torch.uint8)
                flat = rows.transpose(1, 2).flatten(0, 1)
                store_rows(caches[index], every // block_size, every % block_size, flat, kv_dtype)
        yield (
            make(1, tokens, heads, size),
            make(1, tokens, groups, size),
            make(1, tokens, groups, size),
            *caches,
            torch.tensor(slots),
            table,
            torch.tensor([0, 1, 6, 9], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            size**-0.5,
            softcap,
            window,
            slopes,
            sinks,
            *(() if kv_dtype == "auto" else (kv_dtype,)),
        )


def _paged_fake(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
    slots, tables, starts, lengths, _, _, _, slopes, sinks, *kv_dtype = rest
    tokens, heads, width = q.shape[-3:]
    groups, value_width = k.shape[-2], v.shape[-1]
    check_sizes("paged_attention", "q", q, (1, tokens, heads, width))
    check_sizes("paged_attention", "k", k, (1, tokens, groups, width))
    check_sizes("paged_attention", "v", v, (1, tokens, groups, value_width))
    _check_heads("paged_attention", heads, groups, slopes, sinks)
    blocks, _, block_size, _ = k_cache.shape
    if not kv_dtype or kv_dtype[0] == "auto":
        check_sizes("paged_attention", "k_cache", k_cache, (blocks, groups, block_size, width))
        check_sizes("paged_attention", "v_cache", v_cache, (blocks, groups, block_size, value_width))
    check_sizes("paged_attention", "slot_mapping", slots, (tokens,))
    check_sizes("paged_attention", "cu_seqlens_q", starts, (lengths.shape[0] + 1,))
    check_sizes("paged_attention", "block_tables", tables, (lengths.shape[0], tables.shape[-1]))
    return q.new_empty((*q.shape[:-1], value_width))


@register_op(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor block_tables, Tensor cu_seqlens_q, Tensor seq_lens, float scale, float softcap, int window,"
    " Tensor? alibi_slopes, Tensor? sinks, str kv_dtype='auto') -> Tensor",
    fake=_paged_fake,
    cost=_paged_cost,
    samples=_paged_samples,
    tolerances=_SOFTMAX,
)
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    softcap: float,
    window: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_dtype: str = "auto",
) -> Tensor:
    """Writes this step's keys and values into the cache, then attends causally over each request's pages.

    A step is a ragged batch: the tokens of all B requests lie flat, request b has rows `cu_seqlens_q[b]` to
    `cu_seqlens_q[b + 1]` of q `[1, T, H, D]`, k `[1, T, G, D]`, v `[1, T, G, E]`. `seq_lens[b]` counts its tokens, with
    these, so its queries stand at the last positions. Caches are `[blocks, G, block_size, D or E]` (paged as in
    vLLM, Kwon et al. 2023); token t goes to slot `slot_mapping[t]` = block * block_size + offset, -1 is not stored;
    `block_tables[b]` lists the blocks of request b. Scores as in `attend`, plus `alibi_slopes[h] * key position`
    (Press et al., 2022). With a `kv_dtype` other than "auto", caches are uint8 pages of that format (`kv_formats`), and
    also this step's tokens are seen as they are stored. Gives `[1, T, H, E]`.
    """
    block_size = k_cache.shape[2]
    stored = slot_mapping >= 0
    block, offset = slot_mapping[stored] // block_size, slot_mapping[stored] % block_size
    for cache, rows in ((k_cache, k), (v_cache, v)):
        store_rows(cache, block, offset, rows[0, stored], kv_dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        mine = slice(starts[row], starts[row + 1])
        blocks = block_tables[row, : -(-length // block_size)].long()
        keys, values = (
            load_pages(cache, blocks, kv_dtype, new.shape[-1])[None, :length]
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        i = torch.arange(length - (starts[row + 1] - starts[row]), length)[:, None]
        j = torch.arange(length)[None, :]
        visible = (j <= i) & (j > i - window) if window else j <= i
        bias = None if alibi_slopes is None else alibi_slopes.view(1, -1, 1, 1) * j
        out[:, mine] = attend(q[:, mine], keys, values, visible, bias, scale, softcap, sinks)
    return out
