// The contract between the step executor and every CPU kernel.
//
// A step is a list of kernel calls. One team of workers runs the whole list inside one OpenMP parallel region: each
// worker calls every kernel in order, takes its own share of the work by (index, count), and meets the others at a
// spin barrier between calls. A kernel therefore never starts threads, never allocates and never locks.
//
// Every kernel is compiled on its own, so what all of them include is light (atomic operations are the compilers'
// builtins): reading <algorithm> or <cmath> takes longer than compiling a small kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmopt {

// Private memory of one worker, enough for the packed panels of the largest template.
constexpr std::size_t kScratchBytes = std::size_t{4} << 20;

// Why a kernel gave up; the executor reports the first one and the index of its call.
enum Failure : int { kOk = 0, kIndexOutOfRange = 1, kUnsupportedSize = 2 };

// Sense-reversing spin barrier. Yields nothing to the kernel scheduler for the first few microseconds, because the
// gaps between the calls of a decode step are that short; after that it lets an oversubscribed machine make progress.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == count) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; ++spins) pause(spins);
  }

 private:
  static void pause(int spins);  // executor.cpp
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// One thread's view of the team.
struct Worker {
  int index;
  int count;
  char* scratch;  // kScratchBytes, aligned to 64, private, undefined at entry
  Barrier* barrier;
  int* failure;  // shared by the team

  void sync() const { barrier->wait(count); }
  // Another worker's scratch; what it holds is defined only between two sync() of both.
  char* scratch_of(int worker) const { return scratch + (worker - index) * static_cast<std::ptrdiff_t>(kScratchBytes); }
  void fail(Failure why) const {
    int expected = kOk;
    __atomic_compare_exchange_n(failure, &expected, static_cast<int>(why), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
};

// A block of a product's results on its way out: entry (r, c) of the whole result, for r in [row, row + rows) and c in
// [column, column + columns), is values[(r - row) * stride + c - column], rounded to the product's storage type.
struct Block {
  std::int64_t row, rows, column, columns;
  const void* values;
  std::int64_t stride;
};

// What is computed from a product's results before anything is stored: `apply` is called once for every entry, by the
// worker that made it, and stores what it makes itself.
struct Epilogue {
  void (*apply)(const void* state, const Block& block);
  const void* state;
};

// Operands of one call, in the order that the kernel's header lists. A null tensor is an absent optional operand.
// `epilogue`: what the caller wants done with the results of a kernel that can have one, in place of storing them.
struct Args {
  void* const* tensors;
  const std::int64_t* ints;
  const double* floats;
  const Epilogue* epilogue;

  template <class T>
  T* tensor(int i) const {
    return static_cast<T*>(tensors[i]);
  }
};

using KernelFn = void (*)(const Args&, const Worker&);

// [begin, end) of `total` items for this worker, in whole multiples of `grain` and as even as that allows.
struct Range {
  std::int64_t begin, end;
};
inline Range share(const Worker& w, std::int64_t total, std::int64_t grain = 1) {
  const std::int64_t units = (total + grain - 1) / grain;
  const std::int64_t begin = units * w.index / w.count * grain;
  const std::int64_t end = units * (w.index + 1) / w.count * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

}  // namespace llmopt

// Defines the entry of one kernel instance: LLMOPT_KERNEL(name) { llmopt::linear<float>(args, worker); }
#define LLMOPT_KERNEL(name) \
  extern "C" __attribute__((visibility("default"))) void name(const llmopt::Args& args, const llmopt::Worker& worker)
