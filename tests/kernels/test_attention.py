"""Paged and contiguous attention against float64, and what must hold to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError
from llmopt.codegen.cpu.templates import KV_FORMATS
from llmopt.compiler.kv_formats import row_bytes

Tensor = torch.Tensor
DTYPES = list(CPP_TYPE)
EMULATED = "avx512_bf16_emulated"
# float32: products of up to a few hundred terms summed in another order. The others: one rounding of the result, whose
# size is that of a mean of values, so that the absolute part matters where it nearly cancels.
TOLERANCE = {torch.float32: (2e-5, 1e-5), torch.bfloat16: (8e-3, 1e-4), torch.float16: (1e-3, 2e-5)}


@dataclass(frozen=True)
class Rule:
    """What shapes the scores, beside causality."""

    window: int = 0
    softcap: float = 0.0
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 0.3


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    causal: bool = True,
    offset: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`q[S, H, D]` over `k[L, G, D]`, `v[L, G, E]` in float64; `mask[H, S, L]`."""
    queries, keys, repeat = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    offset = keys - queries if offset is None else offset
    k, v = (t.double().repeat_interleave(repeat, 1) for t in (k, v))
    scores = torch.einsum("shd,lhd->hsl", q.double(), k) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    i, j = torch.arange(queries)[:, None] + offset, torch.arange(keys)[None, :]
    if rule.alibi is not None:
        scores = scores + rule.alibi.double()[:, None, None] * j
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(j > i, -torch.inf)
    if rule.window:
        scores = scores.masked_fill(j <= i - rule.window, -torch.inf)
    if rule.sinks is not None:
        sink = rule.sinks.double()[:, None, None].expand(-1, queries, 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :keys]
    return torch.einsum("hsl,lhd->shd", weights, v)


@dataclass(frozen=True)
class Batch:
    """A ragged batch over a paged cache, and the contiguous keys and values of each sequence."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    kv_dtype: str = "auto"

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of some of the sequences, over the same cache."""
        counts = self.starts.diff()[list(rows)]
        starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
        q = torch.cat([self.q[self.starts[r] : self.starts[r + 1]] for r in rows])
        pick = list(rows)
        k, v = [self.k[r] for r in rows], [self.v[r] for r in rows]
        return replace(
            self, q=q, k=k, v=v, tables=self.tables[pick].contiguous(), starts=starts, lengths=self.lengths[pick]
        )


def make_batch(
    sequences: Sequence[tuple[int, int]],
    heads: int,
    groups: int,
    dim: int,
    v_dim: int,
    dtype: torch.dtype,
    block_size: int = 16,
) -> Batch:
    """`sequences`: (queries, keys) of each. What the cache holds outside the sequences is NaN."""
    blocks = [-(-keys // block_size) for _, keys in sequences]
    pool = sum(blocks) + 3
    order = torch.randperm(pool).tolist()
    k_cache = torch.full((pool, groups, block_size, dim), torch.nan, dtype=dtype)
    v_cache = torch.full((pool, groups, block_size, v_dim), torch.nan, dtype=dtype)
    tables = torch.full((len(sequences), max(blocks) + 1), 1 << 30, dtype=torch.int32)
    ks, vs = [], []
    for row, (_, keys) in enumerate(sequences):
        mine, order = order[: blocks[row]], order[blocks[row] :]
        tables[row, : blocks[row]] = torch.tensor(mine)
        k, v = torch.randn(keys, groups, dim).to(dtype), torch.randn(keys, groups, v_dim).to(dtype)
        for j in range(keys):
            k_cache[mine[j // block_size], :, j % block_size] = k[j]
            v_cache[mine[j // block_size], :, j % block_size] = v[j]
        ks.append(k)
        vs.append(v)
    counts = torch.tensor([queries for queries, _ in sequences])
    return Batch(
        torch.randn(int(counts.sum()), heads, dim).to(dtype),
        ks,
        vs,
        k_cache,
        v_cache,
        tables,
        torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        torch.tensor([keys for _, keys in sequences], dtype=torch.int32),
    )


def run_paged(
    batch: Batch,
    rule: Rule,
    threads: int = 2,
    variant: str = "host",
    defines: dict[str, int] | None = None,
    fill: float = 0.0,
) -> Tensor:
    """The kernel's result, computed into (what held `fill`) and from strided rows."""
    tokens, heads, dim = batch.q.shape
    groups, block_size = batch.k_cache.shape[1:3]
    v_dim = batch.v[0].shape[-1]
    stored = "" if batch.kv_dtype == "auto" else f", {KV_FORMATS[batch.kv_dtype]}"
    q = torch.full((tokens, heads + 1, dim + 3), torch.nan, dtype=batch.q.dtype)[:, :heads, :dim]
    q.copy_(batch.q)
    wide = torch.zeros(tokens, heads + 1, v_dim + 1, dtype=batch.q.dtype)
    out = wide[:, :heads, :v_dim].fill_(fill)
    ints = [len(batch.lengths), heads, groups, dim, v_dim, block_size, batch.tables.shape[1], *q.stride()[:2]]
    run_kernel(
        "attention.h",
        f"attention<{CPP_TYPE[batch.q.dtype]}{stored}>",
        [q, batch.k_cache, batch.v_cache, batch.tables, batch.starts, batch.lengths, out, rule.alibi, rule.sinks],
        [*ints, *out.stride()[:2], rule.window, tokens, len(batch.k_cache)],
        [rule.scale, rule.softcap],
        threads=threads,
        variant=variant,
        defines=defines,
    )
    assert not wide[:, heads:].any(), "wrote into other heads"
    assert not wide[..., v_dim:].any(), "wrote past the row"
    return out.contiguous()


def paged_reference(batch: Batch, rule: Rule) -> Tensor:
    bounds = batch.starts.tolist()
    parts = [
        reference(batch.q[bounds[r] : bounds[r + 1]], k, v, rule)
        for r, (k, v) in enumerate(zip(batch.k, batch.v, strict=True))
    ]
    return torch.cat(parts)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def check(batch: Batch, rule: Rule, threads: int = 2, variant: str = "host") -> None:
    assert_near(run_paged(batch, rule, threads, variant), paged_reference(batch, rule))


MIXED = [(1, 1), (1, 67), (5, 5), (90, 90), (3, 40), (0, 9), (17, 300), (1, 700), (1, 16), (2, 1030)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batch(dtype: torch.dtype, variant: str) -> None:
    for (heads, groups), (dim, v_dim), threads in itertools.product(
        ((3, 3), (4, 2), (8, 1)), ((64, 64), (17, 9)), (1, 2)
    ):
        check(make_batch(MIXED, heads, groups, dim, v_dim, dtype), Rule(), threads, variant)


@pytest.mark.parametrize("heads,groups", [(1, 1), (2, 1), (6, 2), (12, 3), (5, 1), (6, 1), (7, 1), (16, 2), (33, 1)])
def test_group_sizes(heads: int, groups: int) -> None:
    check(make_batch([(1, 130), (2, 75), (33, 33), (4, 6)], heads, groups, 32, 32, torch.float32), Rule())


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 31, 33, 80, 96, 128, 192, 255, 256, 576])
@pytest.mark.parametrize("variant", ["host", EMULATED])
def test_head_sizes(dim: int, variant: str) -> None:
    rule = Rule(scale=dim**-0.5)
    for v_dim in {dim, max(1, dim // 2), 24}:
        check(make_batch([(1, 77), (20, 77)], 4, 2, dim, v_dim, torch.float32), rule, variant=variant)


def test_every_prefill_length() -> None:
    for queries in [*range(1, 91), 300]:
        check(make_batch([(queries, queries)], 2, 1, 8, 8, torch.float32), Rule())
        check(make_batch([(queries, queries + 45)], 3, 3, 8, 8, torch.float32), Rule(window=37))


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 256])
def test_block_sizes(block_size: int) -> None:
    check(make_batch([(1, 150), (40, 150), (7, 7)], 4, 2, 16, 16, torch.bfloat16, block_size), Rule())


FEATURES = {
    "window 1": Rule(window=1),
    "window 5": Rule(window=5),
    "window 70": Rule(window=70),
    "softcap": Rule(softcap=1.5),
    "alibi": Rule(alibi=torch.tensor([0.5, -0.1, 0.03, 0.25])),
    "sinks": Rule(sinks=torch.tensor([1.0, -2.0, 6.0, 0.0])),
    "all": Rule(70, 2.0, torch.tensor([0.5, -0.1, 0.03, 0.25]), torch.tensor([1.0, -2.0, 6.0, 0.0])),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: torch.dtype, variant: str) -> None:
    batch = make_batch([(1, 200), (3, 190), (100, 100), (60, 333), (1, 1)], 4, 2, 24, 24, dtype)
    rule = FEATURES[feature]
    plain = paged_reference(batch, Rule())
    assert (plain - paged_reference(batch, rule)).abs().max() > 0.1, "the feature does not change this input"
    for threads in (1, 2):
        check(batch, rule, threads, variant)


def test_pages_outside_the_window_are_not_read() -> None:
    """A cache manager gives such pages back; their entries in the table may hold anything."""
    batch = make_batch([(1, 700), (40, 640)], 2, 1, 16, 16, torch.float32)
    rule = Rule(window=50)
    expected = run_paged(batch, rule)
    assert_near(expected, paged_reference(batch, rule))
    batch.tables[0, : (700 - 50) // 16] = -(1 << 30)
    batch.tables[1, : (600 - 50) // 16] = -(1 << 30)
    assert torch.equal(run_paged(batch, rule), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [Rule(), Rule(window=100, softcap=3.0)], ids=["plain", "window"])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, rule: Rule) -> None:
    """Alone, among others, in another order, on one thread or two (or seven): the same bits."""
    batch = make_batch(MIXED, 4, 2, 40, 40, dtype)
    whole = run_paged(batch, rule)
    bounds = batch.starts.tolist()
    for threads in (1, 3, 7):
        assert torch.equal(run_paged(batch, rule, threads), whole)
    for row in range(len(MIXED)):
        if MIXED[row][0]:
            alone = run_paged(batch.select([row]), rule, threads=1 + row % 2)
            assert torch.equal(alone, whole[bounds[row] : bounds[row + 1]])
    order = [8, 3, 9, 1]
    mixed = run_paged(batch.select(order), rule)
    assert torch.equal(mixed, torch.cat([whole[bounds[r] : bounds[r + 1]] for r in order]))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_one_long_context_is_shared_by_all_threads(threads: int) -> None:
    """One kv head: the chunks of its context go to different threads, and the result keeps its bits."""
    batch = make_batch([(1, 5000), (2, 1500)], 4, 1, 24, 20, torch.bfloat16)
    alone = run_paged(batch, Rule(), threads=1)
    assert_near(alone, paged_reference(batch, Rule()))
    assert torch.equal(run_paged(batch, Rule(), threads=threads), alone)


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch([(1, 100), (30, 100)], 2, 2, 16, 16, torch.float32)
    for scale in (60.0, -60.0):
        # A float32 score of 600 is off by 3e-5, and the weights with it.
        expected = paged_reference(batch, Rule(scale=scale))
        torch.testing.assert_close(run_paged(batch, Rule(scale=scale)).double(), expected, rtol=1e-3, atol=2e-4)


def test_sequence_beyond_its_block_table_is_refused() -> None:
    batch = make_batch([(1, 20), (2, 30)], 2, 1, 8, 8, torch.float32)
    batch.lengths[0] = 16 * batch.tables.shape[1] + 1
    with pytest.raises(KernelError, match="index out of range"):
        run_paged(batch, Rule())
    batch.lengths[0] = 20
    batch.starts[2] = 4
    with pytest.raises(KernelError, match="index out of range"):
        run_paged(batch, Rule())


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("block", [-1, None])
def test_pages_outside_the_cache_are_refused(block: int | None, kv_dtype: str) -> None:
    """As `kv_write` refuses a slot there; `None` stands for the first block behind the cache."""
    batch = make_batch([(1, 20), (2, 30)], 2, 1, 8, 8, torch.float32)
    if kv_dtype != "auto":
        pages = torch.zeros(len(batch.k_cache), 1, 16, row_bytes(kv_dtype, 8), dtype=torch.uint8)
        batch = replace(batch, k_cache=pages, v_cache=pages.clone(), kv_dtype=kv_dtype)
    run_paged(batch, Rule())
    batch.tables[1, 1] = len(batch.k_cache) if block is None else block
    with pytest.raises(KernelError, match="index out of range"):
        run_paged(batch, Rule())


def test_sequences_that_run_backwards_are_refused() -> None:
    batch = make_batch([(1, 20), (2, 30), (3, 30)], 2, 1, 8, 8, torch.float32)
    batch.starts[:] = torch.tensor([0, 4, 3, 6])
    with pytest.raises(KernelError, match="index out of range"):
        run_paged(batch, Rule())


def test_rows_of_no_sequence_are_zero() -> None:
    batch = make_batch([(1, 20), (6, 30), (2, 9)], 2, 1, 8, 8, torch.float32)
    whole = run_paged(batch, Rule())
    middle = replace(
        batch, tables=batch.tables[1:2].contiguous(), lengths=batch.lengths[1:2].contiguous(), starts=batch.starts[1:3]
    )
    for threads in (1, 2):
        out = run_paged(middle, Rule(), threads, fill=torch.nan)
        assert torch.equal(out[1:7], whole[1:7])
        assert not out[:1].any() and not out[7:].any()


def test_head_beyond_the_scratch_is_refused() -> None:
    with pytest.raises(KernelError, match="size"):
        run_paged(make_batch([(1, 3)], 1, 1, 577, 8, torch.float32), Rule())


def test_query_before_the_first_key_gives_zeros() -> None:
    batch = make_batch([(3, 3), (40, 40)], 2, 1, 8, 8, torch.float32)
    batch.lengths[:] = torch.tensor([1, 10])
    expected = paged_reference(replace(batch, k=[k[:n] for k, n in zip(batch.k, (1, 10), strict=True)],
                                       v=[v[:n] for v, n in zip(batch.v, (1, 10), strict=True)]), Rule())  # fmt: skip
    assert not expected[:2].any()
    assert_near(run_paged(batch, Rule()), expected)


# ---- contiguous keys ----------------------------------------------------------------------------------------------

MASK_TYPE = {**CPP_TYPE, torch.bool: "bool"}


def run_contiguous(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rule: Rule,
    causal: bool = False,
    offset: int = 0,
    threads: int = 2,
    variant: str = "host",
) -> Tensor:
    """`q[B, S, H, D]`, `k[B, L, G, D]`, `v[B, L, G, E]` of any strides, `mask` broadcastable to `[B, H, S, L]`."""
    batch, queries, heads, dim = q.shape
    keys, groups, v_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.zeros(batch, queries, heads, v_dim, dtype=q.dtype)
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    mask_strides = [0, 0, 0, 0] if mask is None else list(mask.expand(batch, heads, queries, keys).stride())
    run_kernel(
        "attention.h",
        f"attention_contiguous<{CPP_TYPE[q.dtype]}, {MASK_TYPE[mask.dtype if mask is not None else torch.bool]}>",
        [q, k, v, mask, out, rule.alibi, rule.sinks],
        [batch, queries, keys, heads, groups, dim, v_dim, *strides, *mask_strides, int(causal), offset, rule.window],
        [rule.scale, rule.softcap],
        threads=threads,
        variant=variant,
    )
    return out


def contiguous_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, causal: bool = False, offset: int = 0
) -> Tensor:
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return torch.stack(
        [
            reference(q[b], k[b], v[b], rule, causal=causal, offset=offset, mask=None if mask is None else mask[b])
            for b in range(q.shape[0])
        ]
    )


def make_contiguous(
    batch: int, queries: int, keys: int, heads: int, groups: int, dim: int, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries token by token, keys head by head (a transposed cache), values inside a wider tensor."""
    q = torch.randn(batch, queries, heads, dim).to(dtype)
    k = torch.randn(batch, groups, keys, dim).to(dtype).transpose(1, 2)
    v = torch.randn(batch, keys, groups, v_dim + 5).to(dtype)[..., 2 : v_dim + 2]
    return q, k, v


@pytest.mark.parametrize(
    "dtype,variant", [*((t, "host") for t in DTYPES), (torch.bfloat16, EMULATED), (torch.float16, "portable")]
)
def test_contiguous(dtype: torch.dtype, variant: str) -> None:
    for queries, keys, threads in [(1, 1, 1), (1, 90, 2), (7, 7, 1), (33, 50, 2), (200, 200, 2), (2, 530, 2)]:
        for rule, causal, offset in [
            (Rule(), False, 0),
            (Rule(), True, 0),
            (Rule(), True, keys - queries),
            (Rule(window=6, softcap=2.0), True, keys - queries),
            (Rule(window=20), False, keys - queries),
            (Rule(alibi=torch.rand(6), sinks=torch.randn(6)), True, keys - queries),
            (Rule(alibi=0.05 * torch.rand(6)), False, 0),
        ]:
            q, k, v = make_contiguous(2, queries, keys, 6, 3, 20, 12, dtype)
            actual = run_contiguous(q, k, v, None, rule, causal, offset, threads, variant)
            assert_near(actual, contiguous_reference(q, k, v, None, rule, causal, offset))


@pytest.mark.parametrize(
    "mask_type,variant", [*((t, "host") for t in MASK_TYPE), (torch.bool, EMULATED), (torch.bfloat16, "portable")]
)
def test_masks(mask_type: torch.dtype, variant: str) -> None:
    batch, heads = 2, 4
    for queries, keys in [(1, 45), (2, 600), (50, 50), (31, 140)]:
        q, k, v = make_contiguous(batch, queries, keys, heads, 2, 16, 16, torch.float32)
        shapes = [(batch, heads, queries, keys), (batch, 1, 1, keys), (1, heads, queries, keys), (1, 1, queries, 1)]
        for shape, causal in itertools.product(shapes, (False, True)):
            keep = torch.rand(shape) > 0.4
            bias = torch.randn(shape).masked_fill(~keep, -torch.inf)
            mask = keep if mask_type == torch.bool else bias.to(mask_type)
            expected = contiguous_reference(q, k, v, mask, Rule(), causal, keys - queries)
            actual = run_contiguous(q, k, v, mask, Rule(), causal, keys - queries, 2, variant)
            assert_near(actual, expected)
        transposed = torch.randn(batch, heads, keys, queries).transpose(2, 3) * 2
        assert_near(run_contiguous(q, k, v, transposed, Rule()), contiguous_reference(q, k, v, transposed, Rule()))


@pytest.mark.parametrize("queries", [2, 40])
def test_fully_masked_rows_are_pytorchs(queries: int) -> None:
    """Zeros under a boolean mask and under -inf; the mean of the values under the least finite number."""
    q, k, v = make_contiguous(1, queries, 30, 2, 2, 16, 16, torch.float32)
    keep = torch.ones(1, 1, queries, 30, dtype=torch.bool)
    keep[..., 1, :] = False
    infinite = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    least = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    for mask in (keep, infinite, least):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=0.3
        ).transpose(1, 2)
        actual = run_contiguous(q, k, v, mask, Rule())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert bool(actual[0, 1].any()) == (mask is least)


def test_causal_offset_of_pytorch() -> None:
    """`is_causal` counts from the top left, whatever the number of keys."""
    for queries, keys in [(5, 9), (60, 100)]:
        q, k, v = make_contiguous(1, queries, keys, 2, 2, 16, 16, torch.float32)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=0.3
        ).transpose(1, 2)
        torch.testing.assert_close(run_contiguous(q, k, v, None, Rule(), True, 0), expected, rtol=1e-5, atol=1e-5)


def test_contiguous_equals_paged() -> None:
    """One core: the same bits from pages and from contiguous keys."""
    batch = make_batch([(1, 600)], 4, 2, 40, 40, torch.bfloat16)
    paged = run_paged(batch, Rule())
    assert torch.equal(run_contiguous(batch.q[None], batch.k[0][None], batch.v[0][None], None, Rule())[0], paged)
    batch = make_batch([(70, 300)], 4, 2, 40, 40, torch.bfloat16)
    contiguous = run_contiguous(batch.q[None], batch.k[0][None], batch.v[0][None], None, Rule(), True, 230)
    assert torch.equal(contiguous[0], run_paged(batch, Rule()))
