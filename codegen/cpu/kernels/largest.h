// The largest element of each row, and its place: what a greedy sampler needs of the logits.
//
// largest<T>
//   tensors: x [rows, cols] T (strided), values [rows] float, places [rows] int64
//   ints:    rows, cols (at least 1), x stride
//   The first of equal elements, the two zeros among them. A NaN is larger than all; of several the first is taken.
//
// Workers share the blocks of all rows, so that few long rows keep all of them busy; each then takes rows, and chooses
// from what the workers found in them.
#pragma once

#include "abi.h"
#include "rows.h"

namespace llmopt {

constexpr std::int64_t kLargestBlock = 1024;  // elements that are searched a second time, for the place

struct Largest {
  float value;
  std::int64_t place;
};

// Whether `b`, which stands behind `a`, takes its place.
LLMOPT_INLINE bool is_larger(float b, float a) { return b > a || (b != b && a == a); }

// The largest of x[begin, end), which is no NaN unless one is there. Which NaN does not matter.
template <class T>
LLMOPT_INLINE float block_maximum(const T* x, std::int64_t begin, std::int64_t end) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  constexpr int kChains = 4;  // hide the latency of a maximum
  vf top[kChains];
  vi unordered[kChains] = {};
  for (int j = 0; j < kChains; ++j) top[j] = splat(kLowest);
  std::int64_t i = begin;
  for (; i + kChains * kLanes <= end; i += kChains * kLanes)
    for (int j = 0; j < kChains; ++j) {
      const vf here = load(x + i + j * kLanes);
      unordered[j] |= here != here;
      top[j] = max(here, top[j]);  // a NaN is not above, and leaves what was there
    }
  for_vectors(i, end, [&](std::int64_t at, auto access) {
    const vf here = access.keep(access.load(x + at), kLowest);
    unordered[0] |= here != here;
    top[0] = max(here, top[0]);
  });
  const vi any = (unordered[0] | unordered[1]) | (unordered[2] | unordered[3]);
  int lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= any[i];
  if (lanes) return std::numeric_limits<float>::quiet_NaN();
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// The largest of x[begin, end), end > begin, which begins with a whole block.
template <class T>
Largest largest_between(const T* x, std::int64_t begin, std::int64_t end) {
  Largest best{0.0f, -1};
  for (std::int64_t at = begin; at < end; at += kLargestBlock) {
    const float value = block_maximum(x, at, at + kLargestBlock < end ? at + kLargestBlock : end);
    if (best.place < 0 || is_larger(value, best.value)) best = {value, at};
    if (value != value) break;
  }
  // Equal to itself, or both NaN: in the block that holds it, the first one is found before the end.
  const bool is_nan = best.value != best.value;
  for (;; ++best.place) {
    const float here = to_float(x[best.place]);
    if (here == best.value || (is_nan && here != here)) return best;
  }
}

template <class T>
void largest(const Args& a, const Worker& w) {
  const T* x = a.tensor<const T>(0);
  const std::int64_t rows = a.ints[0], cols = a.ints[1], stride = a.ints[2];
  if (static_cast<std::size_t>(rows) * sizeof(Largest) > kScratchBytes) {
    w.fail(kUnsupportedSize);
    return;
  }
  const std::int64_t blocks = (cols + kLargestBlock - 1) / kLargestBlock;  // of a row
  const Range mine = share(w, rows * blocks);
  auto* found = reinterpret_cast<Largest*>(w.scratch);  // by row
  for (std::int64_t at = mine.begin; at < mine.end;) {
    const std::int64_t row = at / blocks, first = at - row * blocks;
    const std::int64_t last = mine.end - row * blocks < blocks ? mine.end - row * blocks : blocks;
    const std::int64_t end = last * kLargestBlock < cols ? last * kLargestBlock : cols;
    found[row] = largest_between(x + row * stride, first * kLargestBlock, end);
    at = row * blocks + last;
  }
  w.sync();
  const Range chosen = share(w, rows);
  for (std::int64_t row = chosen.begin; row < chosen.end; ++row) {
    Largest best{0.0f, -1};
    for (int other = 0; other < w.count; ++other) {  // in the order of the places
      const Range theirs = share(Worker{other, w.count, nullptr, nullptr, nullptr}, rows * blocks);
      if (theirs.end <= row * blocks || theirs.begin >= (row + 1) * blocks) continue;
      const Largest& next = reinterpret_cast<const Largest*>(w.scratch_of(other))[row];
      if (best.place < 0 || is_larger(next.value, best.value)) best = next;
    }
    a.tensor<float>(1)[row] = best.value;
    a.tensor<std::int64_t>(2)[row] = best.place;
  }
}

}  // namespace llmopt
