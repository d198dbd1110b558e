// The largest entries of each row, and the softmax of each row.
//
// topk<T>
//   tensors: x [rows, cols] T (strided), values [rows, k] T or null, indices [rows, k] int64
//   ints:    rows, cols (below 2^32), k (at most cols), x stride, whether the result is sorted
//   A NaN is greater than any number. Which of several equal values is taken, and their order, is PyTorch's choice: a
//   router in bf16 meets them often, and another choice would be another expert.
//
// softmax<T, TOut>
//   tensors: x [rows, cols] T (strided), out [rows, cols] TOut (strided; may be x where the types agree)
//   ints:    rows, cols, x stride, out stride
//   Over the last dimension, in float, rounded once. As in PyTorch, a row of -inf alone gives NaN.
//
// Workers share the rows.
#pragma once

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "abi.h"
#include "rows.h"

namespace llmopt {

// Value and index in one integer whose order is the order of the result: a greater value first, then a lower index.
LLMOPT_INLINE std::uint64_t topk_key(float value, std::int64_t index) {
  std::uint32_t bits = float_to_bits(value);
  if (value != value) {
    bits = 0xffffffffu;
  } else if (value == 0.0f) {
    bits = 0x80000000u;  // both zeros
  } else {
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return std::uint64_t{bits} << 32 | (0xffffffffu - static_cast<std::uint32_t>(index));
}
LLMOPT_INLINE std::int64_t topk_index(std::uint64_t key) {
  return 0xffffffffu - static_cast<std::uint32_t>(key);
}

LLMOPT_INLINE bool any_lane(vi mask) {
  int lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= mask[i];
  return lanes != 0;
}

// A row with equal values among or beside the chosen ones, by the same standard algorithms in the same order as PyTorch
// (TopKImpl.h), because what they do with equal values is written nowhere.
template <class T>
void topk_like_torch(const T* x, std::int64_t cols, std::int64_t k, bool sorted, std::int64_t* indices, char* scratch) {
  using Entry = std::pair<float, std::int64_t>;
  auto* entries = reinterpret_cast<Entry*>(scratch);
  for (std::int64_t i = 0; i < cols; ++i) new (entries + i) Entry(to_float(x[i]), i);
  const auto before = [](const Entry& a, const Entry& b) {
    return (a.first != a.first && b.first == b.first) || a.first > b.first;
  };
  if (k * 64 <= cols) {
    std::partial_sort(entries, entries + k, entries + cols, before);
  } else {
    std::nth_element(entries, entries + k - 1, entries + cols, before);
    if (sorted) std::sort(entries, entries + k - 1, before);
  }
  for (std::int64_t i = 0; i < k; ++i) indices[i] = entries[i].second;
}

template <class T>
void topk(const Args& a, const Worker& w) {
  const T* all = a.tensor<const T>(0);
  T* values = a.tensor<T>(1);
  std::int64_t* indices = a.tensor<std::int64_t>(2);
  constexpr float kBelow = -std::numeric_limits<float>::infinity();
  const std::int64_t cols = a.ints[1], k = a.ints[2];
  const bool sorted = a.ints[4] != 0;
  const auto descending = [](std::uint64_t x, std::uint64_t y) { return x > y; };
  if (k == 0) return;
  const Range mine = share(w, a.ints[0]);
  for (std::int64_t r = mine.begin; r < mine.end; ++r) {
    const T* x = all + r * a.ints[3];
    // The row of the indices holds the heap of the k best keys so far, the least of them in front.
    auto* heap = reinterpret_cast<std::uint64_t*>(indices + r * k);
    for (std::int64_t i = 0; i < k; ++i) heap[i] = topk_key(to_float(x[i]), i);
    std::make_heap(heap, heap + k, descending);
    float least = to_float(x[topk_index(heap[0])]);
    bool tie = false;  // an entry was passed over, or put out, that equals the least one of its time
    for_vectors(k, cols, [&](std::int64_t i, auto access) {
      // An equal value that comes later never enters, so a whole vector of such is passed over.
      const vf here = access.keep(access.load(x + i), kBelow);
      tie = tie || any_lane(here == least);
      if (!any_lane(~(here <= least))) return;
      for (int j = 0; j < access.count; ++j) {
        const std::uint64_t key = topk_key(to_float(x[i + j]), i + j);
        tie = tie || (key ^ heap[0]) >> 32 == 0;
        if (key <= heap[0]) continue;
        const std::uint64_t gone = heap[0];
        std::pop_heap(heap, heap + k, descending);
        heap[k - 1] = key;
        std::push_heap(heap, heap + k, descending);
        tie = tie || (gone ^ heap[0]) >> 32 == 0;
      }
      least = to_float(x[topk_index(heap[0])]);
    });
    std::sort(heap, heap + k, descending);
    for (std::int64_t i = 1; i < k; ++i) tie = tie || (heap[i - 1] ^ heap[i]) >> 32 == 0;
    if ((tie || !sorted) && static_cast<std::size_t>(cols) * 16 <= kScratchBytes) {
      topk_like_torch(x, cols, k, sorted, indices + r * k, w.scratch);
    } else {
      for (std::int64_t i = 0; i < k; ++i) indices[r * k + i] = topk_index(heap[i]);
    }
    if (values)
      for (std::int64_t i = 0; i < k; ++i) values[r * k + i] = x[indices[r * k + i]];
  }
}

template <class T, class TOut>
void softmax(const Args& a, const Worker& w) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const std::int64_t cols = a.ints[1];
  const Range mine = share(w, a.ints[0]);
  for (std::int64_t r = mine.begin; r < mine.end; ++r) {
    const T* x = a.tensor<const T>(0) + r * a.ints[2];
    TOut* out = a.tensor<TOut>(1) + r * a.ints[3];
    vf greatest = splat(kLowest);
    for_vectors(0, cols, [&](std::int64_t i, auto access) {
      greatest = max(greatest, access.keep(access.load(x + i), kLowest));
    });
    const float top = reduce_max(greatest);
    const float sum = sum_vectors(cols, [&](std::int64_t i, auto access, vf& total) {
      total += access.keep(exp(vf(access.load(x + i) - top)), 0.0f);
    });
    const float inverse = 1.0f / sum;
    for_vectors(0, cols, [&](std::int64_t i, auto access) {
      access.store(out + i, exp(vf(access.load(x + i) - top)) * inverse);
    });
  }
}

}  // namespace llmopt
