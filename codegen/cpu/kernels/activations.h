// Activation functors, chosen by type so that a kernel is instantiated once per function. Each takes and returns a
// float or a vector of floats.
#pragma once

#include "simd.h"

namespace llmopt {

// x * sigmoid(x) (Swish; Elfwing et al., arXiv:1702.03118).
struct Silu {
  template <class V>
  LLMOPT_INLINE V operator()(V x) const {
    return silu(x);
  }
};

// x * Phi(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415).
struct GeluErf {
  template <class V>
  LLMOPT_INLINE V operator()(V x) const {
    return gelu_erf(x);
  }
};

// The same paper's tanh approximation.
struct GeluTanh {
  template <class V>
  LLMOPT_INLINE V operator()(V x) const {
    return gelu_tanh(x);
  }
};

// max(x, 0); NaN stays NaN.
struct Relu {
  template <class V>
  LLMOPT_INLINE V operator()(V x) const {
    return x < 0.0f ? V{} : x;
  }
};

}  // namespace llmopt
