// Rotary position embedding (Su et al., arXiv:2104.09864).
//
// rope<T, TC, Interleaved>
//   tensors: x [tokens, heads, head_dim] T (strided), cos [tokens, R] TC, sin [tokens, R] TC,
//            out [tokens, heads, head_dim] T (strided, may be x)
//   ints:    tokens, heads, head_dim, rotary_dim R (even), x token stride, x head stride, out token stride,
//            out head stride, cos token stride (also that of sin), rows P of cos and sin (tokens is a multiple of P:
//            the sequences of a batch share one table, token t reads row t % P)
//   out = x * cos + rotate(x) * sin over the first R elements, the others copied. rotate pairs element i with i + R/2
//   (GPT-NeoX, Llama), or, Interleaved, 2i with 2i + 1 (GPT-J). cos and sin hold both entries of a pair, as
//   transformers makes them. Computed in float and rounded once.
//
// Workers share the (token, head) pairs, so that a single token is split by heads.
#pragma once

#include "abi.h"
#include "rows.h"

namespace llmopt {

// Lane i of the result is lane i ^ 1 of v.
LLMOPT_INLINE vf swap_pairs(vf v) {
  vf swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ 1];
  return swapped;
}

template <class T, class TC, bool Interleaved>
LLMOPT_INLINE void rotate_head(const T* x, const TC* cos, const TC* sin, T* out, std::int64_t rotary_dim) {
  if (Interleaved) {
    vf sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = i % 2 ? 1.0f : -1.0f;
    for_vectors(0, rotary_dim, [&](std::int64_t i, auto access) {
      const vf v = access.load(x + i);
      access.store(out + i, v * access.load(cos + i) + swap_pairs(v) * sign * access.load(sin + i));
    });
    return;
  }
  const std::int64_t half = rotary_dim / 2;
  for_vectors(0, half, [&](std::int64_t i, auto access) {
    const vf first = access.load(x + i), second = access.load(x + half + i);
    const vf low = first * access.load(cos + i) - second * access.load(sin + i);
    const vf high = second * access.load(cos + half + i) + first * access.load(sin + half + i);
    access.store(out + i, low);
    access.store(out + half + i, high);
  });
}

template <class T, class TC, bool Interleaved>
void rope(const Args& a, const Worker& w) {
  const T* x = a.tensor<const T>(0);
  const TC* cos = a.tensor<const TC>(1);
  const TC* sin = a.tensor<const TC>(2);
  T* out = a.tensor<T>(3);
  const std::int64_t tokens = a.ints[0], heads = a.ints[1], head_dim = a.ints[2], rotary_dim = a.ints[3];
  const Range mine = share(w, tokens * heads);
  for (std::int64_t item = mine.begin; item < mine.end; ++item) {
    const std::int64_t token = item / heads, head = item % heads;
    const T* from = x + token * a.ints[4] + head * a.ints[5];
    T* to = out + token * a.ints[6] + head * a.ints[7];
    const std::int64_t angle = token % a.ints[9] * a.ints[8];
    rotate_head<T, TC, Interleaved>(from, cos + angle, sin + angle, to, rotary_dim);
    if (from != to && rotary_dim < head_dim)
      std::memcpy(to + rotary_dim, from + rotary_dim, sizeof(T) * static_cast<std::size_t>(head_dim - rotary_dim));
  }
}

}  // namespace llmopt
