// Whether a row's result must not depend, to the bit, on what else is computed with it (LLMOPT_BATCH_INVARIANT).
//
// Kernels choose algorithms by the number of rows, and two algorithms that are both right add in different orders. Where
// this is set, a kernel takes for any number of rows the one whose order of additions suits a single row.
#pragma once

#ifndef LLMOPT_BATCH_INVARIANT
#define LLMOPT_BATCH_INVARIANT 0
#endif

namespace llmopt {

constexpr bool kBatchInvariant = LLMOPT_BATCH_INVARIANT != 0;

}  // namespace llmopt
