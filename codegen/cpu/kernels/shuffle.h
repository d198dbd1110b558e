// Transposition and row-wise sums of a square of vectors.
//
// Written as shuffles inside 128-bit blocks first and of whole blocks after, which is how x86 can do them in one
// instruction each.
#pragma once

#include <utility>

#include "simd.h"

namespace llmopt {

// Lane i of the result is lane Pattern::lane(i) of a, or of b where that is kLanes or more.
template <class Pattern, int... I>
LLMOPT_INLINE vf shuffle_lanes(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::lane(I)...);
#else
  return __builtin_shuffle(a, b, vi{Pattern::lane(I)...});
#endif
}
template <class Pattern>
LLMOPT_INLINE vf shuffle(vf a, vf b) {
  return shuffle_lanes<Pattern>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Inside each block of four lanes: a0 b0 a1 b1, or a2 b2 a3 b3.
template <int High>
struct InterleaveSingles {
  static constexpr int lane(int i) { return i / 4 * 4 + 2 * High + i % 4 / 2 + (i % 2) * kLanes; }
};
// Inside each block of four lanes: a0 a1 b0 b1, or a2 a3 b2 b3.
template <int High>
struct InterleavePairs {
  static constexpr int lane(int i) { return i / 4 * 4 + 2 * High + i % 2 + (i % 4 / 2) * kLanes; }
};
// Eklundh's exchange of whole blocks at distance H: what a transposition swaps between rows i and i + H.
template <int H, int High>
struct ExchangeBlocks {
  static constexpr int lane(int i) {
    const bool from_b = i / 4 & H;
    return High ? (from_b ? i + kLanes : i + 4 * H) : (from_b ? i - 4 * H + kLanes : i);
  }
};

template <int H>
LLMOPT_INLINE void exchange_blocks(vf (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (i / 4 & H) continue;
    const vf low = shuffle<ExchangeBlocks<H, 0>>(rows[i], rows[i + 4 * H]);
    rows[i + 4 * H] = shuffle<ExchangeBlocks<H, 1>>(rows[i], rows[i + 4 * H]);
    rows[i] = low;
  }
}

// Row i becomes column i.
LLMOPT_INLINE void transpose(vf (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
    const vf a = shuffle<InterleaveSingles<0>>(rows[i], rows[i + 1]);
    const vf b = shuffle<InterleaveSingles<0>>(rows[i + 2], rows[i + 3]);
    const vf c = shuffle<InterleaveSingles<1>>(rows[i], rows[i + 1]);
    const vf d = shuffle<InterleaveSingles<1>>(rows[i + 2], rows[i + 3]);
    rows[i] = shuffle<InterleavePairs<0>>(a, b);
    rows[i + 1] = shuffle<InterleavePairs<1>>(a, b);
    rows[i + 2] = shuffle<InterleavePairs<0>>(c, d);
    rows[i + 3] = shuffle<InterleavePairs<1>>(c, d);
  }
  if constexpr (kLanes >= 8) exchange_blocks<1>(rows);
  if constexpr (kLanes >= 16) exchange_blocks<2>(rows);
}

// The two halves that Low and High pick from a and b, added.
template <class Low, class High>
LLMOPT_INLINE vf add_halves(vf a, vf b) {
  return shuffle<Low>(a, b) + shuffle<High>(a, b);
}

// Lane i of the result is the sum of the lanes of rows[i].
LLMOPT_INLINE vf sum_rows(const vf (&rows)[kLanes]) {
  vf sums[kLanes / 4];
  for (int i = 0; i < kLanes; i += 4) {
    const vf ab = add_halves<InterleaveSingles<0>, InterleaveSingles<1>>(rows[i], rows[i + 1]);
    const vf cd = add_halves<InterleaveSingles<0>, InterleaveSingles<1>>(rows[i + 2], rows[i + 3]);
    sums[i / 4] = add_halves<InterleavePairs<0>, InterleavePairs<1>>(ab, cd);
  }
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < kLanes / 4; i += 2)
      sums[i] = add_halves<ExchangeBlocks<1, 0>, ExchangeBlocks<1, 1>>(sums[i], sums[i + 1]);
  }
  if constexpr (kLanes >= 16) sums[0] = add_halves<ExchangeBlocks<2, 0>, ExchangeBlocks<2, 1>>(sums[0], sums[2]);
  return sums[0];
}

}  // namespace llmopt
