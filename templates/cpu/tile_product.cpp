// The inner kernel with vectors, and the choice between it and AMX.
#include "tile_product.h"

#include "amx_bf16.h"

namespace micromix {
namespace {

inline Lanes load_sums(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// kRowsAtOnce rows of one tile of W times x_tiles tiles of X.
template <int x_tiles>
void vector_rows_product(const TileProduct& p, const Operand* w, float* sums) {
  Lanes lanes[kRowsAtOnce][x_tiles];
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int j = 0; j < x_tiles; ++j) {
      lanes[row][j] = p.accumulate ? load_sums(sums + j * kTileSums + row * kTileRows) : no_lanes();
    }
  }
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int k = 0; k < kBlock; k += kOperandsPerStep) {
      const Operand* x = p.x + block * kTileOperands + k * kTileRows;
      const Operand* w_step = w + block * kTileOperands + k;
#pragma GCC unroll 8
      for (int row = 0; row < kRowsAtOnce; ++row) {
#pragma GCC unroll 2
        for (int j = 0; j < x_tiles; ++j) multiply_step(lanes[row][j], w_step + row * kBlock, x + j * p.x_stride);
      }
    }
  }
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int j = 0; j < x_tiles; ++j) {
      std::memcpy(sums + j * kTileSums + row * kTileRows, &lanes[row][j], sizeof(Lanes));
    }
  }
}

template <int x_tiles>
void vector_tile_product(const TileProduct& p) {
  for (int tile = 0; tile < 2; ++tile) {
    for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
      vector_rows_product<x_tiles>(p, p.w + tile * p.w_stride + row * kBlock,
                                   p.sums + tile * x_tiles * kTileSums + row * kTileRows);
    }
  }
}

}  // namespace

const char* isa_name() { return amx_permitted() ? "amx-bf16" : MICROMIX_AVX512_BF16 ? "avx512-bf16" : "portable"; }

void tile_product(const TileProduct& product, int x_tiles) {
  if (amx_permitted()) return amx_tile_product(product, x_tiles);
  x_tiles == 2 ? vector_tile_product<2>(product) : vector_tile_product<1>(product);
}

}  // namespace micromix
