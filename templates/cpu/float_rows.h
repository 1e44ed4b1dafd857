// Conversion of rows between float32 and the 16-bit floats, to nearest even, in loops that vectorize (those of
// c10::BFloat16 and c10::Half have a branch an element, and cost more than the product they follow).
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "isa.h"
#include "mx_formats.h"

namespace micromix {

// The bf16 nearest to `value`, as bits.
inline uint32_t nearest_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (bits & kMagnitudeMask) > 0x7F800000 ? 0x7FC0 : rounded;
}

inline void widen(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof *to); }

inline void widen(const c10::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_from_bits(uint32_t{from[i].x} << 16);
}

inline void narrow(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof *to); }

inline void narrow(const float* from, int64_t count, c10::BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i].x = static_cast<uint16_t>(nearest_bf16(from[i]));
}

}  // namespace micromix
