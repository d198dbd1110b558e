// linear<T, TOut = T>: out = x @ W^T + b, where W is a list of row-major segments whose outputs lie side by side (merged
// query/key/value or gate/up projections, without a merged copy).
//
// tensors: x [M, K] of T, out [M, sum n_i] of TOut (T or float), then for each segment w_i [n_i, K] of T (contiguous, any
//          alignment) and b_i [n_i] of T or null
// ints:    M, K, row stride of x, row stride of out (elements), number of segments, n_0, n_1, ...
// epilogue: when there is one, it gets the results as T, block by block while they are in the cache, and out is not written
//          (codegen/loops/print_epilogue.py)
//
// Sums are kept in float and rounded once. The weights are read where they are: nothing is packed ahead of the call.
// A few rows stream the weights at memory speed (gemv.h); more rows pack them on the fly (gemm.h), unless results must
// not depend on the number of rows (invariance.h). Both split the work over the workers without synchronising.
#pragma once

#include "gemm.h"
#include "gemv.h"
#include "invariance.h"

namespace llmopt {

// Up to this many rows gemv reads the weights in place; beyond it the transpose that gemm needs pays for itself.
// Measured with both forced, weights in memory: on Zen 3 at K = 2048 .. 8192 gemv is 1.7 to 2 times faster at 8 rows, 1.1
// times (two-byte types) or as fast (float) at 24, and 5 to 15 % slower at 48. On Zen 4 it is 1.07 times faster at 32 rows and as fast
// at 48 with pairs of bf16; float, 1.2 times faster at 64 and as fast at 96.
template <class T>
constexpr std::int64_t kGemvMaxRows = kPairDot<T> ? 48 : kManyRegisters ? 64 : sizeof(T) == 2 ? 32 : 24;
// And as long as the staged rows hardly overflow a second-level cache.
constexpr std::size_t kGemvMaxStaged = std::size_t{5} << 18;

// gemv for any number of rows, as many at a time as fit a second-level cache: its sums are those of a single row.
template <class T, class TOut>
void matmul_row_by_row(const Rows<T>& x, std::int64_t rows, std::int64_t k, const Segments& segments, TOut* out,
                       std::int64_t out_stride, const Worker& w, const Epilogue* epilogue) {
  constexpr std::size_t kStagedBytes = std::size_t{1} << 20;
  if (gemv_scratch<T>(1, k) + kEpilogueColumns * sizeof(T) > kScratchBytes) return w.fail(kUnsupportedSize);
  constexpr std::size_t kEpilogueRows = (kScratchBytes - kStagedBytes) / (kEpilogueColumns * sizeof(T));
  const std::size_t staged = kStagedBytes / gemv_scratch<T>(1, k);
  const std::int64_t fit = static_cast<std::int64_t>(staged < kEpilogueRows ? staged : kEpilogueRows);
  const std::int64_t most = fit >= kGemvRows ? fit / kGemvRows * kGemvRows : 1;
  for (std::int64_t m = 0; m < rows; m += most) {
    const Rows<T> part = x.index ? Rows<T>{x.base, x.stride, x.index + m} : Rows<T>{x[m], x.stride, nullptr};
    TOut* to = epilogue ? nullptr : out + m * out_stride;
    gemv<T, TOut>(part, rows - m < most ? rows - m : most, k, segments, to, out_stride, w, epilogue, m);
  }
}

template <class T, class TOut>
void matmul(const Rows<T>& x, std::int64_t rows, std::int64_t k, const Segments& segments, TOut* out,
            std::int64_t out_stride, const Worker& w, const Epilogue* epilogue = nullptr) {
  if constexpr (kBatchInvariant) {
    return matmul_row_by_row<T, TOut>(x, rows, k, segments, out, out_stride, w, epilogue);
  } else if (rows <= kGemvMaxRows<T> && gemv_scratch<T>(rows, k) <= kGemvMaxStaged) {
    gemv<T, TOut>(x, rows, k, segments, out, out_stride, w, epilogue, 0);
  } else {
    gemm<T, TOut>(x, rows, k, segments, out, out_stride, w, epilogue);
  }
}

template <class T, class TOut = T>
void linear(const Args& a, const Worker& w) {
  if (a.ints[0] == 0) return;  // no rows
  matmul<T, TOut>(Rows<T>{a.tensor<const T>(0), a.ints[2], nullptr}, a.ints[0], a.ints[1],
                  Segments{a.tensors + 2, a.ints + 5, a.ints[4]}, a.tensor<TOut>(1), a.ints[3], w, a.epilogue);
}

}  // namespace llmopt
