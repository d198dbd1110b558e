// The x86 instructions that the vector extensions have no words for, as inline assembly: reading <immintrin.h> takes the
// compiler 0.3 s, more than most kernels of this project do. Included by simd.h, which guards every use.
#pragma once

#include <cstdint>
#include <cstring>

#define LLMOPT_INLINE inline __attribute__((always_inline))

namespace llmopt {
namespace x86 {

// Scalar conversions between float and the bits of a half; rounds to nearest even.
#if defined(__F16C__)
LLMOPT_INLINE float half_to_float(std::uint16_t bits) {
  const std::uint32_t wide = bits;
  float low, value;
  std::memcpy(&low, &wide, sizeof low);
  asm("vcvtph2ps %1, %0" : "=x"(value) : "x"(low));
  return value;
}
LLMOPT_INLINE std::uint16_t float_to_half(float value) {
  float low;
  asm("vcvtps2ph $0, %1, %0" : "=x"(low) : "x"(value));
  std::uint32_t bits;
  std::memcpy(&bits, &low, sizeof bits);
  return static_cast<std::uint16_t>(bits);
}
#endif

// The names say what one lane becomes.
#if defined(__AVX512F__)
template <class To, class From>
LLMOPT_INLINE To widen_u16(From v) {
  To wide;
  asm("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(v));
  return wide;
}
template <class To, class From>
LLMOPT_INLINE To halves_to_floats(From v) {
  To wide;
  asm("vcvtph2ps %1, %0" : "=v"(wide) : "vm"(v));
  return wide;
}
template <class To, class From>
LLMOPT_INLINE To floats_to_halves(From v) {
  To narrow;
  asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(v));
  return narrow;
}
#elif defined(__AVX2__)
template <class To, class From>
LLMOPT_INLINE To widen_u16(From v) {
  To wide;
  asm("vpmovzxwd %1, %0" : "=x"(wide) : "xm"(v));
  return wide;
}
// The low half of each lane; the high half must be zero.
template <class To, class From>
LLMOPT_INLINE To narrow_u32(From v) {
  From packed;
  asm("vpackusdw %1, %1, %0\n\tvpermq $8, %0, %0" : "=x"(packed) : "x"(v));
  To low;
  std::memcpy(&low, &packed, sizeof low);
  return low;
}
#if defined(__F16C__)
template <class To, class From>
LLMOPT_INLINE To halves_to_floats(From v) {
  To wide;
  asm("vcvtph2ps %1, %0" : "=x"(wide) : "xm"(v));
  return wide;
}
template <class To, class From>
LLMOPT_INLINE To floats_to_halves(From v) {
  To narrow;
  asm("vcvtps2ph $0, %1, %0" : "=x"(narrow) : "x"(v));
  return narrow;
}
#endif
#endif

// The bytes at `p`, one a lane; the instruction reads them itself.
template <int N>
struct Bytes {
  std::uint8_t at[N];
};
#if defined(__AVX2__)
template <class To, int N>
LLMOPT_INLINE To widen_i8(const void* p) {
  To wide;
  asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*static_cast<const Bytes<N>*>(p)));
  return wide;
}
template <class To, int N>
LLMOPT_INLINE To widen_u8(const void* p) {
  To wide;
  asm("vpmovzxbd %1, %0" : "=v"(wide) : "m"(*static_cast<const Bytes<N>*>(p)));
  return wide;
}
template <class To, int N>
LLMOPT_INLINE To widen_u8_to_u16(const void* p) {
  To wide;
  asm("vpmovzxbw %1, %0" : "=v"(wide) : "m"(*static_cast<const Bytes<N>*>(p)));
  return wide;
}
#endif

#if defined(__AVX512BF16__)
template <class To, class From>
LLMOPT_INLINE To floats_to_bf16(From v) {
  To narrow;
  asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(v));
  return narrow;
}
// acc + a[2i] * b[2i] + a[2i+1] * b[2i+1] in each lane.
template <class Floats, class Pairs>
LLMOPT_INLINE Floats dot_bf16(Floats acc, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
  return acc;
}
#endif

}  // namespace x86
}  // namespace llmopt
