// Products of a batch of matrices, none of which need be a weight.
//
// batched_linear<T>
//   tensors: x [B0, B1, B2, M, K], w [B0, B1, B2, N, K], out [B0, B1, B2, M, N], all of T
//   ints:    B0, B1, B2, M, N, K, then for x, w and out each: strides of B0, B1, B2 (0 where it is shared); then the row
//            strides of x and out. Rows are dense, and the N rows of a w lie one behind the other.
//   out = x @ w^T; sums are kept in float and rounded once.
//
// Where there are enough matrices, each worker takes some of them whole; else all workers share every matrix.
#pragma once

#include "linear.h"

namespace llmopt {

template <class T>
void batched_linear(const Args& a, const Worker& w) {
  const std::int64_t b1 = a.ints[1], b2 = a.ints[2], m = a.ints[3], n = a.ints[4], k = a.ints[5];
  const std::int64_t batch = a.ints[0] * b1 * b2;
  if (m == 0 || n == 0) return;
  const std::int64_t *x_strides = a.ints + 6, *w_strides = a.ints + 9, *out_strides = a.ints + 12;
  const bool whole = batch >= 2 * w.count;
  Worker alone = w;
  if (whole) alone.index = 0, alone.count = 1;
  const Range mine = whole ? share(w, batch) : Range{0, batch};
  for (std::int64_t b = mine.begin; b < mine.end; ++b) {
    const std::int64_t at[3] = {b / (b1 * b2), b / b2 % b1, b % b2};
    const auto offset = [&](const std::int64_t* strides) {
      return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
    };
    void* const operands[2] = {const_cast<T*>(a.tensor<const T>(1)) + offset(w_strides), nullptr};
    matmul<T, T>(Rows<T>{a.tensor<const T>(0) + offset(x_strides), a.ints[15], nullptr}, m, k,
                 Segments{operands, &n, 1}, a.tensor<T>(2) + offset(out_strides), a.ints[16], alone);
  }
}

}  // namespace llmopt
