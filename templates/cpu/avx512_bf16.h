// AVX512-BF16 (with GFNI): an Operand is a bf16. Every MX value is one exactly; magnitudes below 2**-126 become zero.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include "mx_formats.h"

namespace micromix {

using Operand = uint16_t;
using Block = __m512i;  // 32 bf16
using Lanes = __m512;   // 16 partial sums

// What a code is worth under each scale byte, as bf16. Looking the scaled value up costs no more than looking the code
// up, and gets zeros, overflow and the NaN scale right without a special case.
struct ScaledTables {
  using Row = std::array<uint16_t, 32>;
  alignas(64) std::array<Row, 256> fp4;       // [scale][nibble], twice: the lookup ignores no more than bits 5 and up
  alignas(64) std::array<Row, 256> e4m3_low;  // [scale][E4M3 code 0 .. 31]: E2M3 as E4M3, and E4M3's subnormals
  alignas(64) std::array<Row, 256> e3m2;      // [scale][E3M2 code 0 .. 31], each half an E4M3 code

  ScaledTables();
};

extern const ScaledTables kTables;

inline Lanes no_lanes() { return _mm512_setzero_ps(); }
inline Block load_block(const Operand* from) { return _mm512_loadu_si512(from); }
inline void store_block(Operand* to, Block block) { _mm512_storeu_si512(to, block); }
inline void dot(Lanes& sums, Block a, Block b) { sums = _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
inline float sum(Lanes lanes) { return _mm512_reduce_add_ps(lanes); }

// magnitude | bit 7 of each word of `bytes` moved to the sign.
inline Block with_sign(Block magnitude, Block bytes) {
  return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(bytes, 8), _mm512_set1_epi16(int16_t(0x8000)), 0xF8);
}

inline Block decode_fp4_block(const uint8_t* bytes, uint8_t scale) {
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  // Low word: the low nibble is in bits 0 .. 3, and bit 4 does not matter. High word: bits 16 .. 19.
  const __m512i index = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
  return _mm512_permutexvar_epi16(index, _mm512_load_si512(kTables.fp4[scale].data()));
}

// GF2P8AFFINEQB multiplies each byte, as a vector of bits, by a bit matrix, so one instruction does all moves from one
// plane to the fourth quarter. matrix[plane][quarter] takes the bytes of a plane, repeated in every quarter, to what
// they contribute to that quarter of the block's 32 E4M3 bytes; unused bits become zero.
struct PlaneMatrices {
  alignas(32) uint64_t matrix[3][4];
};

constexpr PlaneMatrices plane_matrices(const PlaneLayout& layout) {
  // Byte 7 - i of a matrix says which bits of the source are added up to bit i of the result.
  const auto entry = [](int result_bit, int source_bit) { return uint64_t{1} << (8 * (7 - result_bit) + source_bit); };
  PlaneMatrices result{};
  for (int bit = 0; bit < 8; ++bit) {
    for (int plane = 0; plane < 3; ++plane) {
      if (layout.used >> bit & 1) result.matrix[plane][plane] |= entry(bit, bit);
    }
    for (int i = 0; i < layout.count; ++i) {
      const PlaneMove& move = layout.moves[i];
      if (move.mask >> bit & 1) result.matrix[move.plane][3] |= entry(bit, bit - move.shift);
    }
  }
  return result;
}

template <Coding coding>
inline constexpr PlaneMatrices kPlaneMatrices = plane_matrices(plane_layout(coding));

// The 32 E4M3 bytes of a block of FP6 weights.
template <Coding coding>
inline __m256i load_fp6_bytes(const uint8_t* bytes, int64_t plane_stride) {
  const auto part = [&](int plane) {
    int64_t eight_bytes;
    std::memcpy(&eight_bytes, bytes + plane * plane_stride, sizeof eight_bytes);
    const auto* matrix = reinterpret_cast<const __m256i*>(kPlaneMatrices<coding>.matrix[plane]);
    return _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x(eight_bytes), _mm256_load_si256(matrix), 0);
  };
  return _mm256_ternarylogic_epi64(part(0), part(1), part(2), 0x96);  // exclusive or of all three
}

template <Coding coding>
inline Block decode_fp6_block(const uint8_t* bytes, int64_t plane_stride, uint8_t scale) {
  const __m512i words = _mm512_cvtepu8_epi16(load_fp6_bytes<coding>(bytes, plane_stride));
  if constexpr (coding == Coding::fp6_e2m3_planes) {
    return with_sign(_mm512_permutexvar_epi16(words, _mm512_load_si512(kTables.e4m3_low[scale].data())), words);
  } else {
    const __m512i index = _mm512_srli_epi16(words, 1);
    return with_sign(_mm512_permutexvar_epi16(index, _mm512_load_si512(kTables.e3m2[scale].data())), words);
  }
}

// Scales that can take a code out of bf16's normal range, and the NaN scale: rare, so element by element.
Block decode_e4m3_block_slowly(const uint8_t* bytes, uint8_t scale);

inline Block decode_e4m3_block(const uint8_t* bytes, uint8_t scale) {
  constexpr int rebias = kExponentBias - 7;  // bf16's exponent bias less E4M3's
  if (scale < 8 || scale > 254 - rebias + kExponentBias - 15) return decode_e4m3_block_slowly(bytes, scale);
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7F));
  const __m512i exponent = _mm512_set1_epi16(static_cast<int16_t>((scale - kExponentBias + rebias) * 128));
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), exponent);
  const __mmask32 subnormal = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
  value = _mm512_mask_permutexvar_epi16(value, subnormal, words, _mm512_load_si512(kTables.e4m3_low[scale].data()));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
  return with_sign(_mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FC0)), words);
}

// ---- The tile product

constexpr int kRowsAtOnce = 8;       // rows of W whose sums stay in registers at once
constexpr int kOperandsPerStep = 2;  // a pair of k

// lanes += one step of `w` times the 16 rows of X at `x`.
inline void multiply_step(Lanes& lanes, const Operand* w, const Operand* x) {
  int32_t pair;
  std::memcpy(&pair, w, sizeof pair);
  dot(lanes, _mm512_set1_epi32(pair), load_block(x));
}

// ---- Rows of floats

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

// Writes values[i] + bias[i] for i < count <= 16.
template <typename Out>
inline void write_sums(const float* values, const float* bias, int64_t count, Out* out) {
  store_lanes(_mm512_add_ps(_mm512_loadu_ps(values), _mm512_loadu_ps(bias)), count, out);
}

// ---- Codes, one in the low bits of each word, to bytes

inline void store_bytes(const uint32_t (&codes)[kBlock], uint8_t* bytes) {
  for (int i = 0; i < kBlock; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(_mm512_loadu_si512(codes + i)));
  }
}

inline void store_nibbles(const uint32_t (&codes)[kBlock], uint8_t* bytes) {
  for (int i = 0; i < kBlock; i += 16) {
    const __m512i pairs = _mm512_loadu_si512(codes + i);
    const __m128i packed = _mm512_cvtepi64_epi8(_mm512_or_si512(pairs, _mm512_srli_epi64(pairs, 28)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + i / 2), packed);
  }
}

}  // namespace micromix
