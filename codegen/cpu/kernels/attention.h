// Scaled dot-product attention with grouped heads, over a paged cache for a ragged batch, or over contiguous keys.
//
// attention<T, S = T>: PagedAttention (Kwon et al., arXiv:2309.06180), causal
//   tensors: q [T, Hq, D] T (strided), k_cache [num_blocks, Hkv, block_size, D] T, v_cache [num_blocks, Hkv,
//            block_size, Dv] T, block_tables [B, N] int32, cu_seqlens_q [B + 1] int32, seq_lens [B] int32, out [T,
//            Hq, Dv] T (strided), alibi_slopes [Hq] float or null, sinks [Hq] float or null. With S a format of
//            kv_formats.h, the caches are pages of block_size * row_bytes<S> bytes a head
//   ints:    B, Hq, Hkv, D, Dv, block_size, N, q token stride, q head stride, out token stride, out head stride,
//            window (0 = none), T, num_blocks
//   floats:  scale, softcap (0 = none)
//   Query i of sequence b, row cu_seqlens_q[b] + i, stands at position p = seq_lens[b] - q_len + i and sees the keys
//   j <= p, with a window only j > p - window. score = scale * q.k, then softcap * tanh(score / softcap), then
//   + alibi_slopes[h] * j (Press et al., arXiv:2108.12409). sinks[h] is one more logit of the softmax, without a value.
//   A sequence that its block table or the T rows cannot hold, or that begins before the end of the one before, and a
//   page outside the cache are kIndexOutOfRange, and nothing is written. Pages wholly outside the window are never read,
//   so their entries may be anything. Rows of no sequence are set to zero.
//
// attention_contiguous<T, TM>
//   tensors: q [B, S, Hq, D] T, k [B, L, Hkv, D] T, v [B, L, Hkv, Dv] T, mask [B, Hq, S, L] TM or null, out [B, S, Hq,
//            Dv] T; all strided, the last dimension contiguous but the mask's; alibi_slopes, sinks as above
//   ints:    B, S, L, Hq, Hkv, D, Dv, then strides: q batch, token, head, k batch, token, head, v batch, token, head,
//            out batch, token, head, mask batch, head, query, key (0 = broadcast); causal (0 or 1), q_offset, window
//   floats:  scale, softcap
//   Query i stands at position i + q_offset: causal, it sees the keys j <= i + q_offset; with a window (causal or not)
//   only j > i + q_offset - window. TM = bool: true may attend; any other type is added to the score.
//
// Scores, softmax and accumulation in float, one rounding at the end. A row that sees no key gives zeros, as PyTorch's
// scaled_dot_product_attention does, for boolean masks and for masks of -inf. A row's result depends on nothing but
// its own sequence: not on the batch around it, nor on the number of workers, to the bit. D, Dv up to kMaxHeadDim, or
// kUnsupportedSize.
#pragma once

#include "attention_schedule.h"

namespace llmopt {

// Whether the sequences of a paged batch lie within the rows, their tables and, as far as they are read, the cache.
inline bool batch_fits(const Args& a) {
  const std::int32_t* starts = a.tensor<const std::int32_t>(4);
  const std::int32_t* lengths = a.tensor<const std::int32_t>(5);
  const std::int64_t sequences = a.ints[0], block_size = a.ints[5], table_size = a.ints[6], window = a.ints[11];
  const std::uint32_t blocks = static_cast<std::uint32_t>(std::min<std::int64_t>(a.ints[13], INT32_MAX));
  if (starts[0] < 0 || starts[sequences] > a.ints[12]) return false;
  for (std::int64_t b = 0; b < sequences; ++b) {
    const std::int64_t queries = std::int64_t{starts[b + 1]} - starts[b], keys = lengths[b];
    if (queries < 0 || keys < 0 || keys > table_size * block_size) return false;
    if (queries == 0) continue;
    const std::int64_t seen = window > 0 ? std::max<std::int64_t>(keys - queries - window + 1, 0) : 0;
    const std::int32_t* table = a.tensor<const std::int32_t>(3) + b * table_size;
    bool beyond = false;
    for (std::int64_t page = seen / block_size; page * block_size < keys; ++page)
      beyond |= static_cast<std::uint32_t>(table[page]) >= blocks;
    if (beyond) return false;
  }
  return true;
}

template <class T, class S = T>
void attention(const Args& a, const Worker& w) {
  const T* q = a.tensor<const T>(0);
  const S* k_cache = a.tensor<const S>(1);
  const S* v_cache = a.tensor<const S>(2);
  const std::int32_t* tables = a.tensor<const std::int32_t>(3);
  const std::int32_t* starts = a.tensor<const std::int32_t>(4);
  const std::int32_t* lengths = a.tensor<const std::int32_t>(5);
  T* out = a.tensor<T>(6);
  const float* slopes = a.tensor<const float>(7);
  const float* sinks = a.tensor<const float>(8);
  const std::int64_t q_heads = a.ints[1], kv_heads = a.ints[2], dim = a.ints[3], v_dim = a.ints[4];
  const std::int64_t block_size = a.ints[5], table_size = a.ints[6], tokens = a.ints[12];
  if (dim > kMaxHeadDim || v_dim > kMaxHeadDim) return w.fail(kUnsupportedSize);
  if (!batch_fits(a)) return w.fail(kIndexOutOfRange);
  for (const Range rows : {Range{0, starts[0]}, Range{starts[a.ints[0]], tokens}}) {
    const Range mine = share(w, rows.end - rows.begin);
    for (std::int64_t r = rows.begin + mine.begin; r < rows.begin + mine.end; ++r)
      for (std::int64_t h = 0; h < q_heads; ++h) std::fill_n(out + r * a.ints[9] + h * a.ints[10], v_dim, T{});
  }
  const std::int64_t heads = q_heads / kv_heads;
  const auto make = [&](std::int64_t b, std::int64_t h) {
    AttentionGroup<T, typename std::conditional<kQuantized<S>, QuantizedRows<S>, PagedRows<S>>::type, NoMask> g{};
    const std::int64_t first = starts[b];
    g.keys = lengths[b];
    g.queries = starts[b + 1] - first;
    g.position = g.keys - g.queries;
    g.q_token = a.ints[7];
    g.q_head = a.ints[8];
    g.out_token = a.ints[9];
    g.out_head = a.ints[10];
    g.q = q + first * g.q_token + h * heads * g.q_head;
    g.out = out + first * g.out_token + h * heads * g.out_head;
    g.window = a.ints[11];
    g.heads = static_cast<int>(heads);
    g.dim = static_cast<int>(dim);
    g.v_dim = static_cast<int>(v_dim);
    g.causal = true;
    g.scale = static_cast<float>(a.floats[0]);
    g.softcap = static_cast<float>(a.floats[1]);
    g.slopes = slopes ? slopes + h * heads : nullptr;
    g.sinks = sinks ? sinks + h * heads : nullptr;
    const std::int32_t* table = tables + b * table_size;
    if constexpr (kQuantized<S>) {
      const std::int64_t k_page = block_size * row_bytes<S>(dim), v_page = block_size * row_bytes<S>(v_dim);
      const auto page = [h](const S* cache, std::int64_t bytes) { return reinterpret_cast<const char*>(cache) + h * bytes; };
      g.rows = {page(k_cache, k_page), page(v_cache, v_page), table,             block_size, kv_heads * k_page,
                kv_heads * v_page,     code_bytes<S>(dim),    code_bytes<S>(v_dim)};
    } else {
      const std::int64_t k_head = block_size * dim, v_head = block_size * v_dim;
      g.rows = {k_cache + h * k_head, v_cache + h * v_head, table, block_size, kv_heads * k_head,
                kv_heads * v_head,    dim,                  v_dim};
    }
    return g;
  };
  attend_batch(a.ints[0], kv_heads, make, w);
}

template <class T, class TM>
void attention_contiguous(const Args& a, const Worker& w) {
  const T* q = a.tensor<const T>(0);
  const T* k = a.tensor<const T>(1);
  const T* v = a.tensor<const T>(2);
  const TM* mask = a.tensor<const TM>(3);
  T* out = a.tensor<T>(4);
  const float* slopes = a.tensor<const float>(5);
  const float* sinks = a.tensor<const float>(6);
  const std::int64_t q_heads = a.ints[3], kv_heads = a.ints[4], dim = a.ints[5], v_dim = a.ints[6];
  const std::int64_t* q_stride = a.ints + 7;  // batch, token, head
  const std::int64_t* k_stride = a.ints + 10;
  const std::int64_t* v_stride = a.ints + 13;
  const std::int64_t* out_stride = a.ints + 16;
  const std::int64_t* mask_stride = a.ints + 19;  // batch, head, query, key
  if (dim > kMaxHeadDim || v_dim > kMaxHeadDim) return w.fail(kUnsupportedSize);
  const std::int64_t heads = q_heads / kv_heads;
  const auto make = [&](std::int64_t b, std::int64_t h) {
    AttentionGroup<T, StridedRows<T>, Mask<TM>> g{};
    g.queries = a.ints[1];
    g.keys = a.ints[2];
    g.position = a.ints[24];
    g.q_token = q_stride[1];
    g.q_head = q_stride[2];
    g.out_token = out_stride[1];
    g.out_head = out_stride[2];
    g.q = q + b * q_stride[0] + h * heads * q_stride[2];
    g.out = out + b * out_stride[0] + h * heads * out_stride[2];
    g.window = a.ints[25];
    g.heads = static_cast<int>(heads);
    g.dim = static_cast<int>(dim);
    g.v_dim = static_cast<int>(v_dim);
    g.causal = a.ints[23] != 0;
    g.scale = static_cast<float>(a.floats[0]);
    g.softcap = static_cast<float>(a.floats[1]);
    g.slopes = slopes ? slopes + h * heads : nullptr;
    g.sinks = sinks ? sinks + h * heads : nullptr;
    g.rows = {k + b * k_stride[0] + h * k_stride[2], v + b * v_stride[0] + h * v_stride[2], k_stride[1], v_stride[1]};
    g.mask.head = mask_stride[1];
    g.mask.query = mask_stride[2];
    g.mask.key = mask_stride[3];
    g.mask.base = mask ? mask + b * mask_stride[0] + h * heads * mask_stride[1] : nullptr;
    return g;
  };
  attend_batch(a.ints[0], kv_heads, make, w);
}

}  // namespace llmopt
