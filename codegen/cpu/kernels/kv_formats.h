// Formats of a quantized KV cache: how a row (the key or value of one token and one head) is stored, and read back.
//
//   i8     one byte an element, -127 .. 127, and a scale: code * scale
//   f8e4m3 one byte an element, sign, 4 bits of exponent, 3 of mantissa, and a scale: code * scale
//   i4     16 bytes for each 32 elements, element i in the low and i + 16 in the high four bits, the row padded to whole
//          blocks; a scale and the least value: code * scale + least, of the row times a Hadamard matrix
//
// Parameters are bf16. The page of one head holds the codes of all its rows, then their parameters. The formats, and why
// they are so, are defined by their reference in compiler/kv_formats.py; what is written equals it to the bit.
//
// Readers take codes as floats (load_codes) and apply scale and least value per row, after the product with a query or
// into the weight of a value, so that an element costs its conversion alone.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace llmopt {

constexpr int kMaxHeadDim = 576;  // DeepSeek's latent attention has 512 + 64

struct i8 {
  std::int8_t code;
};
struct f8e4m3 {
  std::uint8_t code;
};
struct i4 {
  std::uint8_t codes;
};

template <class S>
constexpr bool kQuantized = std::is_same<S, i8>::value || std::is_same<S, f8e4m3>::value || std::is_same<S, i4>::value;
// Whether rows have a least value beside the scale, and are rotated.
template <class S>
constexpr bool kRotated = std::is_same<S, i4>::value;

constexpr int kInt4Block = 32;

// Bytes of the codes of a row, and of its parameters. Rows that are not quantized are elements without parameters.
template <class S>
inline std::int64_t code_bytes(std::int64_t dim) {
  if constexpr (std::is_same<S, i4>::value) return round_up(dim, kInt4Block) / 2;
  return dim * static_cast<std::int64_t>(sizeof(S));
}
template <class S>
constexpr std::int64_t kParameterBytes = !kQuantized<S> ? 0 : kRotated<S> ? 4 : 2;
template <class S>
inline std::int64_t row_bytes(std::int64_t dim) {
  return code_bytes<S>(dim) + kParameterBytes<S>;
}

// ---- reading ------------------------------------------------------------------------------------------------------

// kLanes codes as floats; those of f8e4m3 divided by kCodeUnit, which belongs into the scale.
template <class S>
constexpr float kCodeUnit = std::is_same<S, f8e4m3>::value ? 256.0f : 1.0f;

// Whether the machine has vectors of this size, rather than the compiler emulating them.
#if (LLMOPT_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LLMOPT_VECTOR_BYTES == 32 && defined(__AVX2__))
#define LLMOPT_WIDEN_BYTES 1
#else
#define LLMOPT_WIDEN_BYTES 0
#endif

LLMOPT_INLINE vf load(const i8* p) {
#if LLMOPT_WIDEN_BYTES
  return __builtin_convertvector((x86::widen_i8<vi, kLanes>(p)), vf);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i].code);
  return v;
#endif
}
// The bits of e4m3 are those of a half whose exponent is 8 too small, denormals included.
LLMOPT_INLINE vf load(const f8e4m3* p) {
#if LLMOPT_WIDEN_BYTES && defined(__F16C__)
  const vh wide = x86::widen_u8_to_u16<vh, kLanes>(p);
  const vh half = (wide & 0x80) << 8 | (wide & 0x7f) << 7;
  return x86::halves_to_floats<vf>(half);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i)
    v[i] = to_float(f16{static_cast<std::uint16_t>((p[i].code & 0x80) << 8 | (p[i].code & 0x7f) << 7)});
  return v;
#endif
}
// Elements [d, d + kLanes) of an i4 row, d a multiple of kLanes: they lie in one half of the bytes of a block.
LLMOPT_INLINE vf load_nibbles(const i4* row, std::int64_t d) {
  const i4* p = row + d / kInt4Block * (kInt4Block / 2) + d % (kInt4Block / 2);
  const int shift = d % kInt4Block < kInt4Block / 2 ? 0 : 4;
#if LLMOPT_WIDEN_BYTES
  const vi wide = x86::widen_u8<vi, kLanes>(p);
  return __builtin_convertvector(wide >> shift & 15, vf);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i].codes >> shift & 15);
  return v;
#endif
}

// Elements [d, d + kLanes) of a stored row, d a multiple of kLanes, as far as `access` goes. (Rows of i4 are padded, and
// read beyond their last element: what comes from there is finite and must be ignored.)
template <class S, class Access>
LLMOPT_INLINE vf load_codes(const S* row, std::int64_t d, Access access) {
  if constexpr (!kQuantized<S>) {
    return access.load(row + d);
  } else if constexpr (std::is_same<S, i4>::value) {
    return load_nibbles(row, d);
  } else {
    if (access.count == kLanes) return load(row + d);
    S lanes[kLanes] = {};
    std::memcpy(lanes, row + d, static_cast<std::size_t>(access.count));
    return load(lanes);
  }
}

// Parameters of `N` rows of keys and of values.
template <int N>
struct RowParameters {
  float k_scale[N], k_least[N], v_scale[N], v_least[N];
};

// Reads the parameters of a row whose codes are the `offset`-th of `page`.
template <class S>
LLMOPT_INLINE void load_parameters(const char* page, std::int64_t page_codes, std::int64_t offset, float& scale,
                                   float& least) {
  bf16 stored[2] = {};
  std::memcpy(stored, page + page_codes + offset * kParameterBytes<S>, kParameterBytes<S>);
  scale = to_float(stored[0]) * kCodeUnit<S>;
  least = to_float(stored[1]);
}

// ---- rotation -----------------------------------------------------------------------------------------------------

// The size of the Hadamard matrices along a row: the largest power of two that divides it.
inline std::int64_t rotation_block(std::int64_t dim) { return dim & -dim; }

// Multiplies a row by the Hadamard matrices, in place, not normalised (twice: times rotation_block). The additions are
// those of the reference, in its order.
inline void hadamard(float* row, std::int64_t dim) {
  const std::int64_t block = rotation_block(dim);
  for (std::int64_t half = 1; half < block; half *= 2)
    for (std::int64_t begin = 0; begin < dim; begin += 2 * half)
      for (std::int64_t i = begin; i < begin + half; ++i) {
        const float low = row[i], high = row[i + half];
        row[i] = low + high;
        row[i + half] = low - high;
      }
}

// ---- writing ------------------------------------------------------------------------------------------------------

// The nearest whole number, ties to even, for |x| < 2^22. x must be a quotient: a product would be fused with the sum.
LLMOPT_INLINE std::int32_t nearest(float x) {
  return static_cast<std::int32_t>(float_to_bits(x + 12582912.0f)) - 0x4b400000;
}

// The nearest e4m3 number of |x| <= 448, ties to even.
LLMOPT_INLINE std::uint8_t to_e4m3(float x) {
  const std::uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80u, rest = bits & 0x7fffffffu;
  const std::uint32_t normal = ((rest + 0x7ffffu + (rest >> 20 & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 the float adder rounds to multiples of 2^-9.
  const std::uint32_t small = float_to_bits(bits_to_float(rest) + 24576.0f) - 0x46c00000u;
  return static_cast<std::uint8_t>(sign | (rest < 0x3c800000u ? small : normal));
}

LLMOPT_INLINE float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Stores a row, of which `row` is a copy that may be changed: codes and parameters.
template <class S>
void quantize_row(float* row, std::int64_t dim, S* codes, char* parameters) {
  if (kRotated<S>) hadamard(row, dim);
  std::int32_t greatest_bits = 0;  // as integers magnitudes are ordered, and NaN above infinity above all numbers
  float least = row[0], greatest = row[0];
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::int32_t bits = static_cast<std::int32_t>(float_to_bits(row[i]) & 0x7fffffffu);
    greatest_bits = bits > greatest_bits ? bits : greatest_bits;
    least = row[i] < least ? row[i] : least;
    greatest = row[i] > greatest ? row[i] : greatest;
  }
  const bool finite = greatest_bits < 0x7f800000;
  const float largest = std::is_same<S, f8e4m3>::value ? 448.0f : 127.0f;
  const float exact = kRotated<S> ? (greatest - least) / 15.0f
                                  : bits_to_float(static_cast<std::uint32_t>(greatest_bits)) / largest;
  const bf16 stored[2] = {finite ? from_float<bf16>(exact) : bf16{0x7fc0},
                          finite && kRotated<S> ? from_float<bf16>(least) : bf16{0}};
  std::memcpy(parameters, stored, kParameterBytes<S>);
  const float scale = to_float(stored[0]), shift = to_float(stored[1]);
  if (!(scale > 0.0f)) {  // a row of zeros, or of what cannot be stored
    std::memset(codes, 0, static_cast<std::size_t>(code_bytes<S>(dim)));
    return;
  }
  if constexpr (std::is_same<S, i4>::value) {
    for (std::int64_t d = 0; d < dim; d += kInt4Block)
      for (std::int64_t i = 0; i < kInt4Block / 2; ++i) {
        const auto code = [&](std::int64_t e) {
          return e < dim ? static_cast<std::uint8_t>(nearest(clamp((row[e] - shift) / scale, 0.0f, 15.0f))) : 0;
        };
        codes[d / 2 + i].codes = static_cast<std::uint8_t>(code(d + i) | code(d + i + kInt4Block / 2) << 4);
      }
  } else {
    for (std::int64_t i = 0; i < dim; ++i) {
      const float y = clamp(row[i] / scale, -largest, largest);
      if constexpr (std::is_same<S, i8>::value) {
        codes[i].code = static_cast<std::int8_t>(nearest(y));
      } else {
        codes[i].code = to_e4m3(y);
      }
    }
  }
}

}  // namespace llmopt
