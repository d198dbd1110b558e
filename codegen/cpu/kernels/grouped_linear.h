// grouped_linear<T, TEnd>: each group of rows times a matrix of its own (the experts of a mixture, one projection at a
// time).
//
// tensors: x [T, K] of T, weights [E, N, K] of T (contiguous), ends [E] of TEnd (int32 or int64, contiguous), out [T, N]
// ints:    T, K, N, E, row stride of x, row stride of out (elements)
//
// Group e are the rows [ends[e - 1], ends[e]), the first from 0. Rows behind the last end are set to zero. Ends that
// decrease or lie outside [0, T] fail with kIndexOutOfRange. Sums are kept in float and rounded once.
//
// All workers share the columns of one group after the other; groups write apart, so nobody waits in between.
#pragma once

#include <cstring>

#include "linear.h"

namespace llmopt {

template <class T, class TEnd>
void grouped_linear(const Args& a, const Worker& w) {
  const std::int64_t rows = a.ints[0], k = a.ints[1], n = a.ints[2], groups = a.ints[3];
  const TEnd* ends = a.tensor<const TEnd>(2);
  std::int64_t begin = 0;
  for (std::int64_t g = 0; g < groups; begin = ends[g++])
    if (ends[g] < begin || ends[g] > rows) return w.fail(kIndexOutOfRange);

  const T* x = a.tensor<const T>(0);
  T* out = a.tensor<T>(3);
  begin = 0;
  for (std::int64_t g = 0; g < groups; begin = ends[g++]) {
    const std::int64_t count = ends[g] - begin;
    if (count == 0) continue;
    void* const operands[2] = {const_cast<T*>(a.tensor<const T>(1)) + g * n * k, nullptr};
    matmul<T, T>(Rows<T>{x + begin * a.ints[4], a.ints[4], nullptr}, count, k, Segments{operands, &n, 1},
                 out + begin * a.ints[5], a.ints[5], w);
  }
  const Range mine = share(w, rows - begin);
  for (std::int64_t r = begin + mine.begin; r < begin + mine.end; ++r)
    std::memset(static_cast<void*>(out + r * a.ints[5]), 0, static_cast<std::size_t>(n) * sizeof(T));
}

}  // namespace llmopt
