// AVX512-BF16: tables of the block decoder, and transposed tiles.
#include "isa.h"

#if MICROMIX_AVX512_BF16

#include "tile_product.h"

namespace micromix {
namespace {

// Exact wherever the result is normal; a NaN stays one, since its payload is in the upper half.
uint16_t as_bf16(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }

// A 16x16 matrix of 32-bit elements, `row_stride` elements apart, transposed to 16 vectors.
void transpose_16x16(const void* from, int64_t row_stride, void* to) {
  const auto quarter = [&](int64_t row, int64_t column) {
    const int32_t* start = static_cast<const int32_t*>(from) + row * row_stride + column;
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(start));
  };
  for (int group = 0; group < 4; ++group) {  // four columns of the source at a time
    __m512i v[4];
    for (int i = 0; i < 4; ++i) {  // v[i]: columns 4 group .. of rows i, 4 + i, 8 + i, 12 + i
      v[i] = _mm512_castsi128_si512(quarter(i, 4 * group));
      v[i] = _mm512_inserti32x4(v[i], quarter(4 + i, 4 * group), 1);
      v[i] = _mm512_inserti32x4(v[i], quarter(8 + i, 4 * group), 2);
      v[i] = _mm512_inserti32x4(v[i], quarter(12 + i, 4 * group), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    int32_t* out = static_cast<int32_t*>(to) + 4 * group * kTileRows;
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(out + kTileRows, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(out + 2 * kTileRows, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(out + 3 * kTileRows, _mm512_unpackhi_epi64(high01, high23));
  }
}

}  // namespace

ScaledTables::ScaledTables() {
  for (int byte = 0; byte < 256; ++byte) {
    const float scale = scale_value(static_cast<uint8_t>(byte));
    for (int i = 0; i < 32; ++i) {
      fp4[byte][i] = as_bf16(decode_fp4(static_cast<uint8_t>(i & 0xF)) * scale);
      e4m3_low[byte][i] = as_bf16(decode_magnitude(i, kE4M3) * scale);
      e3m2[byte][i] = as_bf16(decode_magnitude(2 * i, kE4M3) * scale);
    }
  }
}

const ScaledTables kTables;

Block decode_e4m3_block_slowly(const uint8_t* bytes, uint8_t scale) {
  const float factor = scale_value(scale);
  alignas(64) uint16_t values[kBlock];
  for (int i = 0; i < kBlock; ++i) values[i] = as_bf16(decode_e4m3(bytes[i]) * factor);
  return _mm512_load_si512(values);
}

void arrange_x_tile(const Operand* rows, int64_t row_stride, Operand* tile) {
  transpose_16x16(rows, row_stride / 2, tile);  // a pair of bf16 moves as one 32-bit element
}

void transpose_sums(const float* tile, float* transposed) { transpose_16x16(tile, kTileRows, transposed); }

}  // namespace micromix

#endif
