// The C library's mathematical functions for float and double, as the compilers know them. (<cmath> declares the same and
// much else: reading it takes as long as compiling a whole loop.)
#pragma once

namespace llmopt {
namespace libm {

#define LLMOPT_UNARY(name)                                        \
  inline float name(float x) { return __builtin_##name##f(x); }   \
  inline double name(double x) { return __builtin_##name(x); }
#define LLMOPT_BINARY(name)                                                   \
  inline float name(float x, float y) { return __builtin_##name##f(x, y); }   \
  inline double name(double x, double y) { return __builtin_##name(x, y); }

LLMOPT_UNARY(ceil)
LLMOPT_UNARY(cos)
LLMOPT_UNARY(erf)
LLMOPT_UNARY(exp)
LLMOPT_UNARY(exp2)
LLMOPT_UNARY(expm1)
LLMOPT_UNARY(floor)
LLMOPT_UNARY(log)
LLMOPT_UNARY(log1p)
LLMOPT_UNARY(log2)
LLMOPT_UNARY(nearbyint)
LLMOPT_UNARY(sin)
LLMOPT_UNARY(sqrt)
LLMOPT_UNARY(tan)
LLMOPT_UNARY(tanh)
LLMOPT_UNARY(trunc)
LLMOPT_BINARY(copysign)
LLMOPT_BINARY(fmod)
LLMOPT_BINARY(pow)

#undef LLMOPT_UNARY
#undef LLMOPT_BINARY

}  // namespace libm
}  // namespace llmopt
