// Running sums of rows.
//
// cumsum<T, TOut>
//   tensors: x [rows, cols] T (strided), out [rows, cols] TOut (strided)
//   ints:    rows, cols, x stride, out stride
//   Integers and bool are added as int64, the others in double, rounded once for each entry, as PyTorch does.
//
// Workers share the rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "abi.h"
#include "rows.h"

namespace llmopt {

template <class T, class TOut>
void cumsum(const Args& a, const Worker& w) {
  constexpr bool kInteger = std::is_integral_v<TOut>;
  using Sum = std::conditional_t<kInteger, std::int64_t, double>;
  const T* x = a.tensor<const T>(0);
  TOut* out = a.tensor<TOut>(1);
  const std::int64_t cols = a.ints[1], x_stride = a.ints[2], out_stride = a.ints[3];
  const Range mine = share(w, a.ints[0]);
  for (std::int64_t r = mine.begin; r < mine.end; ++r) {
    Sum sum = 0;
    for (std::int64_t i = 0; i < cols; ++i) {
      if constexpr (std::is_integral_v<T>) {
        sum += static_cast<Sum>(x[r * x_stride + i]);
      } else {
        sum += static_cast<Sum>(to_float(x[r * x_stride + i]));
      }
      if constexpr (kInteger) {
        out[r * out_stride + i] = static_cast<TOut>(sum);
      } else {
        out[r * out_stride + i] = from_float<TOut>(static_cast<float>(sum));
      }
    }
  }
}

}  // namespace llmopt
