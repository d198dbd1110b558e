// Attention of a few rows (decode: one query for each head of a group) over a long context, straight from the stored
// keys and values: every key and value is read from memory once and nothing is packed.
//
// The context is cut into chunks of kChunkKeys keys at multiples of kChunkKeys. Each chunk is attended on its own and
// the results are merged in order (Flash-Decoding; Dao et al., 2023), always, whoever computes them: the result does
// not depend on how chunks are spread over workers.
#pragma once

#include <algorithm>

#include "attention_group.h"
#include "shuffle.h"

namespace llmopt {

constexpr int kDirectRows = 8;  // more rows than this are cheaper with packed panels
constexpr int kChunkKeys = 512;
constexpr int kDirectKeys = 32;  // keys between two rescalings; they and the next ones fit the L1 cache
// Keys between two bursts of prefetches: few lines can be in flight at a time.
constexpr int kAheadKeys = kLanes > 8 ? kLanes : 8;
constexpr int kRowBlock = kLanes < 4 ? kLanes : 4;
static_assert(kChunkKeys % kDirectKeys == 0 && kDirectKeys % kAheadKeys == 0 && kAheadKeys % kLanes == 0,
              "whole blocks of whole vectors");
static_assert(kMaxHeadDim % (2 * kLanes) == 0, "rows in scratch may be padded to a step");

// Maxima, sums and accumulated values of the rows of a group over some of its keys. values[row] is padded to a whole
// number of vectors.
struct RowState {
  float maximum[kDirectRows], sum[kDirectRows];
  alignas(64) float values[kDirectRows * kMaxHeadDim];

  void clear(int rows, std::int64_t stride) {
    std::fill(maximum, maximum + rows, kMinusInfinity);
    std::fill(sum, sum + rows, 0.0f);
    std::fill(values, values + rows * stride, 0.0f);
  }
  // Adds what another part of the keys gave.
  void merge(const float* its_maximum, const float* its_sum, const float* its_values, int rows, std::int64_t stride) {
    for (int r = 0; r < rows; ++r) {
      const float top = its_maximum[r] > maximum[r] ? its_maximum[r] : maximum[r];
      const float mine = exp_nonpositive(maximum[r] - reference_point(top));
      const float its = exp_nonpositive(its_maximum[r] - reference_point(top));
      maximum[r] = top;
      sum[r] = sum[r] * mine + its_sum[r] * its;
      float* to = values + r * stride;
      for (std::int64_t d = 0; d < stride; d += kLanes)
        store(to + d, load(to + d) * mine + load(its_values + r * stride + d) * its);
    }
  }
};

struct RowScratch {
  RowState total, chunk;
  alignas(64) float q[kDirectRows * kMaxHeadDim];
  alignas(64) float scores[kRowBlock * kDirectKeys];
  float query_sum[kDirectRows];  // of each row's query, for keys with a least value
  const void* rows[4][kDirectKeys];  // keys and values of two blocks, taking turns
  RowParameters<kDirectKeys + kLanes> parameters[2];
};

// Rows that will be read next. Pages are short and scattered, so the processor's own prefetcher starts anew with each.
struct Ahead {
  const void* const* rows;
  int count;
  std::int64_t bytes;

  LLMOPT_INLINE void touch(int key, int keys) const {
    const int end = key + keys < count ? key + keys : count;
    for (int i = key; i < end; ++i) {
      const char* row = static_cast<const char*>(rows[i]);
      __builtin_prefetch(row);
      if (bytes > 64) __builtin_prefetch(row + 64);
      for (std::int64_t at = 128; at < bytes; at += 64) __builtin_prefetch(row + at);
    }
  }
};

// v, loaded once: left alone, GCC repeats a load in each instruction that can take an operand from memory.
LLMOPT_INLINE vf in_register(vf v) {
#if (LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LLMOPT_VECTOR_BYTES == 32 && defined(__AVX2__))
  asm("" : "+v"(v));
#endif
  return v;
}

// What a query is multiplied with at a time: a vector of elements, or with the bf16 dot instruction one of pairs.
// Queries are kept in scratch as these are, floats or pairs of bf16, in rows of round_up(dim, kStep) floats.
template <class T>
constexpr int kStep = kPairDot<T> ? 2 * kLanes : kLanes;

// One step of a key, of a query, and their product.
template <class T>
LLMOPT_INLINE auto load_step(const T* row, int d) {
  if constexpr (kPairDot<T>) {
    return load_bits(row + d);
  } else {
    return load_codes(row, d, FullVector{});
  }
}
template <class T>
LLMOPT_INLINE auto load_step_partial(const T* row, int d, int count) {
  if constexpr (kPairDot<T>) {
    return load_bits_partial(row + d, count);
  } else {
    return load_codes(row, d, PartVector{count});
  }
}
template <class T>
LLMOPT_INLINE auto load_query(const float* q) {
  if constexpr (kPairDot<T>) {
    return load_bits(q);
  } else {
    return in_register(load(q));
  }
}
LLMOPT_INLINE vf multiply_add(vf x, vf y, vf acc) { return fma(x, y, acc); }
LLMOPT_INLINE vf multiply_add(vu x, vu y, vf acc) { return dot_pairs(acc, x, y); }

// Scores of RB rows and a whole number of groups of kLanes / RB keys. A vector of scores holds RB rows of as many
// consecutive keys as fit: lane = key * RB + row, so that a block of scores is [keys][RB]. (Not inlined: where
// everything is, GCC runs out of registers in the inner loop.)
template <int RB, class T>
__attribute__((noinline)) void score_rows(const T* const* k_rows, int count, const float* q, int dim, float* scores) {
  constexpr int Keys = kLanes / RB;
  const std::int64_t stride = round_up(dim, kStep<T>);
  for (int key = 0; key < count; key += Keys) {
    vf acc[kLanes] = {};
    const auto add = [&](int d, auto load_key) {
      decltype(load_key(k_rows[0], d)) x[Keys];
#pragma GCC unroll 16
      for (int k = 0; k < Keys; ++k) x[k] = load_key(k_rows[key + k], d);
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r) {
        const auto y = load_query<T>(q + r * stride + d);
#pragma GCC unroll 16
        for (int k = 0; k < Keys; ++k) acc[k * RB + r] = multiply_add(x[k], y, acc[k * RB + r]);
      }
    };
    int d = 0;
    for (; d + kStep<T> <= dim; d += kStep<T>) add(d, [](const T* row, int at) { return load_step(row, at); });
    if (d < dim) add(d, [&](const T* row, int at) { return load_step_partial(row, at, dim - at); });
    store(scores + key * RB, sum_rows(acc));
  }
}

// Lane key * RB + row of the result is values[key].
template <int RB>
struct SpreadKeys {
  static constexpr int lane(int i) { return i / RB; }
};
template <int RB>
LLMOPT_INLINE vf spread_keys(const float* values) {
  const vf v = load(values);
  return RB == 1 ? v : shuffle<SpreadKeys<RB>>(v, v);
}

// values[r][d...] = values * decay[r] + shift[r] + weights * v for RB rows and V vectors of columns.
template <int RB, int V, class Access, class T>
__attribute__((noinline)) void add_values(const T* const* v_rows, int count, const float* weights, std::int64_t d,
                                          Access access, const float* decay, const float* shift, float* values,
                                          std::int64_t stride) {
  vf acc[RB][V];
  for (int r = 0; r < RB; ++r)
    for (int v = 0; v < V; ++v) {
      acc[r][v] = load(values + r * stride + d + v * kLanes) * decay[r];
      if constexpr (kRotated<T>) acc[r][v] += splat(shift[r]);
    }
  for (int key = 0; key < count; ++key, weights += RB) {
    vf x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) x[v] = load_codes(v_rows[key], d + v * kLanes, access);
#pragma GCC unroll 16
    for (int r = 0; r < RB; ++r) {
      const vf weight = splat(weights[r]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < RB; ++r)
    for (int v = 0; v < V; ++v) store(values + r * stride + d + v * kLanes, acc[r][v]);
}

// RB rows from `row` on, of which the first `valid` exist, against `count` keys from `block` on. The arrays of rows are
// valid up to the next multiple of kLanes.
template <int RB, class Group, class Parameters>
void attend_row_block(const Group& g, RowScratch& s, int row, int valid, std::int64_t block, int count,
                      const typename Group::Stored* const* k_rows, const typename Group::Stored* const* v_rows,
                      const Parameters& parameters, const Ahead& k_ahead, const Ahead& v_ahead) {
  using T = typename Group::Stored;
  constexpr int Keys = kLanes / RB;
  RowState& state = s.chunk;
  const int padded = static_cast<int>(round_up(count, Keys));
  for (int key = 0; key < padded; key += kAheadKeys) {
    k_ahead.touch(key, kAheadKeys);
    score_rows<RB>(k_rows + key, std::min(padded - key, kAheadKeys), s.q + row * round_up(g.dim, kStep<T>), g.dim,
                   s.scores + key * RB);
  }

  vi key, first, last;  // the keys of the lanes, relative to the block, and the range that the lane's row sees
  vf slope, distance, query_sum;
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t r = row + std::min(lane % RB, valid - 1), query = r / g.heads;
    const auto clamp = [&](std::int64_t k) { return static_cast<std::int32_t>(k < 0 ? 0 : k > count ? count : k); };
    key[lane] = lane / RB;
    first[lane] = clamp(g.seen_begin(query) - block);
    last[lane] = clamp(g.seen_end(query) - block);
    distance[lane] = static_cast<float>(block - (g.position + query));
    slope[lane] = g.slopes ? g.slopes[r % g.heads] : 0.0f;
    query_sum[lane] = kRotated<T> ? s.query_sum[r] : 0.0f;
  }
  const bool plain = g.plain();
  const std::int64_t last_query = (row + valid - 1) / g.heads;
  const bool all_seen = g.seen_begin(last_query) <= block && g.seen_end(row / g.heads) - block >= padded;
  vf greatest = splat(kMinusInfinity);
  for (int i = 0; i < padded; i += Keys, key += Keys) {
    vf score = load(s.scores + i * RB);
    if constexpr (kQuantized<T>) score *= spread_keys<RB>(parameters.k_scale + i);
    if constexpr (kRotated<T>) score = fma(query_sum, spread_keys<RB>(parameters.k_least + i), score);
    score *= g.scale;
    if (!plain) {
      score = g.shape_score(score, slope, __builtin_convertvector(key, vf) + distance);
      if (Group::kMaskable && g.mask.base) {
        vf bias = zero();
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t r = row + lane % RB;
          if (lane % RB < valid && key[lane] < count)
            bias[lane] = g.mask.at(r % g.heads, r / g.heads, block + key[lane]);
        }
        score = add_bias(score, bias);
      }
    }
    if (!all_seen) {
      score = key >= first ? score : splat(kMinusInfinity);
      score = key < last ? score : splat(kMinusInfinity);
    }
    store(s.scores + i * RB, score);
    greatest = max(greatest, score);
  }

  vf zero_point;
  float decay[RB];
  for (int r = 0; r < RB; ++r) {
    float top = r < valid ? state.maximum[row + r] : kMinusInfinity;
    const float before = top;
    for (int k = 0; k < Keys; ++k) top = greatest[k * RB + r] > top ? greatest[k * RB + r] : top;
    const float point = reference_point(top);
    for (int k = 0; k < Keys; ++k) zero_point[k * RB + r] = point;
    decay[r] = exp_nonpositive(before - point);
    if (r < valid) state.maximum[row + r] = top;
  }
  vf total = zero(), least = zero();
  for (int i = 0; i < padded; i += Keys) {
    vf weight = exp_nonpositive(vf(load(s.scores + i * RB) - zero_point));
    total += weight;
    if constexpr (kRotated<T>) least = fma(weight, spread_keys<RB>(parameters.v_least + i), least);
    if constexpr (kQuantized<T>) weight *= spread_keys<RB>(parameters.v_scale + i);
    store(s.scores + i * RB, weight);
  }
  float shift[RB] = {};
  if constexpr (kRotated<T>)
    for (int lane = 0; lane < kLanes; ++lane) shift[lane % RB] += least[lane];
  for (int r = 0; r < valid; ++r) {
    float sum = 0.0f;
    for (int k = 0; k < Keys; ++k) sum += total[k * RB + r];
    state.sum[row + r] = state.sum[row + r] * decay[r] + sum;
  }

  // As many columns at once as there are accumulators; the rows that pad the block accumulate into rows of the state
  // that are never read.
  const std::int64_t stride = round_up(g.v_dim, kLanes);
  float* values = state.values + row * stride;
  int d = 0;
  const auto add = [&](auto width, auto access) {
    constexpr int V = decltype(width)::value;
    v_ahead.touch(d * kDirectKeys / g.v_dim, V * kLanes * kDirectKeys / g.v_dim + 1);
    add_values<RB, V>(v_rows, padded, s.scores, d, access, decay, shift, values, stride);
    d += V * kLanes;
  };
  while (d + Keys * kLanes <= g.v_dim) add(std::integral_constant<int, Keys>{}, FullVector{});
  while (d + kLanes <= g.v_dim) add(std::integral_constant<int, 1>{}, FullVector{});
  if (d < g.v_dim) add(std::integral_constant<int, 1>{}, PartVector{g.v_dim - d});
}

// The addresses of the keys and values [block, block + kDirectKeys) as far as `end`; returns how many there are.
template <class Group, class Parameters>
int find_rows(const Group& g, std::int64_t block, std::int64_t begin, std::int64_t end,
              const typename Group::Stored** k_rows, const typename Group::Stored** v_rows, Parameters& parameters) {
  const int count = static_cast<int>(std::clamp<std::int64_t>(end - block, 0, kDirectKeys));
  if (count > 0)
    find_block(g, block, begin, count, static_cast<int>(round_up(count, kLanes)), k_rows, v_rows, parameters);
  return count;
}

// One chunk of the keys of a group into s.chunk.
template <class Group>
void attend_chunk(const Group& g, RowScratch& s, std::int64_t chunk) {
  using T = typename Group::Stored;
  const auto rows_of = [&](int i) { return reinterpret_cast<const T**>(s.rows[i]); };
  const int rows = static_cast<int>(g.num_rows());
  s.chunk.clear(static_cast<int>(round_up(rows, kRowBlock)), round_up(g.v_dim, kLanes));
  const std::int64_t begin = std::max(g.seen_begin(0), chunk * kChunkKeys), last = g.seen_end(g.queries - 1);
  const std::int64_t end = std::min(last, (chunk + 1) * kChunkKeys);
  std::int64_t block = begin / kDirectKeys * kDirectKeys;
  int turn = 0, count = find_rows(g, block, begin, end, rows_of(0), rows_of(1), s.parameters[0]);
  for (; block < end; block += kDirectKeys) {
    const T** k_rows = rows_of(turn);
    const T** v_rows = rows_of(turn + 1);
    const auto& parameters = s.parameters[turn / 2];
    turn ^= 2;
    const int next =
        find_rows(g, block + kDirectKeys, begin, last, rows_of(turn), rows_of(turn + 1), s.parameters[turn / 2]);
    Ahead k_ahead{s.rows[turn], next, code_bytes<T>(g.dim)};
    Ahead v_ahead{s.rows[turn + 1], next, code_bytes<T>(g.v_dim)};
    for (int row = 0; row < rows; row += kRowBlock) {
      const int left = rows - row;
      if (left == 1) {
        attend_row_block<1>(g, s, row, 1, block, count, k_rows, v_rows, parameters, k_ahead, v_ahead);
      } else if (left == 2) {
        attend_row_block<2>(g, s, row, 2, block, count, k_rows, v_rows, parameters, k_ahead, v_ahead);
      } else {
        attend_row_block<kRowBlock>(g, s, row, std::min(left, kRowBlock), block, count, k_rows, v_rows, parameters,
                                    k_ahead, v_ahead);
      }
      k_ahead.count = v_ahead.count = 0;  // once is enough
    }
    count = next;
  }
}

// The rows of a group's queries, zero beyond them, in the order and type that score_rows multiplies.
template <class Group>
void load_queries(const Group& g, RowScratch& s) {
  using T = typename Group::Stored;
  const std::int64_t stride = round_up(g.dim, kStep<T>), rows = g.num_rows();
  std::memset(s.q, 0, sizeof(float) * static_cast<std::size_t>(round_up(rows, kRowBlock) * stride));
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto* from = g.q_row(r);
    float* to = s.q + r * stride;
    if constexpr (kPairDot<T>) {
      for (int d = 0; d < g.dim; d += kStep<T>) {
        const vu pairs = load_bits_partial(from + d, std::min(g.dim - d, kStep<T>));
        std::memcpy(to + d, &pairs, sizeof pairs);
      }
    } else {
      for_vectors(0, g.dim, [&](std::int64_t d, auto access) { access.store(to + d, access.load(from + d)); });
      rotate_query<T>(to, g.dim);
      if constexpr (kRotated<T>) s.query_sum[r] = sum_vectors(stride, [&](std::int64_t d, auto access, vf& sum) {
        sum += access.load(to + d);
      });
    }
  }
}

// Stores the rows of a group.
template <class Group>
void finish_rows(const Group& g, const RowState& state) {
  const std::int64_t stride = round_up(g.v_dim, kLanes);
  for (int r = 0; r < g.num_rows(); ++r) g.finish(r, state.maximum[r], state.sum[r], state.values + r * stride);
}

// The chunks that a group's queries see.
template <class Group>
Range seen_chunks(const Group& g) {
  const std::int64_t begin = g.seen_begin(0) / kChunkKeys;
  const std::int64_t end = (g.seen_end(g.queries - 1) + kChunkKeys - 1) / kChunkKeys;
  return {begin, end > begin ? end : begin};
}

}  // namespace llmopt
