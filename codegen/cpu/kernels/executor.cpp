// Runs one step: evaluates the symbolic sizes, resolves every operand to an address, and lets a team of workers go
// through the list of kernel calls. Nothing here allocates; all memory comes from the caller.
#include <ctime>

#include "abi.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace llmopt {

void Barrier::pause(int spins) {
  if (spins < 20000) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
    return;
#elif defined(__aarch64__)
    asm volatile("yield");
    return;
#endif
  }
#if defined(__linux__)
  sched_yield();
#endif
}

// Postfix program over int64: one word an instruction, operands inline.
enum Opcode : std::int64_t { kPush = 0, kSymbol, kAdd, kMul, kFloorDiv, kMod, kMin, kMax, kEnd };

static std::int64_t evaluate(const std::int64_t* code, const std::int64_t* symbols) {
  std::int64_t stack[32];
  int top = -1;
  for (;;) {
    const std::int64_t op = *code++;
    if (op == kEnd) return stack[0];
    if (op == kPush) {
      stack[++top] = *code++;
      continue;
    }
    if (op == kSymbol) {
      stack[++top] = symbols[*code++];
      continue;
    }
    const std::int64_t b = stack[top--], a = stack[top];
    const std::int64_t quotient = op == kFloorDiv || op == kMod ? a / b - (a % b != 0 && (a < 0) != (b < 0)) : 0;
    switch (op) {
      case kAdd: stack[top] = a + b; break;
      case kMul: stack[top] = a * b; break;
      case kFloorDiv: stack[top] = quotient; break;
      case kMod: stack[top] = a - quotient * b; break;
      case kMin: stack[top] = a < b ? a : b; break;
      default: stack[top] = a > b ? a : b; break;
    }
  }
}

struct TensorRef {
  std::int64_t base;    // index into the bases of the run; -1 for an absent operand
  std::int64_t offset;  // index of the expression that gives the byte offset
};

struct Call {
  KernelFn kernel;
  std::int64_t tensors, ints, floats;  // where its operands begin in the flat lists
  std::int64_t sync_after;             // whether a later call may depend on what this one wrote
};

struct Plan {
  std::int64_t num_expressions, num_tensors, num_ints, num_calls;
  const std::int64_t* code;    // all expressions, one after the other
  const std::int64_t* starts;  // [num_expressions] where each begins in `code`
  const TensorRef* tensors;    // [num_tensors]
  const std::int64_t* ints;    // [num_ints] indices of expressions
  const double* floats;
  const Call* calls;
  // Working memory of a run, one set a plan: a plan is run by one caller at a time.
  std::int64_t* values;    // [num_expressions]
  void** addresses;        // [num_tensors]
  std::int64_t* int_args;  // [num_ints]
  double* seconds;         // [num_calls] time of each call as worker 0 saw it, or null
  char* scratch;           // kScratchBytes for each thread
};

// What a run is given, in one place: the caller passes its address, and changes what differs from run to run.
struct Run {
  const Plan* plan;
  char* const* bases;
  const std::int64_t* symbols;
  // GOMP_parallel and omp_get_num_threads of the OpenMP runtime that is already in the process, so that no second pool
  // of threads competes with it.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*num_threads)();
  std::int64_t threads;
};

struct Team {
  const Plan* plan;
  int (*num_threads)();  // how many the OpenMP runtime really gave, or null for one
  Barrier barrier;
  int failure = kOk;  // these three are read and written atomically
  int failed_call = -1;
  int next_index = 0;
};

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

static void work(void* raw) {
  Team& team = *static_cast<Team*>(raw);
  const Plan& plan = *team.plan;
  const int index = __atomic_fetch_add(&team.next_index, 1, __ATOMIC_RELAXED);
  const int count = team.num_threads ? team.num_threads() : 1;
  const Worker worker{index, count, plan.scratch + kScratchBytes * static_cast<std::size_t>(index), &team.barrier,
                      &team.failure};
  const bool timed = plan.seconds && index == 0;
  double before = timed ? now() : 0.0;
  for (std::int64_t i = 0; i < plan.num_calls; ++i) {
    const Call& call = plan.calls[i];
    const Args args{plan.addresses + call.tensors, plan.int_args + call.ints, plan.floats + call.floats, nullptr};
    call.kernel(args, worker);
    if (call.sync_after) worker.sync();
    if (__atomic_load_n(&team.failure, __ATOMIC_RELAXED) != kOk) {
      int none = -1;
      __atomic_compare_exchange_n(&team.failed_call, &none, static_cast<int>(i), false, __ATOMIC_RELAXED,
                                  __ATOMIC_RELAXED);
    }
    if (timed) {
      const double after = now();
      plan.seconds[i] += after - before;
      before = after;
    }
  }
}

}  // namespace llmopt

// Returns 0, or failure + 256 * call.
extern "C" __attribute__((visibility("default"))) std::int64_t llmopt_run(const llmopt::Run* run) {
  using namespace llmopt;
  const Plan* plan = run->plan;
  for (std::int64_t i = 0; i < plan->num_expressions; ++i)
    plan->values[i] = evaluate(plan->code + plan->starts[i], run->symbols);
  for (std::int64_t i = 0; i < plan->num_tensors; ++i) {
    const TensorRef& ref = plan->tensors[i];
    plan->addresses[i] = ref.base < 0 ? nullptr : run->bases[ref.base] + plan->values[ref.offset];
  }
  for (std::int64_t i = 0; i < plan->num_ints; ++i) plan->int_args[i] = plan->values[plan->ints[i]];

  Team team;
  team.plan = plan;
  team.num_threads = run->threads > 1 ? run->num_threads : nullptr;
  if (run->threads == 1) {
    work(&team);
  } else {
    run->parallel(work, &team, static_cast<unsigned>(run->threads), 0);
  }
  return team.failure == kOk ? 0 : team.failure + 256 * static_cast<std::int64_t>(team.failed_call);
}
