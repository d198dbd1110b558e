// What the printed fused loops (codegen/loops/print_cpp.py) stand on: the functions of the loop IR for one element and,
// where they work on float or bool, for a vector of elements; loads, stores, conversions and accumulators.
//
// V is float or vf. A condition is bool beside float and a vector of masks (0 or -1) beside vf.
#pragma once

#include <type_traits>

#include "abi.h"
#include "libm.h"
#include "simd.h"

namespace llmopt {
namespace loops {

typedef std::uint8_t vb __attribute__((vector_size(LLMOPT_VECTOR_BYTES / 4)));

template <class V>
using mask_of = std::conditional_t<std::is_same_v<V, vf>, vi, bool>;

// ---- indices ------------------------------------------------------------------------------------------------------

LLMOPT_INLINE std::int64_t index_min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
LLMOPT_INLINE std::int64_t index_max(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// ---- integers, without undefined behaviour ------------------------------------------------------------------------
// Sums and products wrap as PyTorch's do. A zero divisor, at which PyTorch raises, gives 0.

template <class T>
constexpr bool is_int = std::is_integral_v<T> && !std::is_same_v<T, bool>;

template <class T>
LLMOPT_INLINE T trunc_div_int(T a, T b) {
  if (b == 0) return T{0};
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(0 - static_cast<std::uint64_t>(a));
  }
  return static_cast<T>(a / b);
}
template <class T>
LLMOPT_INLINE T trunc_mod_int(T a, T b) {
  if (b == 0) return T{0};
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return T{0};
  }
  return static_cast<T>(a % b);
}
template <class T>
LLMOPT_INLINE T floor_div(T a, T b) {
  const T q = trunc_div_int(a, b), r = trunc_mod_int(a, b);
  return static_cast<T>(q - (r != 0 && (r < 0) != (b < 0)));
}
template <class T>
LLMOPT_INLINE T floor_mod(T a, T b) {
  const T r = trunc_mod_int(a, b);
  return static_cast<T>(r != 0 && (r < 0) != (b < 0) ? r + b : r);
}

// ---- broadcasting a scalar into the lanes -------------------------------------------------------------------------

template <class V>
LLMOPT_INLINE V up(float x) {
  return V{} + x;
}
template <class V>
LLMOPT_INLINE mask_of<V> up_mask(bool x) {
  if constexpr (std::is_same_v<V, vf>)
    return vi{} - static_cast<std::int32_t>(x);
  else
    return x;
}

// f on each lane; the compiler makes vector code of it where there is any (roots, roundings).
template <class V, class F>
LLMOPT_INLINE V each(V x, F f) {
  if constexpr (std::is_same_v<V, vf>) {
    V y;
    for (int i = 0; i < kLanes; ++i) y[i] = f(x[i]);
    return y;
  } else {
    return f(x);
  }
}
template <class V, class F>
LLMOPT_INLINE V each(V a, V b, F f) {
  if constexpr (std::is_same_v<V, vf>) {
    V y;
    for (int i = 0; i < kLanes; ++i) y[i] = f(a[i], b[i]);
    return y;
  } else {
    return f(a, b);
  }
}

// ---- functions of the IR ------------------------------------------------------------------------------------------

#define LLMOPT_LIBM(name, expression)                   \
  template <class V>                                    \
  LLMOPT_INLINE V f_##name(V a) {                       \
    return each(a, [](auto x) { return expression; });  \
  }
LLMOPT_LIBM(exp2, libm::exp2(x))
LLMOPT_LIBM(expm1, libm::expm1(x))
LLMOPT_LIBM(log, libm::log(x))
LLMOPT_LIBM(log2, libm::log2(x))
LLMOPT_LIBM(log1p, libm::log1p(x))
LLMOPT_LIBM(sqrt, libm::sqrt(x))
LLMOPT_LIBM(cos, libm::cos(x))
LLMOPT_LIBM(sin, libm::sin(x))
LLMOPT_LIBM(tan, libm::tan(x))
LLMOPT_LIBM(floor, libm::floor(x))
LLMOPT_LIBM(ceil, libm::ceil(x))
LLMOPT_LIBM(round, libm::nearbyint(x))  // half to even, as PyTorch
LLMOPT_LIBM(trunc, libm::trunc(x))
#undef LLMOPT_LIBM

template <class V>
LLMOPT_INLINE V f_rsqrt(V a) {
  return 1 / f_sqrt(a);
}
template <class V>
LLMOPT_INLINE V f_reciprocal(V a) {
  return 1 / a;
}

#define LLMOPT_SIMD(name, in_double)        \
  template <class V>                        \
  LLMOPT_INLINE V f_##name(V x) {           \
    if constexpr (std::is_same_v<V, double>) \
      return in_double;                     \
    else                                    \
      return llmopt::name(x);               \
  }
LLMOPT_SIMD(exp, libm::exp(x))
LLMOPT_SIMD(tanh, libm::tanh(x))
LLMOPT_SIMD(erf, libm::erf(x))
LLMOPT_SIMD(sigmoid, 1.0 / (1.0 + libm::exp(-x)))
LLMOPT_SIMD(silu, x / (1.0 + libm::exp(-x)))
LLMOPT_SIMD(gelu_erf, x * 0.5 * (1.0 + libm::erf(x * 0.70710678118654752)))
LLMOPT_SIMD(gelu_tanh, x * 0.5 * (1.0 + libm::tanh(0.79788456080286536 * (x + x * x * x * 0.044715))))
#undef LLMOPT_SIMD

template <class V>
LLMOPT_INLINE V f_neg(V a) {
  if constexpr (is_int<V>)
    return static_cast<V>(0 - static_cast<std::uint64_t>(a));
  else
    return -a;
}
template <class V>
LLMOPT_INLINE V f_abs(V a) {
  if constexpr (std::is_unsigned_v<V>)
    return a;
  else
    return a < 0 ? f_neg(a) : a;
}
template <class V>
LLMOPT_INLINE V f_sign(V a) {
  if constexpr (std::is_same_v<V, bool>)
    return a;
  else if constexpr (std::is_same_v<V, vf>)
    return a > 0 ? V{} + 1.0f : (a < 0 ? V{} - 1.0f : V{});
  else
    return static_cast<V>(a > 0 ? 1 : (a < 0 ? -1 : 0));
}
template <class V>
LLMOPT_INLINE V f_relu(V a) {
  return a < 0 ? V{} : a;  // NaN stays NaN
}

#define LLMOPT_WRAPPING(name, op)                                                              \
  template <class V>                                                                           \
  LLMOPT_INLINE V f_##name(V a, V b) {                                                         \
    if constexpr (is_int<V>)                                                                   \
      return static_cast<V>(static_cast<std::uint64_t>(a) op static_cast<std::uint64_t>(b));   \
    else                                                                                       \
      return a op b;                                                                           \
  }
LLMOPT_WRAPPING(add, +)
LLMOPT_WRAPPING(sub, -)
LLMOPT_WRAPPING(mul, *)
#undef LLMOPT_WRAPPING

template <class V>
LLMOPT_INLINE V f_div(V a, V b) {
  if constexpr (is_int<V>)
    return trunc_div_int(a, b);
  else
    return a / b;
}
template <class V>
LLMOPT_INLINE V f_trunc_div(V a, V b) {
  if constexpr (is_int<V>)
    return trunc_div_int(a, b);
  else
    return f_trunc(a / b);
}
template <class V>
LLMOPT_INLINE V f_fmod(V a, V b) {
  if constexpr (is_int<V>)
    return trunc_mod_int(a, b);
  else
    return each(a, b, [](auto x, auto y) { return libm::fmod(x, y); });
}
template <class V>
LLMOPT_INLINE V f_remainder(V a, V b) {
  if constexpr (is_int<V>)
    return floor_mod(a, b);
  else
    return each(a, b, [](auto x, auto y) {
      const auto r = libm::fmod(x, y);
      return r != 0 && (r < 0) != (y < 0) ? r + y : r;
    });
}
template <class V>
LLMOPT_INLINE V f_floor_div(V a, V b) {
  if constexpr (is_int<V>)
    return floor_div(a, b);
  else
    return each(a, b, [](auto x, auto y) {
      if (y == 0) return x / y;
      // Through the remainder, as Python does: floor(x / y) is one too large where the quotient rounds up.
      const auto r = libm::fmod(x, y);
      auto q = (x - r) / y;
      if (r != 0 && (r < 0) != (y < 0)) q -= 1;
      return q == 0 ? libm::copysign(q, x / y) : libm::nearbyint(q);
    });
}
template <class V>
LLMOPT_INLINE V f_maximum(V a, V b) {
  return (a > b) | (a != a) ? a : b;  // NaN if either is
}
template <class V>
LLMOPT_INLINE V f_minimum(V a, V b) {
  return (a < b) | (a != a) ? a : b;
}
template <class V>
LLMOPT_INLINE V f_pow(V a, V b) {
  if constexpr (is_int<V>) {
    V result = 1;
    for (; b > 0; b = static_cast<V>(b / 2)) {
      if (b % 2) result = f_mul(result, a);
      a = f_mul(a, a);
    }
    return result;
  } else {
    return each(a, b, [](auto x, auto y) { return libm::pow(x, y); });
  }
}

template <class A>
LLMOPT_INLINE A f_bit_and(A a, A b) {
  return static_cast<A>(a & b);
}
template <class A>
LLMOPT_INLINE A f_bit_or(A a, A b) {
  return static_cast<A>(a | b);
}
template <class A>
LLMOPT_INLINE A f_bit_xor(A a, A b) {
  return static_cast<A>(a ^ b);
}
template <class A>
LLMOPT_INLINE A f_bit_not(A a) {
  if constexpr (std::is_same_v<A, bool>)
    return !a;
  else
    return static_cast<A>(~a);
}
// A shift by a negative number or by the width and more gives what shifting every bit out gives.
template <class T>
LLMOPT_INLINE T f_shl(T a, T b) {
  constexpr int bits = 8 * sizeof(T);
  return b < 0 || b >= bits ? T{0} : static_cast<T>(static_cast<std::uint64_t>(a) << b);
}
template <class T>
LLMOPT_INLINE T f_shr(T a, T b) {
  constexpr int bits = 8 * sizeof(T);
  if (b >= 0 && b < bits) return static_cast<T>(a >> b);
  return std::is_signed_v<T> ? static_cast<T>(a >> (bits - 1)) : T{0};
}

// Vectors of int32 are masks here, and true is the smaller number in them.
#define LLMOPT_COMPARE(name, op)          \
  template <class A>                      \
  LLMOPT_INLINE auto f_##name(A a, A b) { \
    if constexpr (std::is_same_v<A, vi>)  \
      return b op a;                      \
    else                                  \
      return a op b;                      \
  }
LLMOPT_COMPARE(eq, ==)
LLMOPT_COMPARE(ne, !=)
LLMOPT_COMPARE(lt, <)
LLMOPT_COMPARE(le, <=)
LLMOPT_COMPARE(gt, >)
LLMOPT_COMPARE(ge, >=)
#undef LLMOPT_COMPARE
template <class V>
LLMOPT_INLINE auto f_isnan(V a) {
  return a != a;
}
template <class V>
LLMOPT_INLINE auto f_isinf(V a) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return (a == infinity) | (a == -infinity) ? up_mask<V>(true) : up_mask<V>(false);
}
template <class M, class A>
LLMOPT_INLINE A f_where(M m, A a, A b) {
  return m ? a : b;
}

// ---- conversions --------------------------------------------------------------------------------------------------

template <class To, class From>
LLMOPT_INLINE To convert(From x) {
  if constexpr (std::is_same_v<To, bool>) {
    return x != 0;
  } else if constexpr (is_int<To> && std::is_floating_point_v<From>) {
    // Out of range or NaN: the value that x86 gives, the smallest. A narrow type has the low bits of a wide one.
    using Wide = std::conditional_t<std::is_same_v<To, std::int32_t>, std::int32_t, std::int64_t>;
    constexpr From least = static_cast<From>(std::numeric_limits<Wide>::min());
    const bool fits = x >= least && x < -least;
    return static_cast<To>(fits ? static_cast<Wide>(x) : std::numeric_limits<Wide>::min());
  } else {
    return static_cast<To>(x);
  }
}
// In the lanes: bool to float, float to bool, and rounding to a half type.
template <class V>
LLMOPT_INLINE V mask_to_float(mask_of<V> m) {
  return m ? V{} + 1.0f : V{};
}
template <class V>
LLMOPT_INLINE mask_of<V> float_to_mask(V x) {
  return x != 0;
}
template <class T, class V>
LLMOPT_INLINE V round_to(V x) {
  if constexpr (std::is_same_v<V, vf>) {
    T half[kLanes];
    store(half, x);
    return load(half);
  } else {
    return static_cast<V>(to_float(from_float<T>(static_cast<float>(x))));
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T>
LLMOPT_INLINE auto read(const T* p) {
  if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, f16>)
    return to_float(*p);
  else
    return *p;
}
template <class T, class R>
LLMOPT_INLINE void write(T* p, R value) {
  if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, f16>)
    *p = from_float<T>(value);
  else
    *p = value;
}

// The next elements of a row, as many as V has lanes.
template <class V, class T>
LLMOPT_INLINE auto get(const T* p) {
  if constexpr (!std::is_same_v<V, vf>) {
    return read(p);
  } else if constexpr (std::is_same_v<T, bool>) {
    vb bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vi) != 0;
  } else {
    return load(p);
  }
}
// The same with a distance between them.
template <class V, class T>
LLMOPT_INLINE auto get(const T* p, std::int64_t step) {
  if constexpr (!std::is_same_v<V, vf>) {
    return read(p);
  } else {
    mask_of<vf> mask;
    vf value;
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (std::is_same_v<T, bool>)
        mask[i] = -static_cast<std::int32_t>(p[i * step]);
      else
        value[i] = read(p + i * step);
    }
    if constexpr (std::is_same_v<T, bool>)
      return mask;
    else
      return value;
  }
}
template <class V, class T, class R>
LLMOPT_INLINE void put(T* p, R value) {
  if constexpr (!std::is_same_v<V, vf>) {
    write(p, value);
  } else if constexpr (std::is_same_v<T, bool>) {
    const vb bytes = __builtin_convertvector(value & 1, vb);
    std::memcpy(p, &bytes, sizeof bytes);
  } else {
    store(p, value);
  }
}
template <class V, class T, class R>
LLMOPT_INLINE void put(T* p, std::int64_t step, R value) {
  if constexpr (!std::is_same_v<V, vf>) {
    write(p, value);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (std::is_same_v<T, bool>)
        p[i * step] = value[i] != 0;
      else
        write(p + i * step, static_cast<float>(value[i]));
    }
  }
}

// ---- accumulators -------------------------------------------------------------------------------------------------

struct Sum {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_add(a, b);
  }
  template <class T>
  static constexpr T start = T{0};
};
struct Prod {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_mul(a, b);
  }
  template <class T>
  static constexpr T start = T{1};
};
struct Max {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_maximum(a, b);
  }
  template <class T>
  static constexpr T start =
      std::is_floating_point_v<T> ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();
};
struct Min {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_minimum(a, b);
  }
  template <class T>
  static constexpr T start =
      std::is_floating_point_v<T> ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::max();
};
struct Any {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_bit_or(a, b);
  }
  template <class T>
  static constexpr T start = T{0};
};
struct All {
  template <class A>
  LLMOPT_INLINE static A combine(A a, A b) {
    return f_bit_and(a, b);
  }
  template <class T>
  static constexpr T start = std::is_same_v<T, bool> ? static_cast<T>(1) : static_cast<T>(-1);
};

// Two banks of lanes, so that a sum need not wait for the one before, and a scalar for the rest of the row. Scalar
// sums of float are carried in double: a row of thousands would lose digits that the lanes keep. A row of millions loses
// them in the lanes, too, so that these are emptied into the scalar after every kRun elements.
constexpr std::int64_t kRun = 2048 * kLanes;

template <class Op, class T>
struct Accumulator {
  static constexpr bool wide = std::is_same_v<T, float> || std::is_same_v<T, bool>;
  using Narrow = std::conditional_t<std::is_same_v<T, float> && std::is_same_v<Op, Sum>, double, T>;
  using Wide = std::conditional_t<std::is_same_v<T, bool>, vi, vf>;
  using Lane = std::conditional_t<std::is_same_v<T, bool>, std::int32_t, float>;

  Narrow narrow = Op::template start<Narrow>;
  Wide banks[2] = {Wide{} + Op::template start<Lane>, Wide{} + Op::template start<Lane>};
  std::int64_t run = 0;

  LLMOPT_INLINE void add(T x, int) { narrow = Op::combine(narrow, static_cast<Narrow>(x)); }
  LLMOPT_INLINE void add(Wide x, int bank) { banks[bank] = Op::combine(banks[bank], x); }
  // Called by sums of float after `count` elements went into the lanes.
  LLMOPT_INLINE void settle(std::int64_t count) {
    run += count;
    if (run < kRun) return;
    narrow = total();
    banks[0] = banks[1] = Wide{};
    run = 0;
  }
  LLMOPT_INLINE T value() const { return static_cast<T>(total()); }
  LLMOPT_INLINE Narrow total() const {
    if constexpr (wide) {
      const Wide both = Op::combine(banks[0], banks[1]);
      Lane lanes[kLanes];
      std::memcpy(lanes, &both, sizeof lanes);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = Op::combine(lanes[i], lanes[i + half]);
      if constexpr (std::is_same_v<T, bool>)
        return Op::combine(narrow, lanes[0] != 0);
      else
        return Op::combine(narrow, static_cast<Narrow>(lanes[0]));
    } else {
      return narrow;
    }
  }
};

}  // namespace loops
}  // namespace llmopt
