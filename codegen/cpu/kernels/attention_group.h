// What the two attention algorithms share: a group of query heads over the keys of one kv head, the rules of its
// scores, and where keys and values lie.
#pragma once

#include <algorithm>

#include "kv_formats.h"

namespace llmopt {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// e^x for x <= 0, one step of scaling instead of two: below the normal numbers it is exactly zero.
template <class V>
LLMOPT_INLINE V exp_nonpositive(V x) {
  using U = typename lanes_of<V>::u;
  const V big = V{} + 12582912.0f;
  const V y = x < -88.0f ? V{} - 88.0f : x;  // rounds to 2^-127, whose exponent field is zero; NaN stays NaN
  const V shifted = y * 1.44269504088896341f + big;
  const V n = shifted - big;
  V r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<V>((bit_cast<U>(shifted) - 0x4b400000u + 127u) << 23);
}

// The point from which scores are measured: the maximum, or zero where nothing has been seen.
LLMOPT_INLINE float reference_point(float maximum) { return maximum == kMinusInfinity ? 0.0f : maximum; }

// Keys and values in the pages of one sequence, for one kv head.
template <class T>
struct PagedRows {
  using Stored = T;
  const T* k;  // of this head in block 0
  const T* v;
  const std::int32_t* table;
  std::int64_t block_size, k_block, v_block, k_dim, v_dim;

  // Addresses of the rows of keys [first, first + count).
  void get(std::int64_t first, int count, const T** k_rows, const T** v_rows) const {
    std::int64_t page = first / block_size, offset = first % block_size;
    for (int i = 0; i < count; ++page, offset = 0) {
      const T* k_row = k + table[page] * k_block + offset * k_dim;
      const T* v_row = v + table[page] * v_block + offset * v_dim;
      const int end = static_cast<int>(std::min<std::int64_t>(count, i + block_size - offset));
      for (; i < end; ++i, k_row += k_dim, v_row += v_dim) {
        k_rows[i] = k_row;
        v_rows[i] = v_row;
      }
    }
  }
};

// The same of a quantized cache (kv_formats.h); distances in bytes.
template <class S>
struct QuantizedRows {
  using Stored = S;
  const char* k;
  const char* v;
  const std::int32_t* table;
  std::int64_t block_size, k_block, v_block, k_row, v_row;

  // Addresses of the codes of keys [first, first + count), and their parameters.
  template <int N>
  void get(std::int64_t first, int count, const S** k_rows, const S** v_rows, RowParameters<N>& parameters, int at) const {
    std::int64_t page = first / block_size, offset = first % block_size;
    for (int i = 0; i < count; ++page, offset = 0) {
      const char* k_page = k + table[page] * k_block;
      const char* v_page = v + table[page] * v_block;
      const int end = static_cast<int>(std::min<std::int64_t>(count, i + block_size - offset));
      for (; i < end; ++i, ++offset) {
        k_rows[i] = reinterpret_cast<const S*>(k_page + offset * k_row);
        v_rows[i] = reinterpret_cast<const S*>(v_page + offset * v_row);
        load_parameters<S>(k_page, block_size * k_row, offset, parameters.k_scale[at + i], parameters.k_least[at + i]);
        load_parameters<S>(v_page, block_size * v_row, offset, parameters.v_scale[at + i], parameters.v_least[at + i]);
      }
    }
  }
};

// Keys and values at a constant distance.
template <class T>
struct StridedRows {
  using Stored = T;
  const T* k;
  const T* v;
  std::int64_t k_stride, v_stride;

  void get(std::int64_t first, int count, const T** k_rows, const T** v_rows) const {
    for (int i = 0; i < count; ++i) {
      k_rows[i] = k + (first + i) * k_stride;
      v_rows[i] = v + (first + i) * v_stride;
    }
  }
};

// An additive or boolean (true = may attend) mask of the group's first head and first query.
template <class TM>
struct Mask {
  static constexpr bool kPossible = true;
  const TM* base;  // null: no mask
  std::int64_t head, query, key;

  LLMOPT_INLINE static float bias(bool may) { return may ? 0.0f : kMinusInfinity; }
  template <class V>
  LLMOPT_INLINE static float bias(V value) {
    return to_float(value);
  }
  LLMOPT_INLINE float at(std::int64_t h, std::int64_t q, std::int64_t k) const {
    return bias(base[h * head + q * query + k * key]);
  }
};
struct NoMask {
  static constexpr bool kPossible = false;
  static constexpr const void* base = nullptr;
  LLMOPT_INLINE float at(std::int64_t, std::int64_t, std::int64_t) const { return 0.0f; }
};

// The query heads that share one kv head of one sequence. Their rows are numbered query by query:
// row = query * heads + head.
template <class T, class Rows, class MaskT>
struct AttentionGroup {
  using Element = T;
  using Stored = typename Rows::Stored;
  static constexpr bool kMaskable = MaskT::kPossible;

  const T* q;  // the first query of the first head
  T* out;
  std::int64_t q_token, q_head, out_token, out_head;
  std::int64_t queries, keys;
  std::int64_t position;  // of the first query, on the axis of the keys
  std::int64_t window;    // keys seen at most, 0 = all
  int heads, dim, v_dim;
  bool causal;
  float scale, softcap;
  const float* slopes;  // [heads] or null
  const float* sinks;   // [heads] or null
  Rows rows;
  MaskT mask;

  std::int64_t num_rows() const { return queries * heads; }
  // The keys [begin, end) that a query may see; end <= begin if none.
  std::int64_t seen_begin(std::int64_t query) const {
    const std::int64_t begin = window > 0 ? position + query - window + 1 : 0;
    return begin > 0 ? begin : 0;
  }
  std::int64_t seen_end(std::int64_t query) const {
    const std::int64_t end = position + query + 1;
    return causal && end < keys ? end : keys;
  }
  const T* q_row(std::int64_t row) const { return q + row / heads * q_token + row % heads * q_head; }

  bool plain() const { return softcap == 0.0f && slopes == nullptr && mask.base == nullptr; }

  // Everything that happens to a scaled score, but for the visible range. `distance` is the key's position relative to
  // the query's: the bias of a row may be shifted freely, and shifted to zero at the query it keeps its digits.
  LLMOPT_INLINE vf shape_score(vf score, vf slope, vf distance) const {
    if (softcap != 0.0f) score = softcap * tanh(vf(score / softcap));
    if (slopes) score = score + slope * distance;
    return score;
  }

  // Divides the accumulated values of a row by the sum of its weights and stores them.
  void finish(std::int64_t row, float maximum, float sum, const float* values) const {
    const std::int64_t head = row % heads;
    float factor = 1.0f;
    if (sinks) {  // one more logit in the denominator, shifted as the scores were
      const float shift = slopes ? slopes[head] * static_cast<float>(position + row / heads) : 0.0f;
      const float sink = sinks[head] - shift, top = sink > maximum ? sink : maximum;
      factor = exp_nonpositive(maximum - reference_point(top));
      sum = sum * factor + exp_nonpositive(sink - reference_point(top));
    }
    float inverse = sum == 0.0f ? 0.0f : factor / sum;  // a row that sees nothing gives zeros
    T* to = out + row / heads * out_token + head * out_head;
    alignas(64) float turned[kRotated<Stored> ? kMaxHeadDim : 1];
    if constexpr (kRotated<Stored>) {  // values are stored rotated
      std::copy(values, values + v_dim, turned);
      hadamard(turned, v_dim);
      inverse /= static_cast<float>(rotation_block(v_dim));
      values = turned;
    }
    for_vectors(0, v_dim, [&](std::int64_t i, auto access) { access.store(to + i, load(values + i) * inverse); });
  }
};

// Rotates a query as the keys are that it will meet, `query` its `dim` elements as floats.
template <class S>
inline void rotate_query(float* query, int dim) {
  if constexpr (kRotated<S>) {
    hadamard(query, dim);
    const float inverse = 1.0f / static_cast<float>(rotation_block(dim));
    for (int d = 0; d < dim; ++d) query[d] *= inverse;
  }
}

// The addresses (and parameters) of the rows of keys [block, block + count). Keys before `begin` may lie in pages that
// were given back: the first visible row stands for them, and the last one for those from `count` to `padded`.
template <int N, class Group>
void find_block(const Group& g, std::int64_t block, std::int64_t begin, int count, int padded,
                const typename Group::Stored** k_rows, const typename Group::Stored** v_rows,
                RowParameters<N>& parameters) {
  const int unseen = begin > block ? static_cast<int>(begin - block) : 0;
  const auto fill = [&](auto* rows) {
    std::fill(rows, rows + unseen, rows[unseen]);
    std::fill(rows + count, rows + padded, rows[count - 1]);
  };
  if constexpr (kQuantized<typename Group::Stored>) {
    g.rows.get(block + unseen, count - unseen, k_rows + unseen, v_rows + unseen, parameters, unseen);
    fill(parameters.k_scale);
    fill(parameters.k_least);
    fill(parameters.v_scale);
    fill(parameters.v_least);
  } else {
    g.rows.get(block + unseen, count - unseen, k_rows + unseen, v_rows + unseen);
  }
  fill(k_rows);
  fill(v_rows);
}

// A mask's part of a score: excluded whatever the score was, or added.
LLMOPT_INLINE vf add_bias(vf score, vf bias) { return bias == kMinusInfinity ? splat(kMinusInfinity) : score + bias; }

LLMOPT_INLINE vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

}  // namespace llmopt
