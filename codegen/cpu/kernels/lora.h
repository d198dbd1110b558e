// lora<T>: low-rank adapters (Hu et al., arXiv:2106.09685) added to a product, another one for each row as in batched
// serving (Punica: Chen et al., arXiv:2310.18547).
//
// tensors: x [M, K] of T, y [M, N] of T or null, out [M, N] of T, adapter_index [M] int32, pool [S, E] of T,
//          ranks [P, S] int32, scales [P, S] float, workspace (bytes); all but x, y and out contiguous
// ints:    M, K, row strides of x, y and out (elements), N, S, E, R, number of parts (at most kMaxParts), then for
//          each part: row of ranks and scales, first column, columns n, offset in a slot
//
// Where y is null its values are in out already. A row with index s >= 0 gets scale * (x A^T) B^T added to the columns
// of each part: A [R, K] lies in slot s of the pool from the part's offset on, B transposed [R, n] behind it, and the
// first `rank` rows of both count. A negative index leaves the row as it is, to the bit. A slot outside of the pool
// fails with kIndexOutOfRange. Sums are kept in float and rounded once, after the addition.
//
// The workspace takes 128 + 4 * (M + M * parts * R) bytes, any alignment.
//
// Rows are ordered by slot, so that each adapter is read once. All workers share the rows of A, meet, and share the
// columns. The additions of a row have one order, however many rows there are, but for the choice between gemv and gemm
// (invariance.h).
#pragma once

#include "linear.h"

namespace llmopt {

constexpr int kMaxSlots = 256;
constexpr int kMaxParts = 8;
constexpr std::int64_t kFewRows = 64;     // which every worker orders for itself, so that nobody waits
constexpr std::int64_t kLoraChunk = 32;   // rows whose output stays in the second-level cache
constexpr int kLoraVectors = 4;           // of columns at a time
constexpr int kLoraRows = kManyRegisters ? 4 : 2;

struct LoraPart {
  std::int64_t target, column, columns, offset;
};

// out[rows[i]] += scale * hidden[i] @ b for X rows and the columns of kLoraVectors vectors, of which `width` exist.
template <class T, int X, bool kWhole>
LLMOPT_INLINE void expand(const float* hidden, std::int64_t hidden_stride, const T* b, std::int64_t b_stride,
                          std::int64_t rank, float scale, T* out, std::int64_t out_stride, const std::int32_t* rows,
                          std::int64_t width) {
  vf sums[X][kLoraVectors] = {};
  const auto lanes = [&](int v) {
    const std::int64_t left = width - v * kLanes;
    return static_cast<int>(left < 0 ? 0 : left > kLanes ? kLanes : left);
  };
  for (std::int64_t j = 0; j < rank; ++j) {
    vf values[kLoraVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kLoraVectors; ++v) {
      if constexpr (kWhole) {
        values[v] = load(b + j * b_stride + v * kLanes);
      } else {
        values[v] = lanes(v) ? load_partial(b + j * b_stride + v * kLanes, lanes(v)) : zero();
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < X; ++m) {
      const vf factor = splat(hidden[m * hidden_stride + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kLoraVectors; ++v) sums[m][v] = fma(factor, values[v], sums[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < X; ++m) {
    T* row = out + rows[m] * out_stride;
#pragma GCC unroll 4
    for (int v = 0; v < kLoraVectors; ++v) {
      T* at = row + v * kLanes;
      if constexpr (kWhole) {
        store(at, fma(sums[m][v], splat(scale), load(at)));
      } else if (lanes(v)) {
        store_partial(at, fma(sums[m][v], splat(scale), load_partial(at, lanes(v))), lanes(v));
      }
    }
  }
}

template <class T>
void lora(const Args& a, const Worker& w) {
  const std::int64_t rows = a.ints[0], k = a.ints[1];
  const std::int64_t x_stride = a.ints[2], y_stride = a.ints[3], out_stride = a.ints[4];
  const std::int64_t columns = a.ints[5], slots = a.ints[6], slot_size = a.ints[7], most = a.ints[8];
  const int parts = static_cast<int>(a.ints[9]);
  const auto part = [&](int i) {
    const std::int64_t* p = a.ints + 10 + 4 * i;
    return LoraPart{p[0], p[1], p[2], p[3]};
  };
  const T *y = a.tensor<const T>(1), *pool = a.tensor<const T>(4);
  T* out = a.tensor<T>(2);
  const std::int32_t *index = a.tensor<const std::int32_t>(3), *ranks = a.tensor<const std::int32_t>(5);
  const float* scales = a.tensor<const float>(6);
  if (slots > kMaxSlots || parts > kMaxParts) return w.fail(kUnsupportedSize);

  // starts[s] is where the rows of slot s begin among those that have an adapter.
  std::int64_t starts[kMaxSlots + 1] = {};
  for (std::int64_t m = 0; m < rows; ++m) {
    if (index[m] >= slots) return w.fail(kIndexOutOfRange);
    if (index[m] >= 0) ++starts[index[m] + 1];
  }
  for (std::int64_t s = 0; s < slots; ++s) starts[s + 1] += starts[s];

  if (y) {  // other workers may add to these columns, but only after all have met
    const Range mine = share(w, columns, kLoraVectors * kLanes);
    for (std::int64_t m = 0; m < rows && mine.begin < mine.end; ++m)
      std::memcpy(static_cast<void*>(out + m * out_stride + mine.begin), y + m * y_stride + mine.begin,
                  static_cast<std::size_t>(mine.end - mine.begin) * sizeof(T));
  }
  if (starts[slots] == 0) return;

  char* space = a.tensor<char>(7);
  float* hidden = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(space) + 63) & ~std::uintptr_t{63});
  const std::int64_t hidden_stride = parts * most;
  std::int32_t own[kFewRows];
  std::int32_t* order = rows <= kFewRows ? own : reinterpret_cast<std::int32_t*>(hidden + rows * hidden_stride);
  if (order == own || w.index == 0) {
    std::int64_t next[kMaxSlots];
    std::memcpy(next, starts, static_cast<std::size_t>(slots) * sizeof *next);
    for (std::int64_t m = 0; m < rows; ++m)
      if (index[m] >= 0) order[next[index[m]]++] = static_cast<std::int32_t>(m);
  }
  if (order != own) w.sync();

  for (std::int64_t s = 0; s < slots; ++s) {
    const std::int64_t count = starts[s + 1] - starts[s];
    if (count == 0) continue;
    void* operands[2 * kMaxParts];
    std::int64_t sizes[kMaxParts], used = 0;
    for (int i = 0; i < parts; ++i) {
      const std::int64_t rank = ranks[part(i).target * slots + s];
      if (rank < 0 || rank > most) return w.fail(kIndexOutOfRange);
      if (rank == 0) continue;
      operands[2 * used] = const_cast<T*>(pool + s * slot_size + part(i).offset);
      operands[2 * used + 1] = nullptr;
      sizes[used++] = rank;
    }
    if (used == 0) continue;
    const Rows<T> mine{a.tensor<const T>(0), x_stride, order + starts[s]};
    matmul<T, float>(mine, count, k, Segments{operands, sizes, used}, hidden + starts[s] * hidden_stride, hidden_stride,
                     w);
  }
  w.sync();

  for (std::int64_t s = 0; s < slots; ++s) {
    for (std::int64_t first = starts[s]; first < starts[s + 1]; first += kLoraChunk) {
      const std::int64_t last = first + kLoraChunk < starts[s + 1] ? first + kLoraChunk : starts[s + 1];
      std::int64_t behind = 0;  // the parts' hidden values lie one behind the other
      for (int i = 0; i < parts; ++i) {
        const LoraPart p = part(i);
        const std::int64_t rank = ranks[p.target * slots + s];
        const float scale = scales[p.target * slots + s];
        const T* b = pool + s * slot_size + p.offset + most * k;
        const float* from = hidden + behind;
        behind += rank;
        if (rank == 0) continue;
        const Range mine = share(w, p.columns, kLoraVectors * kLanes);
        for (std::int64_t c = mine.begin; c < mine.end; c += kLoraVectors * kLanes) {
          const std::int64_t width = mine.end - c;
          const auto add = [&](std::int64_t m, auto count) {
            constexpr int kCount = decltype(count)::value;
            const float* values = from + m * hidden_stride;
            T* target = out + p.column + c;
            if (width >= kLoraVectors * kLanes) {
              expand<T, kCount, true>(values, hidden_stride, b + c, p.columns, rank, scale, target, out_stride,
                                      order + m, width);
            } else {
              expand<T, kCount, false>(values, hidden_stride, b + c, p.columns, rank, scale, target, out_stride,
                                       order + m, width);
            }
          };
          std::int64_t m = first;
          for (; m + kLoraRows <= last; m += kLoraRows) add(m, std::integral_constant<int, kLoraRows>{});
          for (; m < last; ++m) add(m, std::integral_constant<int, 1>{});
        }
      }
    }
  }
}

}  // namespace llmopt
