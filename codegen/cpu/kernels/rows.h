// Walking a row of any length in vectors: the same lambda runs once for the full vectors and once for the rest.
#pragma once

#include "simd.h"

namespace llmopt {

// Access to a whole vector, and to the first `count` lanes of one (the others read as zero and are not written).
struct FullVector {
  static constexpr int count = kLanes;
  template <class T>
  LLMOPT_INLINE vf load(const T* p) const {
    return llmopt::load(p);
  }
  template <class T>
  LLMOPT_INLINE void store(T* p, vf v) const {
    llmopt::store(p, v);
  }
  // `v` with the lanes beyond the row replaced by `other`.
  LLMOPT_INLINE vf keep(vf v, float) const { return v; }
};
struct PartVector {
  int count;
  template <class T>
  LLMOPT_INLINE vf load(const T* p) const {
    return load_partial(p, count);
  }
  template <class T>
  LLMOPT_INLINE void store(T* p, vf v) const {
    store_partial(p, v, count);
  }
  LLMOPT_INLINE vf keep(vf v, float other) const {
    for (int i = count; i < kLanes; ++i) v[i] = other;
    return v;
  }
};

// body(i, access) for the vectors of [begin, end).
template <class Body>
LLMOPT_INLINE void for_vectors(std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, FullVector{});
  if (i < end) body(i, PartVector{static_cast<int>(end - i)});
}

// Four independent accumulators hide the latency of the additions: body(i, access, accumulator).
template <class Body>
LLMOPT_INLINE float sum_vectors(std::int64_t n, Body body) {
  vf sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) body(i + j * kLanes, FullVector{}, sums[j]);
  for (; i + kLanes <= n; i += kLanes) body(i, FullVector{}, sums[0]);
  if (i < n) body(i, PartVector{static_cast<int>(n - i)}, sums[1]);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// v rounded to what T can hold.
template <class T>
LLMOPT_INLINE vf rounded(vf v) {
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}
template <>
LLMOPT_INLINE vf rounded<float>(vf v) {
  return v;
}

}  // namespace llmopt
