// Vectors of float of the host's native width, and conversions from and to the storage types.
//
// Written with the compilers' vector extensions, so one source serves AVX-512, AVX2 and any other machine, and the
// code path of a wider machine can be compiled and tested on a narrower one: -DLLMOPT_VECTOR_BYTES=64
// -DLLMOPT_BF16_DOT=1 runs the AVX-512 BF16 path anywhere (emulated, slowly).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "x86.h"

#ifndef LLMOPT_VECTOR_BYTES
#if defined(__AVX512F__)
#define LLMOPT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LLMOPT_VECTOR_BYTES 32
#else
#define LLMOPT_VECTOR_BYTES 16
#endif
#endif
#ifndef LLMOPT_BF16_DOT
#if defined(__AVX512BF16__)
#define LLMOPT_BF16_DOT 1
#else
#define LLMOPT_BF16_DOT 0
#endif
#endif

namespace llmopt {

constexpr int kVectorBytes = LLMOPT_VECTOR_BYTES;
constexpr int kLanes = kVectorBytes / 4;

typedef float vf __attribute__((vector_size(LLMOPT_VECTOR_BYTES)));
typedef std::int32_t vi __attribute__((vector_size(LLMOPT_VECTOR_BYTES)));
typedef std::uint32_t vu __attribute__((vector_size(LLMOPT_VECTOR_BYTES)));
typedef std::uint16_t vh __attribute__((vector_size(LLMOPT_VECTOR_BYTES / 2)));

// Storage types. float needs none.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// ---- scalar conversions -------------------------------------------------------------------------------------------

LLMOPT_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
LLMOPT_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

LLMOPT_INLINE float to_float(float x) { return x; }
LLMOPT_INLINE float to_float(bf16 x) { return bits_to_float(std::uint32_t{x.bits} << 16); }
LLMOPT_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return x86::half_to_float(x.bits);
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent of a half to that of a float, and scales denormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

template <class T>
T from_float(float x);
template <>
LLMOPT_INLINE float from_float<float>(float x) {
  return x;
}
// Round to nearest even; NaN stays NaN.
template <>
LLMOPT_INLINE bf16 from_float<bf16>(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
LLMOPT_INLINE f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return {x86::float_to_half(x)};
#else
  const std::uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {  // becomes a denormal: let the float adder round it at the right place
    const float shifted = bits_to_float(rest) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)))};
  }
  const std::uint32_t rounded = rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u);
  return {static_cast<std::uint16_t>(sign | rounded >> 13)};
#endif
}

LLMOPT_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }

// ---- vectors ------------------------------------------------------------------------------------------------------

LLMOPT_INLINE vf splat(float x) { return x - vf{}; }
LLMOPT_INLINE vf zero() { return vf{}; }

// a * b + c in one rounding where the machine can (-ffp-contract=fast lets the compiler fuse it).
LLMOPT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
LLMOPT_INLINE float fma(float a, float b, float c) { return a * b + c; }

LLMOPT_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// (GCC 12 makes five instructions of the conversion of a vector; hence the assembly.)
LLMOPT_INLINE vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
#if (LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LLMOPT_VECTOR_BYTES == 32 && defined(__AVX2__))
  const vu wide = x86::widen_u16<vu>(half) << 16;
#else
  const vu wide = __builtin_convertvector(half, vu) << 16;
#endif
  vf v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
LLMOPT_INLINE vf load(const f16* p) {
#if (LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LLMOPT_VECTOR_BYTES == 32 && defined(__F16C__))
  vh half;
  std::memcpy(&half, p, sizeof half);
  return x86::halves_to_floats<vf>(half);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

LLMOPT_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
LLMOPT_INLINE void store(bf16* p, vf v) {
#if LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  const vh half = x86::floats_to_bf16<vh>(v);
  std::memcpy(p, &half, sizeof half);
#else
  vu bits;
  std::memcpy(&bits, &v, sizeof bits);
  const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const vu quiet = bits >> 16 | 0x40u;
  const vu word = (vu)(v == v ? (vi)rounded : (vi)quiet);
#if LLMOPT_VECTOR_BYTES == 32 && defined(__AVX2__)
  const vh half = x86::narrow_u32<vh>(word);
#else
  const vh half = __builtin_convertvector(word, vh);
#endif
  std::memcpy(p, &half, sizeof half);
#endif
}
LLMOPT_INLINE void store(f16* p, vf v) {
#if (LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LLMOPT_VECTOR_BYTES == 32 && defined(__F16C__))
  const vh half = x86::floats_to_halves<vh>(v);
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// The first n lanes (0 <= n <= kLanes), the others zero; and back.
template <class T>
LLMOPT_INLINE vf load_partial(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<std::size_t>(n));
  return load(lanes);
}
template <class T>
LLMOPT_INLINE void store_partial(T* p, vf v, int n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * static_cast<std::size_t>(n));
}

LLMOPT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
LLMOPT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// Lane i and lane i + half, then half of that.
LLMOPT_INLINE float reduce_add(vf v) {
#if LLMOPT_VECTOR_BYTES == 64
  typedef float half_vector __attribute__((vector_size(32)));
  half_vector halves[2];
  std::memcpy(halves, &v, sizeof v);
  const half_vector rest = halves[0] + halves[1];
#else
  const vf rest = v;
#endif
  float lanes[sizeof rest / sizeof(float)];
  std::memcpy(lanes, &rest, sizeof rest);
  for (int half = sizeof rest / sizeof(float) / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
LLMOPT_INLINE float reduce_max(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// ---- elementary functions -----------------------------------------------------------------------------------------
// One definition for a vector and for a scalar, free of branches so that the compiler can vectorise the scalar one.

template <class V>
struct lanes_of;
template <>
struct lanes_of<float> {
  using i = std::int32_t;
  using u = std::uint32_t;
};
template <>
struct lanes_of<vf> {
  using i = vi;
  using u = vu;
};
template <class To, class From>
LLMOPT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// e^x to about 1 ulp: x = n ln 2 + r, a degree 6 polynomial in r, n added to the exponent (Cody and Waite's reduction).
template <class V>
LLMOPT_INLINE V exp(V x) {
  using I = typename lanes_of<V>::i;
  using U = typename lanes_of<V>::u;
  const V big = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  V y = x < -104.0f ? V{} - 104.0f : x;
  y = y > 89.0f ? V{} + 89.0f : y;
  const V shifted = y * 1.44269504088896341f + big;
  const V n = shifted - big;
  V r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two steps of half the exponent each, so that results near the ends of the range neither wrap nor vanish early.
  const I whole = bit_cast<I>(shifted) - 0x4b400000;
  const I half = whole >> 1;
  const V first = bit_cast<V>(bit_cast<U>(I(half + 127)) << 23);  // unsigned: of NaN any bits may come here
  const V second = bit_cast<V>(bit_cast<U>(I(whole - half + 127)) << 23);
  return p * first * second;  // overflows to infinity and underflows to zero at the clamped ends
}

template <class V>
LLMOPT_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp(V(-x)));
}

template <class V>
LLMOPT_INLINE V silu(V x) {
  return x / (1.0f + exp(V(-x)));
}

// Odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel (Cephes' split).
template <class V>
LLMOPT_INLINE V tanh(V x) {
  const V a = x < 0.0f ? -x : x;
  const V s = x * x;
  V p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  p = p * s * x + x;
  const V e = exp(V(a + a));
  V big = 1.0f - 2.0f / (e + 1.0f);
  big = x < 0.0f ? -big : big;
  return a < 0.625f ? p : big;
}

// Abramowitz and Stegun 7.1.26 has 1.5e-7 absolute error; near zero the Maclaurin series keeps the relative error small.
template <class V>
LLMOPT_INLINE V erf(V x) {
  const V a = x < 0.0f ? -x : x;
  const V t = 1.0f / (a * 0.3275911f + 1.0f);
  V p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  V far = 1.0f - p * t * exp(V(-(a * a)));
  far = x < 0.0f ? -far : far;
  const V s = x * x;
  V q = s * -7.57575757575758e-4f + 4.62962962962963e-3f;
  q = q * s - 2.38095238095238e-2f;
  q = q * s + 0.1f;
  q = q * s - 0.333333333333333f;
  q = q * s + 1.0f;
  const V near = x * 1.12837916709551f * q;
  return a < 0.5f ? near : far;
}

template <class V>
LLMOPT_INLINE V gelu_erf(V x) {
  return x * 0.5f * (1.0f + erf(V(x * 0.70710678118654752f)));
}
template <class V>
LLMOPT_INLINE V gelu_tanh(V x) {
  return x * 0.5f * (1.0f + tanh(V(0.79788456080286536f * (x + x * x * x * 0.044715f))));
}

}  // namespace llmopt
