// Stores the keys and values of new tokens in the paged cache.
//
// kv_write<T, S = T>
//   tensors: k [T, Hkv, D] T (strided), v [T, Hkv, Dv] T (strided), slot_mapping [T] int64,
//            k_cache [num_blocks, Hkv, block_size, D] T, v_cache [num_blocks, Hkv, block_size, Dv] T; or, S a format of
//            kv_formats.h, pages of block_size * row_bytes<S> bytes a head
//   ints:    T, Hkv, D, Dv, block_size, num_blocks, k token stride, k head stride, v token stride, v head stride
//   slot = block * block_size + offset; slot -1 skips the token; any other slot outside the cache is
//   kIndexOutOfRange, and nothing is written for that token.
//
// Workers share the (token, head) pairs, so that a single token is split by heads.
#pragma once

#include <cstring>

#include "abi.h"
#include "kv_formats.h"

namespace llmopt {

// Stores one row as row `offset` of a head's page.
template <class T, class S>
LLMOPT_INLINE void store_row(const T* row, std::int64_t dim, char* page, std::int64_t block_size, std::int64_t offset) {
  const std::int64_t bytes = code_bytes<S>(dim);
  char* codes = page + offset * bytes;
  if constexpr (kQuantized<S>) {
    alignas(64) float wide[kMaxHeadDim];
    for_vectors(0, dim, [&](std::int64_t i, auto access) { access.store(wide + i, access.load(row + i)); });
    quantize_row(wide, dim, reinterpret_cast<S*>(codes), page + block_size * bytes + offset * kParameterBytes<S>);
  } else {
    std::memcpy(codes, row, static_cast<std::size_t>(bytes));
  }
}

template <class T, class S = T>
void kv_write(const Args& a, const Worker& w) {
  const T* k = a.tensor<const T>(0);
  const T* v = a.tensor<const T>(1);
  const std::int64_t* slots = a.tensor<const std::int64_t>(2);
  char* k_cache = a.tensor<char>(3);
  char* v_cache = a.tensor<char>(4);
  const std::int64_t tokens = a.ints[0], heads = a.ints[1], k_dim = a.ints[2], v_dim = a.ints[3];
  const std::int64_t block_size = a.ints[4], num_blocks = a.ints[5];
  if (kQuantized<S> && (k_dim > kMaxHeadDim || v_dim > kMaxHeadDim)) return w.fail(kUnsupportedSize);
  const Range mine = share(w, tokens * heads);
  for (std::int64_t item = mine.begin; item < mine.end; ++item) {
    const std::int64_t token = item / heads, head = item % heads, slot = slots[token];
    if (slot == -1) continue;
    if (slot < 0 || slot >= num_blocks * block_size) {
      w.fail(kIndexOutOfRange);
      continue;
    }
    const std::int64_t page = (slot / block_size * heads + head) * block_size, offset = slot % block_size;
    store_row<T, S>(k + token * a.ints[6] + head * a.ints[7], k_dim, k_cache + page * row_bytes<S>(k_dim), block_size,
                    offset);
    store_row<T, S>(v + token * a.ints[8] + head * a.ints[9], v_dim, v_cache + page * row_bytes<S>(v_dim), block_size,
                    offset);
  }
}

}  // namespace llmopt
