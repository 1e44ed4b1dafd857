// AMX versions of the inner kernel; without AMX, what says so.
#include "amx_bf16.h"

#if MICROMIX_AMX_BF16

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace micromix {
namespace {

bool request_amx() {
  constexpr int arch_req_xcomp_perm = 0x1023;
  constexpr int xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kRowBytes = 64;

// Tile numbers must be literals, hence no loops: 0 .. 3 hold sums ([W tile][X tile]), 4 and 5 W, 6 and 7 X.
void amx_two_x_tiles(const TileProduct& p) {
  if (p.accumulate) {
    _tile_loadd(0, p.sums, kRowBytes);
    _tile_loadd(1, p.sums + kTileSums, kRowBytes);
    _tile_loadd(2, p.sums + 2 * kTileSums, kRowBytes);
    _tile_loadd(3, p.sums + 3 * kTileSums, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const Operand* w = p.w;
  const Operand* x = p.x;
  const int64_t w_stride = p.w_stride, x_stride = p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += kTileOperands, x += kTileOperands) {
    _tile_loadd(6, x, kRowBytes);
    _tile_loadd(4, w, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + w_stride, kRowBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, x + x_stride, kRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.sums, kRowBytes);
  _tile_stored(1, p.sums + kTileSums, kRowBytes);
  _tile_stored(2, p.sums + 2 * kTileSums, kRowBytes);
  _tile_stored(3, p.sums + 3 * kTileSums, kRowBytes);
}

// With one tile of X, two sums would wait for themselves (a product takes 52 cycles, and can start every 16): odd
// blocks get their own, tiles 1 and 3.
void amx_one_x_tile(const TileProduct& p) {
  if (p.accumulate) {
    _tile_loadd(0, p.sums, kRowBytes);
    _tile_loadd(2, p.sums + kTileSums, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(2);
  }
  _tile_zero(1);
  _tile_zero(3);
  const Operand* w = p.w;
  const Operand* x = p.x;
  const int64_t w_stride = p.w_stride;
  for (int64_t pair = 0; pair < p.blocks / 2; ++pair, w += 2 * kTileOperands, x += 2 * kTileOperands) {
    _tile_loadd(6, x, kRowBytes);
    _tile_loadd(4, w, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + w_stride, kRowBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, x + kTileOperands, kRowBytes);
    _tile_loadd(4, w + kTileOperands, kRowBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w + w_stride + kTileOperands, kRowBytes);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (p.blocks % 2) {
    _tile_loadd(6, x, kRowBytes);
    _tile_loadd(4, w, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + w_stride, kRowBytes);
    _tile_dpbf16ps(2, 5, 6);
  }
  alignas(64) float odd[2 * kTileSums];
  _tile_stored(0, p.sums, kRowBytes);
  _tile_stored(1, odd, kRowBytes);
  _tile_stored(2, p.sums + kTileSums, kRowBytes);
  _tile_stored(3, odd + kTileSums, kRowBytes);
  for (int i = 0; i < 2 * kTileSums; ++i) p.sums[i] += odd[i];
}

}  // namespace

bool amx_permitted() {
  static const bool permitted = request_amx();
  return permitted;
}

TileSession::TileSession() {
  static const TileConfig config;
  if (amx_permitted()) _tile_loadconfig(&config);
}

TileSession::~TileSession() {
  if (amx_permitted()) _tile_release();
}

void amx_tile_product(const TileProduct& product, int x_tiles) {
  x_tiles == 2 ? amx_two_x_tiles(product) : amx_one_x_tile(product);
}

}  // namespace micromix

#else

namespace micromix {

bool amx_permitted() { return false; }
TileSession::TileSession() = default;
TileSession::~TileSession() = default;
void amx_tile_product(const TileProduct&, int) {}

}  // namespace micromix

#endif
