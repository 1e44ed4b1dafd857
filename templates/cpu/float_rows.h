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

#if MICROMIX_AVX512_BF16

inline void widen(const c10::Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid = static_cast<__mmask16>(count - i >= 16 ? 0xFFFF : (1 << (count - i)) - 1);
    _mm512_mask_storeu_ps(to + i, valid, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, from + i)));
  }
}

inline void narrow(const float* from, int64_t count, c10::Half* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid = static_cast<__mmask16>(count - i >= 16 ? 0xFFFF : (1 << (count - i)) - 1);
    const __m512 values = _mm512_maskz_loadu_ps(valid, from + i);
    _mm256_mask_storeu_epi16(to + i, valid, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

#else

inline void widen(const c10::Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void narrow(const float* from, int64_t count, c10::Half* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<c10::Half>(from[i]);
}

#endif

#if MICROMIX_AVX512_BF16

// 16 floats to `count` <= 16 elements. Whole vectors skip the mask: masked stores of narrowed vectors are slow.
inline void store_lanes(__m512 values, int64_t count, float* to) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), values);
}

inline void store_words(__m256i words, int64_t count, void* to) {
  if (count == 16) return _mm256_storeu_si256(static_cast<__m256i*>(to), words);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), words);
}

inline void store_lanes(__m512 values, int64_t count, c10::BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i upper = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0));
  store_words(_mm512_cvtepi32_epi16(upper), count, to);
}

inline void store_lanes(__m512 values, int64_t count, c10::Half* to) {
  store_words(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count, to);
}

#endif

}  // namespace micromix
