// out = x @ W^T + b for many rows of x: a blocked product after Goto and van de Geijn (ACM TOMS 34(3), 2008) that packs
// both operands on the fly, because the weights are the user's own row-major tensors.
//
// Panels of kPanel columns of out (rows of W) are transposed into scratch, kDepth lanes of K at a time, and multiplied
// with all staged rows of x before they are dropped. Partial sums of a block of panels stay in float in scratch until K
// is used up; then they are rounded, with the bias, and stored or handed to the epilogue. One lane along K is one float, or one pair of bf16 where the machine
// multiplies pairs. The order of the additions is fixed by K alone, so a row's result depends on neither the other rows nor the workers.
// The workers form a grid over rows and panels; each packs what it needs, and nothing is shared.
#pragma once

#include "matrix.h"

namespace llmopt {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;
// Rows of a register tile: 6 x 2 accumulators in 16 registers, 12 x 2 in 32.
constexpr int kTileRows = LLMOPT_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kDepth = 256;        // a packed panel takes 16 KiB (AVX2), so it stays in the first-level cache
constexpr int kMaxGemmRows = 256;  // staged rows of x: 256 KiB, half of a second-level cache

// The 32-bit lanes that T is packed as.
template <class T>
struct GemmLane {
  using Type = typename std::conditional<kPairDot<T>, std::uint32_t, float>::type;
  static constexpr int kElements = kPairDot<T> ? 2 : 1;
};

LLMOPT_INLINE vf gemm_step(vf acc, float a, const float* b) { return fma(splat(a), load(b), acc); }
LLMOPT_INLINE vf gemm_step(vf acc, std::uint32_t a, const std::uint32_t* b) {
  return dot_pairs(acc, vu{} + a, load_bits(b));
}

// kLanes lanes of one row that begin at element p, of which `n` elements exist; the others are zero.
template <class T>
LLMOPT_INLINE vf load_lanes(const T* p, std::int64_t n) {
  if constexpr (kPairDot<T>) {
    return bit_cast<vf>(n >= 2 * kLanes ? load_bits(p) : load_bits_partial(p, n));
  } else {
    return n >= kLanes ? load(p) : load_partial(p, static_cast<int>(n));
  }
}

// bf16 is transposed in pairs even where it is multiplied as float, which takes half the shuffles.
template <class T>
constexpr bool kSplitPairs = std::is_same<T, bf16>::value && !kPairDot<T>;
template <class T>
constexpr int kPackElements = std::is_same<T, bf16>::value ? 2 * kLanes : kLanes;
template <class T>
LLMOPT_INLINE vf load_packable(const T* p, std::int64_t n) {
  if constexpr (kSplitPairs<T>) {
    return bit_cast<vf>(n >= 2 * kLanes ? load_bits(p) : load_bits_partial(p, n));
  } else {
    return load_lanes(p, n);
  }
}

// staged[i][0..] = `elements` elements of row i of x from element `from` on, as lanes; rows kDepth lanes apart.
template <class T>
void stage_rows(const Rows<T>& x, std::int64_t rows, std::int64_t from, std::int64_t elements, float* staged) {
  constexpr int kPer = GemmLane<T>::kElements * kLanes;
  for (std::int64_t m = 0; m < rows; ++m, staged += kDepth) {
    const T* row = x[m] + from;
    for (std::int64_t i = 0, lane = 0; i < elements; i += kPer, lane += kLanes)
      store(staged + lane, load_lanes(row + i, elements - i));
  }
}

// kLanes rows of W from their element `i` on, transposed into columns of `packed`; `n` elements of each row are left.
// Lanes past the end are zero.
template <class T>
LLMOPT_INLINE void pack_block(const T* const (&rows)[kLanes], std::int64_t i, std::int64_t n, float* packed) {
  vf block[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) block[c] = load_packable(rows[c] + i, n);
  transpose(block);
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (kSplitPairs<T>) {
      const vu pair = bit_cast<vu>(block[lane]);
      store(packed + 2 * lane * kPanel, bit_cast<vf>(pair << 16));
      store(packed + (2 * lane + 1) * kPanel, bit_cast<vf>(pair & 0xffff0000u));
    } else {
      store(packed + lane * kPanel, block[lane]);
    }
  }
}

// packed[lane][column] = `elements` elements of `columns` rows of W (`stride` elements apart). Missing columns repeat the
// last one: they are computed and thrown away.
template <class T>
void pack_panel(const T* weight, std::int64_t stride, std::int64_t columns, std::int64_t elements, float* packed) {
  constexpr int kPer = kPackElements<T>;
  constexpr int kStep = kPer / GemmLane<T>::kElements * kPanel;
  // One group of rows after the other: rows that are a multiple of 4 KiB apart share a set of the first-level cache, and
  // more than eight of them would evict each other before their lines are used up.
  for (int group = 0; group < kPanel; group += kLanes) {
    const T* rows[kLanes];
    for (int c = 0; c < kLanes; ++c)
      rows[c] = weight + (group + c < columns ? group + c : columns - 1) * stride;
    float* to = packed + group;
    std::int64_t i = 0;
    for (; i + kPer <= elements; i += kPer, to += kStep) pack_block(rows, i, kPer, to);
    if (i < elements) pack_block(rows, i, elements - i, to);
  }
}

// Fetches the part of the weights that is packed next into the second-level cache while this one is multiplied: without
// it packing waits for memory. Each tile takes kLanes rows of W, until all of the next panel are under way.
struct NextPanel {
  const char* at;
  std::int64_t row;         // bytes between the rows of W
  std::int64_t lane_bytes;  // that a lane along K takes in memory
  int left;                 // rows

  LLMOPT_INLINE void fetch(std::int64_t lane, int r) const { __builtin_prefetch(at + r * row + lane * lane_bytes, 0, 2); }
  void next_tile() { at += kLanes * row, left -= kLanes; }
};

// sums [R][kPanel] (+)= a [R][depth] . b [depth][kPanel], rows of a kDepth apart.
template <class Lane, int R>
__attribute__((noinline)) void gemm_tile(const Lane* a, const Lane* b, std::int64_t depth, float* sums, bool add,
                                         const NextPanel& next) {
  vf acc[R][kPanelVectors] = {};
  const auto step = [&](std::int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = gemm_step(acc[r][v], a[r * kDepth + i], b + v * kLanes);
    b += kPanel;
  };
  std::int64_t i = 0;
  if (next.left > 0)
    for (; i + kLanes <= depth; i += kLanes)
      for (int r = 0; r < kLanes; ++r) next.fetch(i, r), step(i + r);
  for (; i < depth; ++i) step(i);
  if (add)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] += load(sums + r * kPanel + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) store(sums + r * kPanel + v * kLanes, acc[r][v]);
}

// All rows against one packed panel. The last tile is the smallest even one that covers the rows that are left; it may
// run over the end by one row, for which staged and sums have room.
template <class Lane>
void multiply_panel(const float* staged, const float* packed, std::int64_t rows, std::int64_t depth, float* sums,
                    bool add, NextPanel next) {
  const Lane* a = reinterpret_cast<const Lane*>(staged);
  const Lane* b = reinterpret_cast<const Lane*>(packed);
  while (rows > 0) {
    const int tile = rows >= kTileRows ? kTileRows : static_cast<int>(rows + 1) & ~1;
    switch (tile) {
      case 2: gemm_tile<Lane, 2>(a, b, depth, sums, add, next); break;
      case 4: gemm_tile<Lane, 4>(a, b, depth, sums, add, next); break;
      case 6: gemm_tile<Lane, 6>(a, b, depth, sums, add, next); break;
      default:
        if constexpr (kTileRows == 12) {
          if (tile == 8) gemm_tile<Lane, 8>(a, b, depth, sums, add, next);
          if (tile == 10) gemm_tile<Lane, 10>(a, b, depth, sums, add, next);
          if (tile == 12) gemm_tile<Lane, 12>(a, b, depth, sums, add, next);
        }
    }
    next.next_tile();
    a += tile * kDepth;
    sums += tile * kPanel;
    rows -= tile;
  }
}

// out[i][0..columns) = sums[i] + bias. `out` may be the memory of `sums`, a row on its row: no row is written before it is read.
template <class T, class TOut>
void write_panel(const float* sums, std::int64_t rows, const T* bias, std::int64_t columns, TOut* out,
                 std::int64_t out_stride) {
  vf shift[kPanelVectors] = {};
  int width[kPanelVectors];
  for (int v = 0; v < kPanelVectors; ++v) {
    const std::int64_t left = columns - v * kLanes;
    width[v] = left < 0 ? 0 : left > kLanes ? kLanes : static_cast<int>(left);
    if (bias) shift[v] = load_partial(bias + v * kLanes, width[v]);
  }
  for (std::int64_t m = 0; m < rows; ++m, sums += kPanel, out += out_stride)
    for (int v = 0; v < kPanelVectors; ++v) {
      const vf sum = load(sums + v * kLanes) + shift[v];
      if (width[v] == kLanes) {
        store(out + v * kLanes, sum);
      } else {
        store_partial(out + v * kLanes, sum, width[v]);
      }
    }
}

// Where panel `index` of all segments together begins. Panels do not straddle segments.
struct Panel {
  std::int64_t segment, row, columns, out_column;
};
inline Panel find_panel(const Segments& segments, std::int64_t index) {
  std::int64_t column = 0;
  for (std::int64_t s = 0; s < segments.count; column += segments.sizes[s++]) {
    const std::int64_t n = segments.sizes[s], panels = (n + kPanel - 1) / kPanel;
    if (index < panels) {
      const std::int64_t row = index * kPanel;
      return {s, row, n - row < kPanel ? n - row : kPanel, column + row};
    }
    index -= panels;
  }
  return {0, 0, 0, 0};
}

// How many of `count` workers stand side by side along the panels; the others divide the rows. The cheapest grid is
// the one whose largest part is smallest, where packing a panel costs about as much as multiplying 8 rows with it.
inline int grid_columns(std::int64_t rows, std::int64_t panels, int count) {
  int best = 1;
  std::int64_t best_cost = INT64_MAX;
  for (int columns = count; columns >= 1; --columns) {
    if (count % columns) continue;
    const std::int64_t part = round_up((rows + count / columns - 1) / (count / columns), kTileRows);
    const std::int64_t cost = (part + 8) * ((panels + columns - 1) / columns);
    if (cost < best_cost) best = columns, best_cost = cost;
  }
  return best;
}

// x: `rows` rows of length k; out [rows, sum of the segments' sizes] with rows out_stride apart, not written with an
// epilogue.
template <class T, class TOut>
void gemm(const Rows<T>& x, std::int64_t rows, std::int64_t k, const Segments& segments, TOut* out,
          std::int64_t out_stride, const Worker& w, const Epilogue* epilogue) {
  using Lane = typename GemmLane<T>::Type;
  constexpr std::int64_t kBlock = std::int64_t{kDepth} * GemmLane<T>::kElements;  // elements of K at a time
  std::int64_t panels = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) panels += (segments.sizes[s] + kPanel - 1) / kPanel;
  const int columns = grid_columns(rows, panels, w.count);
  Worker down = w, across = w;
  down.index = w.index / columns, down.count = w.count / columns;
  across.index = w.index % columns, across.count = columns;
  const Range my_rows = share(down, rows, kTileRows), my_panels = share(across, panels);
  const std::int64_t count = my_rows.end - my_rows.begin;
  if (count == 0 || my_panels.begin == my_panels.end) return;

  const std::int64_t chunks = (count + kMaxGemmRows - 1) / kMaxGemmRows;
  const std::int64_t chunk = round_up((count + chunks - 1) / chunks, kTileRows);
  float* staged = reinterpret_cast<float*>(w.scratch);
  float* packed = staged + chunk * kDepth;
  float* sums = packed + kDepth * kPanel;
  const std::int64_t room = static_cast<std::int64_t>(kScratchBytes / sizeof(float)) - (sums - staged);
  const std::int64_t block = room / (chunk * kPanel);  // panels whose sums fit

  for (std::int64_t m = my_rows.begin; m < my_rows.end; m += chunk) {
    const std::int64_t height = my_rows.end - m < chunk ? my_rows.end - m : chunk;
    const Rows<T> part = x.index ? Rows<T>{x.base, x.stride, x.index + m} : Rows<T>{x[m], x.stride, nullptr};
    for (std::int64_t p = my_panels.begin; p < my_panels.end; p += block) {
      const std::int64_t width = my_panels.end - p < block ? my_panels.end - p : block;
      std::int64_t from = 0;
      do {  // at least once: without elements of K the sums are zero
        const std::int64_t elements = k - from < kBlock ? k - from : kBlock;
        const std::int64_t depth = (elements + GemmLane<T>::kElements - 1) / GemmLane<T>::kElements;
        stage_rows(part, height, from, elements, staged);
        for (std::int64_t i = 0; i < width; ++i) {
          const Panel panel = find_panel(segments, p + i);
          float* panel_sums = sums + i * chunk * kPanel;
          const T* weight = segments.weight<T>(panel.segment) + panel.row * k + from;
          pack_panel(weight, k, panel.columns, elements, packed);
          const NextPanel next{reinterpret_cast<const char*>(weight + kPanel * k), k * static_cast<std::int64_t>(sizeof(T)),
                               GemmLane<T>::kElements * static_cast<std::int64_t>(sizeof(T)), kPanel};
          multiply_panel<Lane>(staged, packed, height, depth, panel_sums, from > 0, next);
          if (from + kBlock < k) continue;
          const T* bias = segments.bias<T>(panel.segment) ? segments.bias<T>(panel.segment) + panel.row : nullptr;
          if (epilogue) {
            constexpr std::int64_t kStride = kPanel * sizeof(float) / sizeof(T);
            T* values = reinterpret_cast<T*>(panel_sums);
            write_panel<T, T>(panel_sums, height, bias, panel.columns, values, kStride);
            epilogue->apply(epilogue->state, {m, height, panel.out_column, panel.columns, values, kStride});
          } else {
            write_panel<T, TOut>(panel_sums, height, bias, panel.columns, out + m * out_stride + panel.out_column,
                                 out_stride);
          }
        }
        from += kBlock;
      } while (from < k);
    }
  }
}

}  // namespace llmopt
