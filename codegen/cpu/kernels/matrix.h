// What the matrix kernels share: where rows and weights come from, and the dot product of bf16 pairs.
#pragma once

#include <type_traits>

#include "abi.h"
#include "shuffle.h"

namespace llmopt {

// Whether products of T are taken two at a time by the bf16 dot instruction. A pair of neighbours along K then travels
// as one 32-bit lane, so packing and transposing need no conversion at all.
template <class T>
constexpr bool kPairDot = LLMOPT_BF16_DOT != 0 && std::is_same<T, bf16>::value;

// The left operand: row i is base + i * stride, or base + index[i] * stride where rows are gathered.
template <class T>
struct Rows {
  const T* base;
  std::int64_t stride;
  const std::int32_t* index;

  const T* operator[](std::int64_t i) const { return base + (index ? index[i] : i) * stride; }
};

// The right operand: matrices [size(i), K] that stand for one matrix, one below the other.
struct Segments {
  void* const* operands;  // weight 0, bias 0 or null, weight 1, ...
  const std::int64_t* sizes;
  std::int64_t count;

  template <class T>
  const T* weight(std::int64_t i) const {
    return static_cast<const T*>(operands[2 * i]);
  }
  template <class T>
  const T* bias(std::int64_t i) const {
    return static_cast<const T*>(operands[2 * i + 1]);
  }
};

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// acc[i] + a[2i+1] * b[2i+1] + a[2i] * b[2i], the bf16 elements of a lane taken in the instruction's order.
LLMOPT_INLINE vf dot_pairs(vf acc, vu a, vu b) {
#if LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  return x86::dot_bf16(acc, a, b);
#else
  acc = fma(bit_cast<vf>(a & 0xffff0000u), bit_cast<vf>(b & 0xffff0000u), acc);
  return fma(bit_cast<vf>(a << 16), bit_cast<vf>(b << 16), acc);
#endif
}

LLMOPT_INLINE vu load_bits(const void* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// The first n of 2 * kLanes half-width elements, the others zero.
template <class T>
LLMOPT_INLINE vu load_bits_partial(const T* p, std::int64_t n) {
  static_assert(sizeof(T) == 2, "two elements a lane");
  vu v{};
  std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(T));
  return v;
}

// The sums of four vectors. The order of the additions is the same for each of them.
LLMOPT_INLINE void reduce_add4(const vf (&v)[4], float (&sums)[4]) {
  const vf ab = shuffle<InterleaveSingles<0>>(v[0], v[1]) + shuffle<InterleaveSingles<1>>(v[0], v[1]);
  const vf cd = shuffle<InterleaveSingles<0>>(v[2], v[3]) + shuffle<InterleaveSingles<1>>(v[2], v[3]);
  const vf abcd = shuffle<InterleavePairs<0>>(ab, cd) + shuffle<InterleavePairs<1>>(ab, cd);
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[kLanes / 4];
  std::memcpy(parts, &abcd, sizeof abcd);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  std::memcpy(sums, parts, sizeof sums);
}

}  // namespace llmopt
