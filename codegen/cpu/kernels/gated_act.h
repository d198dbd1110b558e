// The gate of a gated feed-forward layer (Shazeer, arXiv:2002.05202).
//
// gated_act<T, Act>
//   tensors: gate [rows, cols] T (strided), up [rows, cols] T (strided), out [rows, cols] T (strided, may be gate or
//            up)
//   ints:    rows, cols, gate stride, up stride, out stride
//   out = round_T(round_T(act(gate)) * up): rounded where the eager layer rounds. Act: a functor of activations.h.
//
// Workers share the rows, or the columns where there are fewer rows than workers.
#pragma once

#include "abi.h"
#include "activations.h"
#include "rows.h"

namespace llmopt {

template <class T, class Act>
void gated_act(const Args& a, const Worker& w) {
  const T* gate = a.tensor<const T>(0);
  const T* up = a.tensor<const T>(1);
  T* out = a.tensor<T>(2);
  const std::int64_t rows = a.ints[0], cols = a.ints[1];
  const bool by_rows = rows >= w.count;
  const Range row_range = by_rows ? share(w, rows) : Range{0, rows};
  // Two workers must not write to one cache line: 64 elements span at least one whole line of every type.
  const Range col_range = by_rows ? Range{0, cols} : share(w, cols, 64);
  for (std::int64_t r = row_range.begin; r < row_range.end; ++r) {
    const T* g = gate + r * a.ints[2];
    const T* u = up + r * a.ints[3];
    T* o = out + r * a.ints[4];
    for_vectors(col_range.begin, col_range.end, [&](std::int64_t i, auto access) {
      access.store(o + i, rounded<T>(Act{}(access.load(g + i))) * access.load(u + i));
    });
  }
}

}  // namespace llmopt
