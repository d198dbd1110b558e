// Attention of many rows over blocks of keys: both products are matrix products with their operands packed as float
// panels, and the softmax is rescaled online (FlashAttention; Dao et al., arXiv:2205.14135).
//
// A tile of rows goes through the blocks of keys that it can see. A block's keys are transposed once into panels
// [dim][kPanelWidth] and its values copied to panels [keys][kPanelWidth]; then each strip of kStripRows rows computes
// its scores, their exponentials and its part of the result while its scores are in the L1 cache. Strips skip the
// panels that none of their rows can see.
#pragma once

#include <algorithm>

#include "attention_group.h"
#include "shuffle.h"

namespace llmopt {

constexpr int kStripRows = 6;  // 6 x 2 accumulators leave registers for the operands even where there are 16
constexpr int kPanelVectors = 2;
constexpr int kPanelWidth = kPanelVectors * kLanes;
constexpr int kKeyBlock = 128;
constexpr int kTileRows = 32 * kStripRows;
static_assert(kKeyBlock % kPanelWidth == 0, "a block of keys is whole panels");

struct TileScratch {
  alignas(64) float q[kTileRows * kMaxHeadDim];
  alignas(64) float values[kTileRows * kMaxHeadDim];
  alignas(64) float k_panels[kKeyBlock * kMaxHeadDim];
  alignas(64) float v_panels[kKeyBlock * kMaxHeadDim];
  alignas(64) float scores[kStripRows * kKeyBlock];
  float maximum[kTileRows], sum[kTileRows], decay[kStripRows];
  const void* k_rows[kKeyBlock];
  const void* v_rows[kKeyBlock];
  RowParameters<kKeyBlock> parameters;
};
static_assert(sizeof(TileScratch) <= kScratchBytes, "the tile's panels fit the scratch");

// acc += a * panel over `depth`, a[k * StepK + r * StepR].
template <int StepK, int StepR>
LLMOPT_INLINE void multiply_panel(const float* a, const float* panel, std::int64_t depth,
                                  vf (&acc)[kStripRows][kPanelVectors]) {
  for (std::int64_t k = 0; k < depth; ++k, a += StepK, panel += kPanelWidth) {
    vf b[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kStripRows; ++r) {
      const vf x = splat(a[r * StepR]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
    }
  }
}

// Elements [d, d + kLanes) of a row, with its parameters if it has any.
template <class T, class Access>
LLMOPT_INLINE vf load_row(const T* const* rows, const float* scale, const float* least, int key, std::int64_t d,
                          Access access) {
  const vf codes = load_codes(rows[key], d, access);
  if constexpr (kRotated<T>) return fma(codes, splat(scale[key]), splat(least[key]));
  if constexpr (kQuantized<T>) return codes * scale[key];
  return codes;
}

// panels[key / kPanelWidth][d][key % kPanelWidth] = rows[key][d]; keys that are missing in the last panel are zero.
template <class T>
void pack_keys(const T* const* rows, const float* scale, const float* least, int count, int dim, float* panels) {
  for (int key = 0; key < count; key += kLanes) {
    float* panel = panels + key / kPanelWidth * kPanelWidth * dim + key % kPanelWidth;
    for_vectors(0, dim, [&](std::int64_t d, auto access) {
      vf square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = key + i < count ? load_row(rows, scale, least, key + i, d, access) : zero();
      transpose(square);
      for (int i = 0; i < access.count; ++i) store(panel + (d + i) * kPanelWidth, square[i]);
    });
  }
  for (int key = static_cast<int>(round_up(count, kLanes)); key % kPanelWidth != 0; key += kLanes)
    for (int d = 0; d < dim; ++d)
      store(panels + key / kPanelWidth * kPanelWidth * dim + d * kPanelWidth + key % kPanelWidth, zero());
}

// panels[d / kPanelWidth][key][d % kPanelWidth] = rows[key][d]; the columns that are missing in the last panel are
// zero.
template <class T>
void pack_values(const T* const* rows, const float* scale, const float* least, int count, int dim, float* panels) {
  for (int key = 0; key < count; ++key) {
    const auto at = [&](std::int64_t d) {
      return panels + (d / kPanelWidth * kKeyBlock + key) * kPanelWidth + d % kPanelWidth;
    };
    for_vectors(0, dim, [&](std::int64_t d, auto access) { 
      store(at(d), load_row(rows, scale, least, key, d, access));
    });
    if (round_up(dim, kLanes) % kPanelWidth != 0) store(at(round_up(dim, kLanes)), zero());
  }
}

// Turns the scores [begin, end) of one row (relative to the block's first key) into weights; returns the factor by
// which everything accumulated before must shrink.
template <class Group>
LLMOPT_INLINE float weigh_row(const Group& g, std::int64_t row, std::int64_t block, int begin, int end, float* scores,
                              float& maximum, float& sum) {
  const std::int64_t query = row / g.heads, head = row % g.heads;
  const auto clamp = [&](std::int64_t key) {
    return static_cast<std::int32_t>(key < begin ? begin : key > end ? end : key);
  };
  const std::int32_t first = clamp(g.seen_begin(query) - block), last = clamp(g.seen_end(query) - block);
  const bool plain = g.plain();
  const vf slope = splat(g.slopes ? g.slopes[head] : 0.0f);
  const float distance = static_cast<float>(block - (g.position + query));
  vf greatest = splat(kMinusInfinity);
  for (int key = begin; key < end; key += kLanes) {
    vf score = load(scores + key) * g.scale;
    const vi lanes = lane_numbers() + key;
    if (!plain) {
      score = g.shape_score(score, slope, __builtin_convertvector(lanes, vf) + distance);
      if (Group::kMaskable && g.mask.base) {
        vf bias = zero();
        for (int i = 0; i < kLanes; ++i)
          if (key + i < last) bias[i] = g.mask.at(head, query, block + key + i);
        score = add_bias(score, bias);
      }
    }
    if (key < first || key + kLanes > last) {
      score = lanes >= first ? score : splat(kMinusInfinity);
      score = lanes < last ? score : splat(kMinusInfinity);
    }
    store(scores + key, score);
    greatest = max(greatest, score);
  }
  const float block_maximum = reduce_max(greatest);
  const float top = block_maximum > maximum ? block_maximum : maximum;
  const float zero_point = reference_point(top);
  vf total = zero();
  for (int key = begin; key < end; key += kLanes) {
    const vf weight = exp_nonpositive(vf(load(scores + key) - zero_point));
    store(scores + key, weight);
    total += weight;
  }
  const float decay = exp_nonpositive(maximum - zero_point);
  sum = sum * decay + reduce_add(total);
  maximum = top;
  return decay;
}

// One strip of rows against one packed block of `count` keys.
template <class Group>
void attend_strip(const Group& g, TileScratch& s, std::int64_t tile, int strip, int rows, std::int64_t block,
                  int count) {
  const std::int64_t row = tile + strip, begin_key = g.seen_begin(row / g.heads) - block;
  const std::int64_t end_key = g.seen_end((row + rows - 1) / g.heads) - block;
  const int end = static_cast<int>(end_key < count ? end_key : count);
  const int begin = begin_key > 0 ? static_cast<int>(begin_key / kPanelWidth * kPanelWidth) : 0;
  if (end <= begin) return;
  const int padded_end = static_cast<int>(round_up(end, kPanelWidth));
  for (int key = begin; key < padded_end; key += kPanelWidth) {
    vf acc[kStripRows][kPanelVectors] = {};
    multiply_panel<kStripRows, 1>(s.q + strip * g.dim, s.k_panels + key * g.dim, g.dim, acc);
    for (int r = 0; r < kStripRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v) store(s.scores + r * kKeyBlock + key + v * kLanes, acc[r][v]);
  }
  for (int r = 0; r < kStripRows; ++r) {
    s.decay[r] = r < rows ? weigh_row(g, row + r, block, begin, padded_end, s.scores + r * kKeyBlock,
                                      s.maximum[strip + r], s.sum[strip + r])
                          : 1.0f;
  }
  const std::int64_t stride = round_up(g.v_dim, kPanelWidth);
  for (int d = 0; d < g.v_dim; d += kPanelWidth) {
    float* values = s.values + strip * stride + d;
    vf acc[kStripRows][kPanelVectors];
    for (int r = 0; r < kStripRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = load(values + r * stride + v * kLanes) * s.decay[r];
    multiply_panel<1, kKeyBlock>(s.scores + begin, s.v_panels + d * kKeyBlock + begin * kPanelWidth, end - begin, acc);
    for (int r = 0; r < kStripRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v) store(values + r * stride + v * kLanes, acc[r][v]);
  }
}

// The rows [tile, tile + count) of a group, count <= kTileRows. Rows are independent of each other to the bit: every
// row is computed by the same sequence of operations over blocks of keys that begin at multiples of kKeyBlock.
template <class Group>
void attend_tile(const Group& g, std::int64_t tile, int count, char* scratch) {
  using T = typename Group::Element;
  using S = typename Group::Stored;
  auto& s = *reinterpret_cast<TileScratch*>(scratch);
  const auto** k_rows = reinterpret_cast<const S**>(s.k_rows);
  const auto** v_rows = reinterpret_cast<const S**>(s.v_rows);
  const int padded = static_cast<int>(round_up(count, kStripRows));
  const std::int64_t stride = round_up(g.v_dim, kPanelWidth);
  for (int r = 0; r < padded; ++r) {
    float* to = s.q + r / kStripRows * kStripRows * g.dim + r % kStripRows;
    const T* from = r < count ? g.q_row(tile + r) : nullptr;
    alignas(64) float query[kMaxHeadDim];
    for (int d = 0; d < g.dim; ++d) query[d] = from ? to_float(from[d]) : 0.0f;
    rotate_query<S>(query, g.dim);
    for (int d = 0; d < g.dim; ++d) to[d * kStripRows] = query[d];
    s.maximum[r] = kMinusInfinity;
    s.sum[r] = 0.0f;
  }
  std::memset(s.values, 0, sizeof(float) * static_cast<std::size_t>(padded * stride));

  const std::int64_t begin = g.seen_begin(tile / g.heads), end = g.seen_end((tile + count - 1) / g.heads);
  for (std::int64_t block = begin / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock) {
    const int keys = static_cast<int>(end - block < kKeyBlock ? end - block : kKeyBlock);
    find_block(g, block, begin, keys, keys, k_rows, v_rows, s.parameters);
    pack_keys(k_rows, s.parameters.k_scale, s.parameters.k_least, keys, g.dim, s.k_panels);
    pack_values(v_rows, s.parameters.v_scale, s.parameters.v_least, keys, g.v_dim, s.v_panels);
    for (int strip = 0; strip < count; strip += kStripRows)
      attend_strip(g, s, tile, strip, count - strip < kStripRows ? count - strip : kStripRows, block, keys);
  }
  for (int r = 0; r < count; ++r) g.finish(tile + r, s.maximum[r], s.sum[r], s.values + r * stride);
}

}  // namespace llmopt
