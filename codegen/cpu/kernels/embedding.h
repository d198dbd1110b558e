// Rows of a table, by index.
//
// embedding<T, TI>
//   tensors: ids [n] TI (int64 or int32), table [V, D] T, out [n, D] T (strided)
//   ints:    n, D, V, out stride
//   An id outside [0, V) is kIndexOutOfRange, and its row becomes zero.
//
// Workers share the ids.
#pragma once

#include <cstring>

#include "abi.h"
#include "simd.h"

namespace llmopt {

template <class T, class TI>
void embedding(const Args& a, const Worker& w) {
  const TI* ids = a.tensor<const TI>(0);
  const T* table = a.tensor<const T>(1);
  T* out = a.tensor<T>(2);
  const std::int64_t dim = a.ints[1], size = a.ints[2];
  const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(dim);
  const Range mine = share(w, a.ints[0]);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    const std::int64_t id = ids[i];
    T* row = out + i * a.ints[3];
    if (id < 0 || id >= size) {
      w.fail(kIndexOutOfRange);
      std::memset(static_cast<void*>(row), 0, bytes);
      continue;
    }
    std::memcpy(row, table + id * dim, bytes);
  }
}

}  // namespace llmopt
