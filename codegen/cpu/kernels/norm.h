// Normalisation of rows, with an optional residual addition before it.
//
// rms_norm<T, TW, CastFirst>   y = s * rsqrt(mean(s^2) + eps) (Zhang and Sennrich, arXiv:1910.07467)
//   tensors: x [outer, inner, cols] T (strided), residual [outer * inner, cols] T or null, weight [cols] TW or null,
//            out [outer, inner, cols] T (strided, may be x), residual_out [outer * inner, cols] T or null (may be
//            residual, or x where x is contiguous)
//   ints:    outer, inner, cols, x outer stride, x inner stride, out outer stride, out inner stride (in elements)
//   floats:  eps, weight_offset
//   s = x, or x + residual rounded to T, which is also what residual_out receives. CastFirst rounds y to T before it is
//   multiplied by the weight (Llama), otherwise y is rounded once, after it (Gemma). The weight is weight + offset.
//
// layer_norm<T, TW>            y = (s - mean(s)) / sqrt(var(s) + eps) (Ba et al., arXiv:1607.06450)
//   tensors: x, residual or null, weight or null, bias [cols] TW or null, out, residual_out or null
//   ints, floats: those of rms_norm; y * (weight + offset) + bias is computed in float and rounded once.
//
// Workers share the rows. A row is read from memory once; the later passes over it find it in the L1 cache.
#pragma once

#include "abi.h"
#include "rows.h"

namespace llmopt {

// What both norms do before they differ: the addresses of a row, and the sum that is normalised.
template <class T>
struct NormRows {
  const T* x;
  const T* residual;
  T* out;
  T* residual_out;
  std::int64_t inner, cols, x_outer, x_inner, out_outer, out_inner;

  NormRows(const Args& a, int out_index)
      : x(a.tensor<const T>(0)),
        residual(a.tensor<const T>(1)),
        out(a.tensor<T>(out_index)),
        residual_out(a.tensor<T>(out_index + 1)),
        inner(a.ints[1]),
        cols(a.ints[2]),
        x_outer(a.ints[3]),
        x_inner(a.ints[4]),
        out_outer(a.ints[5]),
        out_inner(a.ints[6]) {}

  const T* x_row(std::int64_t r) const { return x + r / inner * x_outer + r % inner * x_inner; }
  T* out_row(std::int64_t r) const { return out + r / inner * out_outer + r % inner * out_inner; }
};

// The values of one row: x alone, x + residual, or that sum as an earlier pass stored it.
template <class T, class Access>
LLMOPT_INLINE vf norm_input(const T* x, const T* residual, std::int64_t i, Access access) {
  const vf v = access.load(x + i);
  return residual ? rounded<T>(v + access.load(residual + i)) : v;
}

// Calls body(row values, residual of the row or null, out): where residual_out is asked for, the sum is stored there
// and then stands for both inputs.
template <class T, class Body>
LLMOPT_INLINE void for_norm_rows(const NormRows<T>& rows, std::int64_t outer, const Worker& w, Body body) {
  const Range mine = share(w, outer * rows.inner);
  for (std::int64_t r = mine.begin; r < mine.end; ++r) {
    const T* x = rows.x_row(r);
    const T* residual = rows.residual ? rows.residual + r * rows.cols : nullptr;
    if (rows.residual_out) {
      T* sum = rows.residual_out + r * rows.cols;
      for_vectors(0, rows.cols, [&](std::int64_t i, auto access) {
        access.store(sum + i, norm_input(x, residual, i, access));
      });
      x = sum;
      residual = nullptr;
    }
    body(x, residual, rows.out_row(r));
  }
}

template <class T, class TW, bool CastFirst>
void rms_norm(const Args& a, const Worker& w) {
  const NormRows<T> rows(a, 3);
  const TW* weight = a.tensor<const TW>(2);
  const std::int64_t cols = rows.cols;
  const float eps = static_cast<float>(a.floats[0]), offset = static_cast<float>(a.floats[1]);
  for_norm_rows(rows, a.ints[0], w, [&](const T* x, const T* residual, T* out) {
    const float squares = sum_vectors(cols, [&](std::int64_t i, auto access, vf& sum) {
      const vf v = norm_input(x, residual, i, access);
      sum += v * v;
    });
    const float inverse = 1.0f / sqrt(squares / static_cast<float>(cols) + eps);
    for_vectors(0, cols, [&](std::int64_t i, auto access) {
      vf y = norm_input(x, residual, i, access) * inverse;
      if (CastFirst) y = rounded<T>(y);
      if (weight) y = y * (access.load(weight + i) + offset);
      access.store(out + i, y);
    });
  });
}

template <class T, class TW>
void layer_norm(const Args& a, const Worker& w) {
  const NormRows<T> rows(a, 4);
  const TW* weight = a.tensor<const TW>(2);
  const TW* bias = a.tensor<const TW>(3);
  const std::int64_t cols = rows.cols;
  const float n = static_cast<float>(cols);
  const float eps = static_cast<float>(a.floats[0]), offset = static_cast<float>(a.floats[1]);
  for_norm_rows(rows, a.ints[0], w, [&](const T* x, const T* residual, T* out) {
    // A first mean centres the row; what it misses is found from the centred values, which are small, so that neither
    // the mean nor the variance loses digits when the row lies far from zero.
    const float centre = sum_vectors(cols, [&](std::int64_t i, auto access, vf& sum) {
      sum += norm_input(x, residual, i, access);
    }) / n;
    const float rest = sum_vectors(cols, [&](std::int64_t i, auto access, vf& sum) {
      sum += access.keep(norm_input(x, residual, i, access) - centre, 0.0f);
    }) / n;
    const float squares = sum_vectors(cols, [&](std::int64_t i, auto access, vf& sum) {
      const vf d = access.keep(norm_input(x, residual, i, access) - centre - rest, 0.0f);
      sum += d * d;
    });
    const float inverse = 1.0f / sqrt(squares / n + eps);
    for_vectors(0, cols, [&](std::int64_t i, auto access) {
      vf y = (norm_input(x, residual, i, access) - centre - rest) * inverse;
      if (weight) y = y * (access.load(weight + i) + offset);
      if (bias) y = y + access.load(bias + i);
      access.store(out + i, y);
    });
  });
}

}  // namespace llmopt
