// The inner kernel of the product: a few 16x16 tiles of W X^T over a run of blocks along K.
//
// W is the left operand, so that its blocks are used as they are decoded: a tile of W is 16 rows x 32 k, row after row.
// A tile of X holds, for 16 rows of X, [pair of k][row][2] with bf16 operands (what AMX and vdpbf16ps want on the
// right) and [k][row] with float32. A tile of the product is 16x16 float32, [row of W][row of X].
#pragma once

#include <cstdint>

#include "block.h"

namespace micromix {

constexpr int kTileRows = 16;
constexpr int kTileOperands = kTileRows * kBlock;
constexpr int kTileSums = kTileRows * kTileRows;

struct TileProduct {
  const Operand* w;      // two tiles of W for each block
  int64_t w_stride;      // operands from one tile row of W to the next
  const Operand* x;
  int64_t x_stride;
  int64_t blocks;
  float* sums;           // the 2 x x_tiles product tiles, W's index first
  bool accumulate;       // add to what `sums` holds
};

// Every thread that calls tile_product needs one of these alive.
class TileSession {
 public:
  TileSession();
  ~TileSession();
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// x_tiles: 1 or 2.
void tile_product(const TileProduct& product, int x_tiles);

// Arranges one block of 16 rows of X as a tile. rows: 16 blocks, `row_stride` operands apart.
void arrange_x_tile(const Operand* rows, int64_t row_stride, Operand* tile);

// tile (16x16) transposed.
void transpose_sums(const float* tile, float* transposed);

}  // namespace micromix
