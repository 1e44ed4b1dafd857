// AMX, AVX512-BF16 and portable versions of the inner kernel.
#include "tile_product.h"

#if MICROMIX_AMX_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace micromix {
namespace {

#if MICROMIX_AMX_BF16

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

#endif

// Rows of W whose sums stay in registers at once.
#if MICROMIX_AVX512_BF16
constexpr int kRowsAtOnce = 8;
#else
constexpr int kRowsAtOnce = 4;
#endif

inline Lanes load_sums(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// lanes += one step of `w` times the 16 rows of X at `x`: a pair of k with bf16 operands, a single k with float32.
#if MICROMIX_AVX512_BF16
constexpr int kOperandsPerStep = 2;
inline void multiply_step(Lanes& lanes, const Operand* w, const Operand* x) {
  int32_t pair;
  std::memcpy(&pair, w, sizeof pair);
  dot(lanes, _mm512_set1_epi32(pair), load_block(x));
}
#else
constexpr int kOperandsPerStep = 1;
inline void multiply_step(Lanes& lanes, const Operand* w, const Operand* x) { lanes += *w * load_lanes(x); }
#endif

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

#if MICROMIX_AVX512_BF16

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

#endif

}  // namespace

bool amx_permitted() {
#if MICROMIX_AMX_BF16
  static const bool permitted = request_amx();
  return permitted;
#else
  return false;
#endif
}

const char* isa_name() { return amx_permitted() ? "amx-bf16" : MICROMIX_AVX512_BF16 ? "avx512-bf16" : "portable"; }

TileSession::TileSession() {
#if MICROMIX_AMX_BF16
  static const TileConfig config;
  if (amx_permitted()) _tile_loadconfig(&config);
#endif
}

TileSession::~TileSession() {
#if MICROMIX_AMX_BF16
  if (amx_permitted()) _tile_release();
#endif
}

void tile_product(const TileProduct& product, int x_tiles) {
#if MICROMIX_AMX_BF16
  if (amx_permitted()) return x_tiles == 2 ? amx_two_x_tiles(product) : amx_one_x_tile(product);
#endif
  x_tiles == 2 ? vector_tile_product<2>(product) : vector_tile_product<1>(product);
}

#if MICROMIX_AVX512_BF16

void arrange_x_tile(const Operand* rows, int64_t row_stride, Operand* tile) {
  transpose_16x16(rows, row_stride / 2, tile);  // a pair of bf16 moves as one 32-bit element
}

void transpose_sums(const float* tile, float* transposed) { transpose_16x16(tile, kTileRows, transposed); }

#else

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

#endif

}  // namespace micromix
