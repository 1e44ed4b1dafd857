// Tables of the block decoder.
#include "block.h"

#include <algorithm>

namespace micromix {

#if MICROMIX_AVX512_BF16

namespace {

// Exact wherever the result is normal; a NaN stays one, since its payload is in the upper half.
uint16_t as_bf16(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }

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

#else

ValueTables::ValueTables() {
  for (int code = 0; code < 16; ++code) fp4[code] = decode_fp4(static_cast<uint8_t>(code));
  for (int code = 0; code < 256; ++code) e4m3[code] = decode_e4m3(static_cast<uint8_t>(code));
}

const ValueTables kTables;

#endif

}  // namespace micromix
