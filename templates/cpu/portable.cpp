// Any machine: tables of the block decoder, and transposed tiles.
#include "isa.h"

#if !MICROMIX_AVX512_BF16

#include "tile_product.h"

namespace micromix {

ValueTables::ValueTables() {
  for (int code = 0; code < 16; ++code) fp4[code] = decode_fp4(static_cast<uint8_t>(code));
  for (int code = 0; code < 256; ++code) e4m3[code] = decode_e4m3(static_cast<uint8_t>(code));
}

const ValueTables kTables;

void arrange_x_tile(const Operand* rows, int64_t row_stride, Operand* tile) {
  for (int k = 0; k < kBlock; ++k) {
    for (int row = 0; row < kTileRows; ++row) tile[k * kTileRows + row] = rows[row * row_stride + k];
  }
}

void transpose_sums(const float* tile, float* transposed) {
  for (int column = 0; column < kTileRows; ++column) {
    for (int row = 0; row < kTileRows; ++row) transposed[column * kTileRows + row] = tile[row * kTileRows + column];
  }
}

}  // namespace micromix

#endif
