// What all quantizers do with a row: widen it to float32, find its largest magnitude, encode 32 elements with a scale.
// Bit for bit micromix_compile/numerics/reference.py. The loops are plain so that the compiler vectorizes them for
// whatever the machine has.
#pragma once

#include <algorithm>

#include <c10/core/ScalarType.h>

#include "block.h"
#include "float_rows.h"
#include "mx_formats.h"

namespace micromix {

// Elements `offset` to `offset + count` of a matrix of float, bf16 or half.
inline void widen_channels(const void* data, c10::ScalarType dtype, int64_t offset, int64_t count, float* row) {
  if (dtype == c10::ScalarType::BFloat16) {
    widen(static_cast<const c10::BFloat16*>(data) + offset, count, row);
  } else if (dtype == c10::ScalarType::Half) {
    widen(static_cast<const c10::Half*>(data) + offset, count, row);
  } else {
    widen(static_cast<const float*>(data) + offset, count, row);
  }
}

// The float32 bits of the largest magnitude.
inline uint32_t largest_bits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(x[i]) & kMagnitudeMask);
  return largest;
}

// reference.scale_byte of one block. amax_bits: the largest magnitude's float32 bits.
template <const ElemFormat& format>
int scale_byte(uint32_t amax_bits, ScaleRounding rounding) {
  const uint32_t mantissa = amax_bits & kMantissaMask;
  const int exponent = static_cast<int>(amax_bits >> 23);
  if (exponent == 255) return kNanScale;
  const uint32_t max_mantissa = bits_of(format.max_value) & kMantissaMask;
  constexpr uint32_t half_step = 1u << (22 - format.mantissa_bits);
  uint32_t carry = 0;
  if (rounding == ScaleRounding::rceil) {
    carry = mantissa > max_mantissa;
  } else if (rounding == ScaleRounding::even) {
    carry = (mantissa + half_step) >> 23;
  } else if (rounding == ScaleRounding::fit) {
    carry = mantissa > max_mantissa + half_step;
  }
  return std::max(exponent + static_cast<int>(carry) - format.emax, 0);
}

// reference.encode of a value that its block's scale has brought below 2**(emax + 1). Adding 2**(exponent -
// mantissa_bits + 23), whose ulp is one code step, rounds to nearest even.
template <const ElemFormat& format>
uint32_t encode(float value) {
  constexpr uint32_t lowest = static_cast<uint32_t>(kExponentBias + format.min_exponent) << 23;
  const uint32_t bits = bits_of(value);
  const uint32_t exponent = std::max(bits & 0x7F800000, lowest);  // still in its place in a float32
  const float magic = float_from_bits(exponent + (static_cast<uint32_t>(23 - format.mantissa_bits) << 23));
  const uint32_t steps = bits_of(float_from_bits(bits & kMagnitudeMask) + magic) & kMantissaMask;
  const uint32_t code = ((exponent - lowest) >> (23 - format.mantissa_bits)) + steps;
  return std::min(code, static_cast<uint32_t>(format.max_code)) | ((bits >> 31) << (format.bits - 1));
}

// Encodes x[0 .. 31] with this scale; zeros if it is a NaN. The codes are 32 bits wide until the end: narrowing in the
// same loop makes compilers take shorter vectors for all of it.
template <const ElemFormat& format>
void encode_scaled(const float* x, int byte, uint32_t (&codes)[kBlock]) {
  if (byte == kNanScale) {
    std::fill_n(codes, kBlock, 0u);
    return;
  }
  const float reciprocal = float_from_bits(static_cast<uint32_t>(std::max(254 - byte, 1)) << 23);
  for (int i = 0; i < kBlock; ++i) codes[i] = encode<format>(x[i] * reciprocal);
}

}  // namespace micromix
