// Stores the keys and values of new tokens in the paged cache.
//
// kv_write<T>
//   tensors: k [T, Hkv, D] T (strided), v [T, Hkv, Dv] T (strided), slot_mapping [T] int64,
//            k_cache [num_blocks, Hkv, block_size, D] T, v_cache [num_blocks, Hkv, block_size, Dv] T
//   ints:    T, Hkv, D, Dv, block_size, num_blocks, k token stride, k head stride, v token stride, v head stride
//   slot = block * block_size + offset; slot -1 skips the token; any other slot outside the cache is
//   kIndexOutOfRange, and nothing is written for that token.
//
// Workers share the (token, head) pairs, so that a single token is split by heads.
#pragma once

#include <cstring>

#include "abi.h"
#include "simd.h"

namespace llmopt {

template <class T>
void kv_write(const Args& a, const Worker& w) {
  const T* k = a.tensor<const T>(0);
  const T* v = a.tensor<const T>(1);
  const std::int64_t* slots = a.tensor<const std::int64_t>(2);
  T* k_cache = a.tensor<T>(3);
  T* v_cache = a.tensor<T>(4);
  const std::int64_t tokens = a.ints[0], heads = a.ints[1], k_dim = a.ints[2], v_dim = a.ints[3];
  const std::int64_t block_size = a.ints[4], num_blocks = a.ints[5];
  const Range mine = share(w, tokens * heads);
  for (std::int64_t item = mine.begin; item < mine.end; ++item) {
    const std::int64_t token = item / heads, head = item % heads, slot = slots[token];
    if (slot == -1) continue;
    if (slot < 0 || slot >= num_blocks * block_size) {
      w.fail(kIndexOutOfRange);
      continue;
    }
    const std::int64_t row = (slot / block_size * heads + head) * block_size + slot % block_size;
    std::memcpy(k_cache + row * k_dim, k + token * a.ints[6] + head * a.ints[7],
                sizeof(T) * static_cast<std::size_t>(k_dim));
    std::memcpy(v_cache + row * v_dim, v + token * a.ints[8] + head * a.ints[9],
                sizeof(T) * static_cast<std::size_t>(v_dim));
  }
}

}  // namespace llmopt
