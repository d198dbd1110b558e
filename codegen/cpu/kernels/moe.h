// moe<T, TW, Act>: a mixture of experts (Shazeer et al., arXiv:1701.06538) of gated feed-forward layers.
//
// tensors: x [R, H] of T, expert_ids [R, k] int64, expert_weights [R, k] of TW, gate_up [E, 2I, H] of T (the rows of the
//          gate before those of the up projection), down [E, H, I] of T, out [R, H] of T, workspace (bytes)
// ints:    R, H, I, E, k, row stride of x, row stride of out (elements)
//
// out[r] = sum_j weight[r, j] * down[e_j] @ (act(gate) * up) with [gate; up] = gate_up[e_j] @ x[r]. Every step is rounded
// to T where a layer-by-layer evaluation rounds it: gate and up, act(gate), its product with up, the result of down and
// that times its weight. The sum over j is taken in float and rounded once. Act: a functor of activations.h.
//
// The workspace takes 128 + 4 * (2 * R * k + E + 1) + R * k * (2 * I + H) * sizeof(T) bytes, any alignment. An id outside
// [0, E) fails with kIndexOutOfRange and leaves out as it was.
//
// The R * k pairs of a row and one of its experts ("slots") are ordered by expert, so that each expert that was hit
// multiplies all its rows at once and is read once; the others are not touched. All workers work on one expert together,
// each on its share of the columns, so an uneven choice of experts leaves nobody idle.
#pragma once

#include "activations.h"
#include "linear.h"
#include "rows.h"

namespace llmopt {

// Where the parts of the workspace lie. After the sort, expert e owns the slots [starts[e], starts[e + 1]) of rows,
// gate_up and result.
template <class T>
struct MoeSpace {
  std::int32_t* starts;     // [E + 1]; starts[E] is negative where an id was refused
  std::int32_t* rows;       // [slots] the row of x that each ordered slot belongs to
  std::int32_t* positions;  // [R, k] where the slot (r, j) went
  T* gate_up;               // [slots, 2I]; the first half becomes act(gate) * up
  T* result;                // [slots, H]

  MoeSpace(char* base, std::int64_t slots, std::int64_t experts, std::int64_t intermediate) {
    const auto align = [](char* p) {
      return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(p) + 63) & ~std::uintptr_t{63});
    };
    starts = reinterpret_cast<std::int32_t*>(align(base));
    rows = starts + experts + 1;
    positions = rows + slots;
    gate_up = reinterpret_cast<T*>(align(reinterpret_cast<char*>(positions + slots)));
    result = gate_up + slots * 2 * intermediate;
  }
};

// Counting sort of the slots by expert, stable, so that the order is the same however many workers there are.
template <class T>
bool sort_slots(const std::int64_t* ids, std::int64_t slots, std::int64_t experts, std::int64_t k,
                const MoeSpace<T>& space) {
  for (std::int64_t e = 0; e <= experts; ++e) space.starts[e] = 0;
  for (std::int64_t s = 0; s < slots; ++s) {
    if (ids[s] < 0 || ids[s] >= experts) {
      space.starts[experts] = -1;
      return false;
    }
    ++space.starts[ids[s] + 1];
  }
  for (std::int64_t e = 0; e < experts; ++e) space.starts[e + 1] += space.starts[e];
  // Each start moves to its end while slots are placed, which is the start of the next expert.
  for (std::int64_t s = 0; s < slots; ++s) {
    const std::int32_t position = space.starts[ids[s]]++;
    space.positions[s] = position;
    space.rows[position] = static_cast<std::int32_t>(s / k);
  }
  for (std::int64_t e = experts; e > 0; --e) space.starts[e] = space.starts[e - 1];
  space.starts[0] = 0;
  return true;
}

// body(row, begin, end) for this worker's share of `rows` rows of `columns` columns, in pieces of at most 512 columns.
template <class Body>
inline void share_pieces(const Worker& w, std::int64_t rows, std::int64_t columns, Body body) {
  constexpr std::int64_t kPiece = 512;
  const std::int64_t pieces = (columns + kPiece - 1) / kPiece;
  const Range mine = share(w, rows * pieces);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    const std::int64_t begin = i % pieces * kPiece;
    body(i / pieces, begin, begin + kPiece < columns ? begin + kPiece : columns);
  }
}

template <class T, class TW, class Act>
void moe(const Args& a, const Worker& w) {
  const std::int64_t rows = a.ints[0], hidden = a.ints[1], inner = a.ints[2], experts = a.ints[3], k = a.ints[4];
  const std::int64_t slots = rows * k;
  const TW* weights = a.tensor<const TW>(2);
  const MoeSpace<T> space(a.tensor<char>(6), slots, experts, inner);

  if (w.index == 0 && !sort_slots(a.tensor<const std::int64_t>(1), slots, experts, k, space)) w.fail(kIndexOutOfRange);
  w.sync();
  if (space.starts[experts] < 0) return;

  // One projection of every expert that was hit; nobody waits between experts, for their outputs are apart.
  const auto project = [&](const T* matrices, std::int64_t n, std::int64_t depth, auto rows_of, T* to) {
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t first = space.starts[e], count = space.starts[e + 1] - first;
      if (count == 0) continue;
      void* const operands[2] = {const_cast<T*>(matrices + e * n * depth), nullptr};
      matmul<T, T>(rows_of(first), count, depth, Segments{operands, &n, 1}, to + first * n, n, w);
    }
    w.sync();
  };
  project(
      a.tensor<const T>(3), 2 * inner, hidden,
      [&](std::int64_t first) { return Rows<T>{a.tensor<const T>(0), a.ints[5], space.rows + first}; }, space.gate_up);

  share_pieces(w, slots, inner, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
    T* gate = space.gate_up + slot * 2 * inner;
    const T* up = gate + inner;
    for_vectors(begin, end, [&](std::int64_t i, auto access) {
      access.store(gate + i, rounded<T>(Act{}(access.load(gate + i))) * access.load(up + i));
    });
  });
  w.sync();

  project(
      a.tensor<const T>(4), hidden, inner,
      [&](std::int64_t first) { return Rows<T>{space.gate_up + first * 2 * inner, 2 * inner, nullptr}; },
      space.result);

  share_pieces(w, rows, hidden, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    T* out = a.tensor<T>(5) + row * a.ints[6];
    for_vectors(begin, end, [&](std::int64_t i, auto access) {
      vf sum = zero();
      for (std::int64_t j = 0; j < k; ++j) {
        const T* result = space.result + space.positions[row * k + j] * hidden;
        sum += rounded<T>(access.load(result + i) * splat(to_float(weights[row * k + j])));
      }
      access.store(out + i, sum);
    });
  });
}

}  // namespace llmopt
