// A tensor with some of its rows replaced: how a static cache takes new keys and values.
//
// index_copy<T>
//   tensors: x [outer, n, inner] T, index [m] int64, source [outer, m, inner] T, out [outer, n, inner] T; all dense
//   ints:    outer, n, inner, m
//   An index outside 0..n-1 is kIndexOutOfRange. Of equal indices the last one counts.
//
// Workers share the outer dimension.
#pragma once

#include <cstring>

#include "abi.h"
#include "rows.h"

namespace llmopt {

template <class T>
void index_copy(const Args& a, const Worker& w) {
  const T* x = a.tensor<const T>(0);
  const std::int64_t* index = a.tensor<const std::int64_t>(1);
  const T* source = a.tensor<const T>(2);
  T* out = a.tensor<T>(3);
  const std::int64_t n = a.ints[1], inner = a.ints[2], m = a.ints[3];
  for (std::int64_t i = 0; i < m; ++i)
    if (index[i] < 0 || index[i] >= n) return w.fail(kIndexOutOfRange);
  const std::size_t row = sizeof(T) * static_cast<std::size_t>(inner);
  const Range mine = share(w, a.ints[0]);
  for (std::int64_t o = mine.begin; o < mine.end; ++o) {
    std::memcpy(out + o * n * inner, x + o * n * inner, row * static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < m; ++i)
      std::memcpy(out + (o * n + index[i]) * inner, source + (o * m + i) * inner, row);
  }
}

}  // namespace llmopt
