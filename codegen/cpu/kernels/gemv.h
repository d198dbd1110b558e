// out = x @ W^T + b for few rows of x: every weight is read from memory once, in order, and meets all rows of x while it
// is in a register or the first-level cache.
//
// The products run along K with one vector accumulator per output, so a result does not depend on how many rows of x or
// of W are taken together, nor on the number of workers. The rows of W of all segments are split evenly over the
// workers. x is staged once per worker in scratch, in the form that the inner loop wants, padded with zeros.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace llmopt {

// Rows of x per pass over a block of weights, and rows of W per block. With 16 registers, 3 x 3 accumulators leave room
// for the operands where 4 x 3 spill.
constexpr bool kManyRegisters = LLMOPT_VECTOR_BYTES == 64;
constexpr int kGemvRows = kManyRegisters ? 4 : 3;
constexpr int kWideBlock = 4;
constexpr int kNarrowBlock = kManyRegisters ? 4 : 3;

// One step along K for storage type T: kElements elements of a weight row against a staged row of x.
template <class T>
struct GemvStep {
  static constexpr int kElements = kLanes;
  static constexpr int kFloats = kLanes;  // 32-bit words of a staged row per step
  struct Weights {
    vf v;
  };
  LLMOPT_INLINE static void stage(const T* x, float* staged, std::int64_t n) {
    store(staged, n < kLanes ? load_partial(x, static_cast<int>(n)) : load(x));
  }
  LLMOPT_INLINE static Weights weights(const T* p) { return {load(p)}; }
  LLMOPT_INLINE static Weights weights_partial(const T* p, std::int64_t n) {
    return {load_partial(p, static_cast<int>(n))};
  }
  template <int R, int X>
  LLMOPT_INLINE static void accumulate(const Weights (&w)[R], const float* x, std::int64_t x_stride, vf (&acc)[X][R]) {
#pragma GCC unroll 8
    for (int m = 0; m < X; ++m) {
      const vf v = load(x + m * x_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[m][r] = fma(w[r].v, v, acc[m][r]);
    }
  }
};

// bf16 in pairs. Without the dot instruction a pair is split by a shift and a mask, half the work of widening each
// element, and x is staged with the even elements of a step before the odd ones.
template <>
struct GemvStep<bf16> {
  static constexpr int kElements = 2 * kLanes;
  static constexpr int kFloats = kPairDot<bf16> ? kLanes : 2 * kLanes;
  struct Weights {
    vu v;
  };
  LLMOPT_INLINE static void stage(const bf16* x, float* staged, std::int64_t n) {
    const vu bits = n < kElements ? load_bits_partial(x, n) : load_bits(x);
    if constexpr (kPairDot<bf16>) {
      std::memcpy(staged, &bits, sizeof bits);
    } else {
      store(staged, bit_cast<vf>(bits << 16));
      store(staged + kLanes, bit_cast<vf>(bits & 0xffff0000u));
    }
  }
  LLMOPT_INLINE static Weights weights(const bf16* p) { return {load_bits(p)}; }
  LLMOPT_INLINE static Weights weights_partial(const bf16* p, std::int64_t n) { return {load_bits_partial(p, n)}; }
  template <int R, int X>
  LLMOPT_INLINE static void accumulate(const Weights (&w)[R], const float* x, std::int64_t x_stride, vf (&acc)[X][R]) {
    if constexpr (kPairDot<bf16>) {
#pragma GCC unroll 8
      for (int m = 0; m < X; ++m) {
        const vu v = load_bits(x + m * x_stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = dot_pairs(acc[m][r], w[r].v, v);
      }
    } else {
      vf half[R];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) half[r] = bit_cast<vf>(odd ? w[r].v & 0xffff0000u : w[r].v << 16);
#pragma GCC unroll 8
        for (int m = 0; m < X; ++m) {
          const vf v = load(x + m * x_stride + odd * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[m][r] = fma(half[r], v, acc[m][r]);
        }
      }
    }
  }
};

// Fetches the weights of the next block into the second-level cache while this one is worked on. The hardware's
// prefetcher alone starts anew with every page, and rests while a block is revisited by a second pass over x.
struct Ahead {
  const char* at;
  std::int64_t stride;  // bytes a step
  std::int64_t row;     // bytes between the rows of W

  // One pass: every row of the next block, in the order in which it will be read. float runs into the limit of memory
  // without help, and measurably loses by it.
  template <class T, int R>
  LLMOPT_INLINE void step_rows() {
    if constexpr (sizeof(T) == 4) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(at + r * row, 0, 2);
    at += kVectorBytes;
  }
  // Several passes: the bytes of the next block in order, an equal part in each pass (at most two lines a step).
  LLMOPT_INLINE void step_block() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    at += stride;
  }
};

// out[m][r] = w[r] . x[m] + bias[r] for R rows of W and X rows of x.
template <class T, class TOut, int R, int X, bool kOnePass>
__attribute__((noinline)) void gemv_tile(const T* w, const T* bias, std::int64_t k, const float* x, std::int64_t x_stride, TOut* out,
                      std::int64_t out_stride, Ahead& ahead) {
  using Step = GemvStep<T>;
  vf acc[X][R] = {};
  typename Step::Weights weights[R];
  std::int64_t i = 0;
  for (; i + Step::kElements <= k; i += Step::kElements, x += Step::kFloats) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = Step::weights(w + r * k + i);
    Step::template accumulate<R, X>(weights, x, x_stride, acc);
    if constexpr (kOnePass) {
      ahead.template step_rows<T, R>();
    } else {
      ahead.step_block();
    }
  }
  if (i < k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = Step::weights_partial(w + r * k + i, k - i);
    Step::template accumulate<R, X>(weights, x, x_stride, acc);
  }
#pragma GCC unroll 8
  for (int m = 0; m < X; ++m) {
    vf rows[4] = {};
    float sums[4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) rows[r] = acc[m][r];
    reduce_add4(rows, sums);
    for (int r = 0; r < R; ++r)
      out[m * out_stride + r] = from_float<TOut>(bias ? sums[r] + to_float(bias[r]) : sums[r]);
  }
}

// All rows of x against R rows of W, in passes as even as they can be.
template <class T, class TOut, int R>
inline void gemv_rows(const T* w, const T* bias, std::int64_t k, const float* x, std::int64_t x_stride,
                      std::int64_t rows, TOut* out, std::int64_t out_stride) {
  std::int64_t passes = (rows + kGemvRows - 1) / kGemvRows;
  const std::int64_t row_bytes = k * static_cast<std::int64_t>(sizeof(T));
  Ahead ahead{reinterpret_cast<const char*>(w) + R * row_bytes, R * kVectorBytes / passes, row_bytes};
  if (passes == 1) {
    switch (rows) {
      case 1: return gemv_tile<T, TOut, R, 1, true>(w, bias, k, x, x_stride, out, out_stride, ahead);
      case 2: return gemv_tile<T, TOut, R, 2, true>(w, bias, k, x, x_stride, out, out_stride, ahead);
      case 3: return gemv_tile<T, TOut, R, 3, true>(w, bias, k, x, x_stride, out, out_stride, ahead);
      default: return gemv_tile<T, TOut, R, kGemvRows, true>(w, bias, k, x, x_stride, out, out_stride, ahead);
    }
  }
  for (; rows > 0; --passes) {
    const std::int64_t count = (rows + passes - 1) / passes;  // at least two, for the passes are even
    switch (count) {
      case 2: gemv_tile<T, TOut, R, 2, false>(w, bias, k, x, x_stride, out, out_stride, ahead); break;
      case 3: gemv_tile<T, TOut, R, 3, false>(w, bias, k, x, x_stride, out, out_stride, ahead); break;
      default: gemv_tile<T, TOut, R, kGemvRows, false>(w, bias, k, x, x_stride, out, out_stride, ahead);
    }
    x += count * x_stride;
    out += count * out_stride;
    rows -= count;
  }
}

// Floats between two staged rows of length k: one vector more than they need, so that rows of a power of two do not all
// meet in the same sets of the first-level cache as the rows of W.
template <class T>
inline std::int64_t staged_stride(std::int64_t k) {
  return ((k + GemvStep<T>::kElements - 1) / GemvStep<T>::kElements) * GemvStep<T>::kFloats + kLanes;
}

// Bytes of scratch that `rows` staged rows of length k take.
template <class T>
inline std::size_t gemv_scratch(std::int64_t rows, std::int64_t k) {
  return static_cast<std::size_t>(rows * staged_stride<T>(k)) * sizeof(float);
}

// Columns of a block that is handed to an epilogue: whole blocks of rows of W, and little enough to stay in the first-level
// cache with a few rows of x.
constexpr std::int64_t kEpilogueColumns = 96;
static_assert(kEpilogueColumns % kWideBlock == 0 && kEpilogueColumns % kNarrowBlock == 0, "whole blocks");

// `columns` of x @ W^T + b, counted over all segments, for staged rows of x; `out` begins at the first of them.
template <class T, class TOut>
void gemv_columns(const float* staged, std::int64_t rows, std::int64_t k, const Segments& segments, Range columns,
                  TOut* out, std::int64_t out_stride) {
  const std::int64_t x_stride = staged_stride<T>(k);
  const int block = rows < kGemvRows ? kWideBlock : kNarrowBlock;
  std::int64_t first = 0;
  for (std::int64_t s = 0; s < segments.count; first += segments.sizes[s++]) {
    const T* weight = segments.weight<T>(s);
    const T* bias = segments.bias<T>(s);
    std::int64_t n = (columns.begin > first ? columns.begin : first) - first;
    const std::int64_t end = (columns.end < first + segments.sizes[s] ? columns.end - first : segments.sizes[s]);
    const std::int64_t at = first - columns.begin;  // in `out`, of the segment's first column
    for (; n + block <= end; n += block) {
      const T* shift = bias ? bias + n : nullptr;
      if (block == kWideBlock) {
        gemv_rows<T, TOut, kWideBlock>(weight + n * k, shift, k, staged, x_stride, rows, out + at + n, out_stride);
      } else {
        gemv_rows<T, TOut, kNarrowBlock>(weight + n * k, shift, k, staged, x_stride, rows, out + at + n, out_stride);
      }
    }
    for (; n < end; ++n)
      gemv_rows<T, TOut, 1>(weight + n * k, bias ? bias + n : nullptr, k, staged, x_stride, rows, out + at + n, out_stride);
  }
}

// x: `rows` rows of length k; out [rows, sum of the segments' sizes] with rows out_stride apart. With an epilogue, to which
// the rows are those from `first_row` on, out is not written. Needs gemv_scratch(rows, k), and with an epilogue
// kEpilogueColumns of T for each row, within kScratchBytes.
template <class T, class TOut>
void gemv(const Rows<T>& x, std::int64_t rows, std::int64_t k, const Segments& segments, TOut* out,
          std::int64_t out_stride, const Worker& w, const Epilogue* epilogue, std::int64_t first_row) {
  using Step = GemvStep<T>;
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) total += segments.sizes[s];
  const Range mine = share(w, total, kWideBlock);
  if (mine.begin == mine.end) return;

  float* staged = reinterpret_cast<float*>(w.scratch);
  const std::int64_t x_stride = staged_stride<T>(k);
  for (std::int64_t m = 0; m < rows; ++m) {
    const T* row = x[m];
    float* to = staged + m * x_stride;
    for (std::int64_t i = 0; i < k; i += Step::kElements, to += Step::kFloats) Step::stage(row + i, to, k - i);
  }
  if (!epilogue) return gemv_columns<T, TOut>(staged, rows, k, segments, mine, out + mine.begin, out_stride);
  T* block = reinterpret_cast<T*>(staged + rows * x_stride);
  for (std::int64_t n = mine.begin; n < mine.end; n += kEpilogueColumns) {
    const Range part{n, mine.end - n < kEpilogueColumns ? mine.end : n + kEpilogueColumns};
    gemv_columns<T, T>(staged, rows, k, segments, part, block, kEpilogueColumns);
    epilogue->apply(epilogue->state, {first_row, rows, part.begin, part.end - part.begin, block, kEpilogueColumns});
  }
}

}  // namespace llmopt
