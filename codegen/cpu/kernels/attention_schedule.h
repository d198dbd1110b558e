// Spreads the attention of a batch over the workers.
//
// The work is a list of items: a chunk of the context for a group of few rows, a tile of rows for any other. Every
// worker walks the whole list, adding up estimated costs, and takes the items whose midpoint falls into its share:
// contiguous runs of items, the same on every run, with nothing shared but the operands. A group whose chunks fall to
// several workers is merged by the one that has its first chunk, from the others' scratch.
#pragma once

#include "attention_rows.h"
#include "attention_tiles.h"
#include "invariance.h"

namespace llmopt {

// A worker's scratch: what one item needs, then the results of chunks that another worker merges.
constexpr std::size_t kItemBytes =
    (sizeof(TileScratch) > sizeof(RowScratch) ? sizeof(TileScratch) : sizeof(RowScratch)) / 64 * 64 + 64;
static_assert(kItemBytes + (std::size_t{1} << 20) <= kScratchBytes, "room for the results of chunks");

// Floats that the result of one chunk takes: maximum, sum and values of each row.
template <class Group>
std::int64_t chunk_result_size(const Group& g) {
  return g.num_rows() * (2 + round_up(g.v_dim, kLanes));
}
LLMOPT_INLINE float* chunk_results(const Worker& w, int worker) {
  return reinterpret_cast<float*>(w.scratch_of(worker) + kItemBytes);
}

template <class Group>
bool is_direct(const Group& g) {
  return g.num_rows() <= kDirectRows;
}

// Estimated costs, in multiply-adds of one vector column. A key costs about as much to read and convert as four rows
// cost to multiply with it; an item has some overhead of its own.
template <class Group>
std::int64_t chunk_cost(const Group& g, std::int64_t chunk) {
  const std::int64_t begin = std::max(g.seen_begin(0), chunk * kChunkKeys);
  const std::int64_t end = std::min(g.seen_end(g.queries - 1), (chunk + 1) * kChunkKeys);
  return (end - begin + 16) * (g.num_rows() + 4);
}
template <class Group>
std::int64_t tile_cost(const Group& g, std::int64_t tile) {
  const std::int64_t last = std::min(tile + kTileRows, g.num_rows()) - 1;
  const std::int64_t first_query = tile / g.heads, last_query = last / g.heads;
  const std::int64_t keys = g.seen_end(last_query) - (g.seen_begin(first_query) + g.seen_begin(last_query)) / 2;
  return (std::max<std::int64_t>(keys, 0) + 16) * (last - tile + 1 + 4);
}
template <class Group>
std::int64_t group_cost(const Group& g) {
  std::int64_t cost = 16;
  if (is_direct(g)) {
    const Range chunks = seen_chunks(g);
    for (std::int64_t c = chunks.begin; c < chunks.end; ++c) cost += chunk_cost(g, c);
  } else {
    for (std::int64_t t = 0; t < g.num_rows(); t += kTileRows) cost += tile_cost(g, t);
  }
  return cost;
}

// Who does the item that begins where `done` of `total` is already given out.
struct Shares {
  std::int64_t total;
  int workers;
  int owner(std::int64_t done, std::int64_t cost) const {
    return static_cast<int>((2 * done + cost) * workers / (2 * total));
  }
};

// The owners of the chunks of one group, in order. A group with more results than the scratch holds goes to one worker.
template <class Group>
struct ChunkOwners {
  const Group& g;
  Shares shares;
  std::int64_t done;  // before the next chunk
  bool whole;
  int whole_owner;

  ChunkOwners(const Group& group, Shares all, std::int64_t done_before)
      : g(group), shares(all), done(done_before) {
    const Range chunks = seen_chunks(g);
    const std::int64_t bytes = (chunks.end - chunks.begin) * chunk_result_size(g) * std::int64_t{sizeof(float)};
    whole = chunks.end == chunks.begin || bytes > static_cast<std::int64_t>(kScratchBytes - kItemBytes);
    whole_owner = shares.owner(done, group_cost(g));
  }
  int next(std::int64_t chunk) {
    if (whole) return whole_owner;
    const std::int64_t cost = chunk_cost(g, chunk);
    const int owner = shares.owner(done, cost);
    done += cost;
    return owner;
  }
};

// This worker's chunks of a group of few rows. Returns whether other workers have chunks of it too; `unmerged` is set
// where this worker has the first one.
template <class Group>
bool attend_chunks(const Group& g, const Worker& w, ChunkOwners<Group> owners, bool& unmerged) {
  auto& s = *reinterpret_cast<RowScratch*>(w.scratch);
  const int rows = static_cast<int>(g.num_rows());
  const std::int64_t stride = round_up(g.v_dim, kLanes);
  const Range chunks = seen_chunks(g);
  if (chunks.begin == chunks.end) {
    s.total.clear(rows, stride);
    if (owners.whole_owner == w.index) finish_rows(g, s.total);
    return false;
  }
  int first_owner = -1, last_owner = -1;
  bool loaded = false;
  float* result = chunk_results(w, w.index);
  for (std::int64_t c = chunks.begin; c < chunks.end; ++c) {
    last_owner = owners.next(c);
    if (first_owner < 0) first_owner = last_owner;
    if (last_owner != w.index) continue;
    if (!loaded) {
      load_queries(g, s);
      s.total.clear(rows, stride);
      loaded = true;
    }
    attend_chunk(g, s, c);
    if (first_owner == w.index) {
      s.total.merge(s.chunk.maximum, s.chunk.sum, s.chunk.values, rows, stride);
    } else {
      std::copy(s.chunk.maximum, s.chunk.maximum + rows, result);
      std::copy(s.chunk.sum, s.chunk.sum + rows, result + rows);
      std::copy(s.chunk.values, s.chunk.values + rows * stride, result + 2 * rows);
      result += chunk_result_size(g);
    }
  }
  if (first_owner == w.index) {
    if (last_owner == w.index) {
      finish_rows(g, s.total);
    } else {
      unmerged = true;
    }
  }
  return first_owner != last_owner;
}

// Merges, in order, the chunks that other workers attended, and stores the rows.
template <class Group>
void merge_chunks(const Group& g, const Worker& w, ChunkOwners<Group> owners) {
  RowState& total = reinterpret_cast<RowScratch*>(w.scratch)->total;
  const int rows = static_cast<int>(g.num_rows());
  const std::int64_t stride = round_up(g.v_dim, kLanes);
  const Range chunks = seen_chunks(g);
  int previous = w.index;
  const float* result = nullptr;
  for (std::int64_t c = chunks.begin; c < chunks.end; ++c) {
    const int owner = owners.next(c);
    if (owner == w.index) continue;
    if (owner != previous) result = chunk_results(w, owner);
    previous = owner;
    total.merge(result, result + rows, result + 2 * rows, rows, stride);
    result += chunk_result_size(g);
  }
  finish_rows(g, total);
}

// A group is attended whole, or, where results must not depend on how many queries there are, query by query: few rows
// add in another order than many. (Groups with more heads than that are tiles for any number of queries, and the rows of
// tiles are independent.)
template <class Group>
std::int64_t num_parts(const Group& g) {
  return kBatchInvariant && g.heads <= kDirectRows ? g.queries : g.queries > 0;
}
template <class Group>
Group part_of(Group g, std::int64_t part) {
  if (!kBatchInvariant || g.heads > kDirectRows) return g;
  g.q += part * g.q_token;
  g.out += part * g.out_token;
  g.position += part;
  g.queries = 1;
  if constexpr (Group::kMaskable)
    if (g.mask.base) g.mask.base += part * g.mask.query;
  return g;
}

// make(sequence, kv head) gives a group; groups without queries are skipped.
template <class Make>
void attend_batch(std::int64_t sequences, std::int64_t kv_heads, Make make, const Worker& w) {
  Shares shares{0, w.count};
  for (std::int64_t b = 0; b < sequences; ++b) {
    const auto g = make(b, 0);  // the heads of a sequence cost the same
    for (std::int64_t part = 0; part < num_parts(g); ++part) shares.total += group_cost(part_of(g, part)) * kv_heads;
  }
  std::int64_t done = 0, unmerged_done = 0, unmerged_sequence = -1, unmerged_head = 0, unmerged_part = 0;
  bool shared = false;
  for (std::int64_t b = 0; b < sequences; ++b) {
    for (std::int64_t h = 0; h < kv_heads; ++h) {
      const auto whole = make(b, h);
      for (std::int64_t part = 0; part < num_parts(whole); ++part) {
        const auto g = part_of(whole, part);
        const std::int64_t group_done = done;
        done += group_cost(g);
        if (is_direct(g)) {
          bool unmerged = false;
          shared |= attend_chunks(g, w, {g, shares, group_done}, unmerged);
          if (unmerged) {
            unmerged_sequence = b;
            unmerged_head = h;
            unmerged_part = part;
            unmerged_done = group_done;
          }
          continue;
        }
        std::int64_t tile_done = group_done;
        for (std::int64_t t = 0; t < g.num_rows(); t += kTileRows) {
          const std::int64_t cost = tile_cost(g, t);
          if (shares.owner(tile_done, cost) == w.index)
            attend_tile(g, t, static_cast<int>(std::min<std::int64_t>(g.num_rows() - t, kTileRows)), w.scratch);
          tile_done += cost;
        }
      }
    }
  }
  if (!shared) return;  // the same for every worker
  w.sync();
  if (unmerged_sequence >= 0) {
    const auto g = part_of(make(unmerged_sequence, unmerged_head), unmerged_part);
    merge_chunks(g, w, {g, shares, unmerged_done});
  }
  w.sync();  // nobody may reuse a scratch that is still read
}

}  // namespace llmopt
