// out = x w^T + bias. x is decoded once a call; w is read packed, and only a cache-sized part of it is ever decoded.
//
// Few rows of x: every block of w is decoded in registers and multiplied there, so the time is that of reading w.
// Many rows: a panel of w is decoded to the second-level cache, and 32 x 32 tiles of the product run over it.
#include "mixed_mx_mm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include <ATen/Parallel.h>
#include "float_rows.h"
#include "tile_product.h"

namespace micromix {
namespace {

// With more rows of x the tiles are faster than decoding in registers (measured for K 576 to 1024 on a Xeon: one sum
// costs 0.6 ns a block and row of w, decoding and multiplying with AMX 4.6 ns for up to 16 rows of x).
constexpr int64_t kMaxDotRows = 8;
int64_t max_dot_rows() { return amx_permitted() ? kMaxDotRows / 2 : kMaxDotRows; }

// Below these, waking another thread costs more than it saves.
constexpr int64_t kBlocksPerTask = 4096;          // of w, decoded in registers
constexpr int64_t kArrangedBlocksPerTask = 1024;  // of x

// How much of w is decoded before it is multiplied.
struct PanelShape {
  int64_t pairs;   // of tiles
  int64_t blocks;  // along K
};
// Two tiles of x along 20 blocks (40 KiB) stay in the first-level cache, ten pairs of tiles of w (400 KiB) in the next.
constexpr PanelShape kPanelForManyTiles{10, 20};
// Up to 32 rows of x use a panel of w only once: it stays in the first-level cache (16 KiB).
constexpr PanelShape kPanelForOnePair{1, 8};
constexpr int64_t kSlabRows = 512;  // rows of x for which a panel of w is decoded once; bounds the scratch memory
constexpr int64_t kPairRows = 2 * kTileRows;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call, so that no call pays for fresh pages. Not zeroed.
template <typename T>
class Scratch {
 public:
  T* at_least(int64_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      const size_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

template <typename Body>
void with_coding(Coding coding, Body body) {
  switch (coding) {
    case Coding::fp4: return body(std::integral_constant<Coding, Coding::fp4>{});
    case Coding::fp6_e2m3_planes: return body(std::integral_constant<Coding, Coding::fp6_e2m3_planes>{});
    case Coding::fp6_e3m2_planes: return body(std::integral_constant<Coding, Coding::fp6_e3m2_planes>{});
    case Coding::e4m3: return body(std::integral_constant<Coding, Coding::e4m3>{});
  }
}

// Decodes `count` blocks of one row, `stride` operands apart. Everything by value: the compiler can then hold it in
// registers across the stores.
template <Coding coding>
inline void decode_run(const uint8_t* bytes, int64_t plane_stride, const uint8_t* scale, int64_t count, Operand* to,
                       int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    store_block(to + i * stride, decode_block<coding>(bytes + i * block_bytes(coding), plane_stride, scale[i]));
  }
}

// Where decoded elements go: block b of row r, counted from the first ones, to r row_stride + b block_stride.
struct Destination {
  Operand* to;
  int64_t row_stride;
  int64_t block_stride;
};

// Decodes blocks begin .. end of rows first .. first + rows; those past the last row of the matrix are zero.
void decode_rows(const QuantizedMatrix& matrix, int64_t first, int64_t rows, int64_t begin, int64_t end,
                 const Destination& destination) {
  const int64_t valid = std::clamp<int64_t>(matrix.rows - first, 0, rows);
  for (const Segment& segment : matrix.segments) {
    const int64_t from = std::max(begin, segment.first_block);
    const int64_t count = std::min(end, segment.first_block + segment.blocks) - from;
    if (count <= 0) continue;
    with_coding(segment.coding, [&](auto coding) {
      const int64_t skipped_bytes = (from - segment.first_block) * block_bytes(coding);
      Operand* to = destination.to + (from - begin) * destination.block_stride;
      for (int64_t row = 0; row < valid; ++row) {
        decode_run<coding>(segment.bytes + (first + row) * segment.row_bytes + skipped_bytes, segment.plane_stride,
                           matrix.scale + (first + row) * matrix.blocks + from, count,
                           to + row * destination.row_stride, destination.block_stride);
      }
    });
  }
  for (int64_t row = valid; row < rows; ++row) {
    Operand* to = destination.to + row * destination.row_stride;
    for (int64_t i = 0; i < end - begin; ++i) std::fill_n(to + i * destination.block_stride, kBlock, Operand{});
  }
}

// ---- Few rows of x

// sums[r][m] = row r of w times row m of x, for `rows` rows of w from `row` on. x: (x_rows, K) operands.
template <int rows, int x_rows>
void dot_rows(const QuantizedMatrix& w, int64_t row, const Operand* x, float (&sums)[rows][x_rows]) {
  Lanes lanes[rows][x_rows];
  for (auto& of_row : lanes) std::fill_n(of_row, x_rows, no_lanes());
  const uint8_t* scale = w.scale + row * w.blocks;
  for (const Segment& segment : w.segments) {
    with_coding(segment.coding, [&](auto coding) {
      const uint8_t* bytes = segment.bytes + row * segment.row_bytes;
      for (int64_t i = 0; i < segment.blocks; ++i) {
        const int64_t block = segment.first_block + i;
        const uint8_t* from = bytes + i * block_bytes(coding);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Block decoded =
              decode_block<coding>(from + r * segment.row_bytes, segment.plane_stride, scale[r * w.blocks + block]);
#pragma GCC unroll 8
          for (int m = 0; m < x_rows; ++m) {
            dot(lanes[r][m], decoded, load_block(x + (m * w.blocks + block) * kBlock));
          }
        }
      }
    });
  }
  for (int r = 0; r < rows; ++r) {
    for (int m = 0; m < x_rows; ++m) sums[r][m] = sum(lanes[r][m]);
  }
}

template <int rows, int x_rows, typename Out>
void dot_rows_to(const QuantizedMatrix& w, int64_t row, const Operand* x, const float* bias, Out* out) {
  float sums[rows][x_rows];
  dot_rows<rows, x_rows>(w, row, x, sums);
  for (int r = 0; r < rows; ++r) {
    const float b = bias == nullptr ? 0.0f : bias[row + r];
    for (int m = 0; m < x_rows; ++m) out[m * w.rows + row + r] = static_cast<Out>(sums[r][m] + b);
  }
}

template <int x_rows, typename Out>
void few_rows_product(const Operand* x, const QuantizedMatrix& w, const float* bias, Out* out) {
  constexpr int rows = x_rows <= 4 ? 4 : 2;  // enough independent sums to hide the latency of one
  const int64_t rows_per_task = ceil_div(kBlocksPerTask, std::max<int64_t>(w.blocks, 1));
  at::parallel_for(0, w.rows, rows_per_task, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + rows <= end; row += rows) dot_rows_to<rows, x_rows>(w, row, x, bias, out);
    for (; row < end; ++row) dot_rows_to<1, x_rows>(w, row, x, bias, out);
  });
}

template <typename Out, int x_rows = kMaxDotRows>
void dispatch_few_rows(const QuantizedMatrix& x, const Operand* decoded, const QuantizedMatrix& w, const float* bias,
                       Out* out) {
  if constexpr (x_rows > 0) {
    if (x.rows == x_rows) return few_rows_product<x_rows>(decoded, w, bias, out);
    dispatch_few_rows<Out, x_rows - 1>(x, decoded, w, bias, out);
  }
}

template <typename Out>
void multiply_few_rows(const QuantizedMatrix& x, const QuantizedMatrix& w, const float* bias, Out* out) {
  static thread_local Scratch<Operand> scratch;
  Operand* decoded = scratch.at_least(x.rows * x.blocks * kBlock);
  decode_rows(x, 0, x.rows, 0, x.blocks, {decoded, x.blocks * kBlock, kBlock});
  dispatch_few_rows<Out>(x, decoded, w, bias, out);
}

// ---- Many rows of x

// Tiles of rows x_begin .. x_begin + 16 tiles of x, [tile][block]; rows past the end are zero.
void arrange_x(const QuantizedMatrix& x, int64_t x_begin, int64_t tiles, Operand* arranged) {
  const int64_t tiles_per_task = ceil_div(kArrangedBlocksPerTask, std::max<int64_t>(x.blocks * kTileRows, 1));
  at::parallel_for(0, tiles, tiles_per_task, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<Operand> scratch;
    const int64_t row_stride = x.blocks * kBlock;
    Operand* rows = scratch.at_least(kTileRows * row_stride);
    for (int64_t tile = begin; tile < end; ++tile) {
      decode_rows(x, x_begin + tile * kTileRows, kTileRows, 0, x.blocks, {rows, row_stride, kBlock});
      for (int64_t block = 0; block < x.blocks; ++block) {
        arrange_x_tile(rows + block * kBlock, row_stride, arranged + (tile * x.blocks + block) * kTileOperands);
      }
    }
  });
}

// Adds the bias to one 16x16 tile of sums and writes it as out[row][column ..].
template <typename Out>
void write_tile(const float* sums, const float* bias, Out* out, int64_t out_stride, int64_t rows, int64_t columns) {
  alignas(64) float transposed[kTileSums];
  transpose_sums(sums, transposed);
  if (columns == kTileRows) {  // a constant count lets the compiler drop the case of fewer
    for (int64_t row = 0; row < rows; ++row) {
      write_sums(transposed + row * kTileRows, bias, kTileRows, out + row * out_stride);
    }
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      write_sums(transposed + row * kTileRows, bias, columns, out + row * out_stride);
    }
  }
}

template <typename Out>
struct ManyRows {
  const QuantizedMatrix& w;
  const Operand* x;  // as arrange_x leaves it
  int64_t x_rows;    // of this slab
  const float* bias;
  Out* out;          // of the slab's first row

  PanelShape shape() const { return x_rows <= kPairRows ? kPanelForOnePair : kPanelForManyTiles; }
  int64_t x_tiles() const { return ceil_div(x_rows, kTileRows); }

  // Pairs of w's tiles [w_begin, w_end) times pairs of x's tiles [x_begin, x_end).
  void run(int64_t w_begin, int64_t w_end, int64_t x_begin, int64_t x_end) const {
    static thread_local Scratch<Operand> panel_scratch;
    static thread_local Scratch<float> sums_scratch;
    const int64_t w_pairs = w_end - w_begin;
    const int64_t passes = std::max<int64_t>(ceil_div(w.blocks, shape().blocks), 1);
    Operand* panel = panel_scratch.at_least(w_pairs * 2 * kTileOperands * ceil_div(w.blocks, passes));
    // With one pass along K a pair's sums are written at once, and one place for them is enough.
    const int64_t sums_stride = passes > 1 ? 4 * kTileSums : 0;
    float* sums = sums_scratch.at_least(4 * kTileSums * (passes > 1 ? w_pairs * (x_end - x_begin) : 1));
    const TileSession session;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t begin = w.blocks * pass / passes, end = w.blocks * (pass + 1) / passes;
      for (int64_t tile = 0; tile < 2 * w_pairs; ++tile) {
        decode_rows(w, w_begin * kPairRows + tile * kTileRows, kTileRows, begin, end,
                    {panel + tile * (end - begin) * kTileOperands, kBlock, kTileOperands});
      }
      for (int64_t x_pair = x_begin; x_pair < x_end; ++x_pair) {
        for (int64_t w_pair = w_begin; w_pair < w_end; ++w_pair) {
          float* here = sums + ((x_pair - x_begin) * w_pairs + w_pair - w_begin) * sums_stride;
          multiply_pair(panel + (w_pair - w_begin) * 2 * kTileOperands * (end - begin), x_pair, begin, end, here);
          if (pass == passes - 1) write_pair(here, w_pair, x_pair);
        }
      }
    }
  }

  int tiles_of(int64_t x_pair) const { return x_tiles() - 2 * x_pair >= 2 ? 2 : 1; }

  void multiply_pair(const Operand* panel, int64_t x_pair, int64_t begin, int64_t end, float* sums) const {
    const int64_t x_stride = w.blocks * kTileOperands;
    tile_product({.w = panel,
                  .w_stride = (end - begin) * kTileOperands,
                  .x = x + 2 * x_pair * x_stride + begin * kTileOperands,
                  .x_stride = x_stride,
                  .blocks = end - begin,
                  .sums = sums,
                  .accumulate = begin > 0},
                 tiles_of(x_pair));
  }

  void write_pair(const float* sums, int64_t w_pair, int64_t x_pair) const {
    const int x_count = tiles_of(x_pair);
    for (int i = 0; i < 2; ++i) {
      const int64_t column = w_pair * kPairRows + i * kTileRows;
      const int64_t columns = std::min<int64_t>(w.rows - column, kTileRows);
      if (columns <= 0) continue;
      float tile_bias[kTileRows] = {};
      if (bias != nullptr) std::copy_n(bias + column, columns, tile_bias);
      for (int j = 0; j < x_count; ++j) {
        const int64_t row = x_pair * kPairRows + j * kTileRows;
        write_tile(sums + (i * x_count + j) * kTileSums, tile_bias, out + row * w.rows + column, w.rows,
                   std::min<int64_t>(x_rows - row, kTileRows), columns);
      }
    }
  }

  int64_t w_pairs() const { return ceil_div(w.rows, kPairRows); }
  int64_t x_pairs() const { return ceil_div(x_rows, kPairRows); }

  // Dividing along x decodes every weight once a thread, but each thread multiplies the rows of x that it arranged
  // itself. Fetching a block of them from another core's cache costs about three times what decoding a block does.
  bool divides_along_x(int64_t threads) const { return x_pairs() >= threads && 3 * x_rows >= w.rows; }

  // arrange(first tile, end): leaves those tiles of x where run reads them.
  template <typename Arrange>
  void run_along_x(int64_t threads, Arrange arrange) const {
    const int64_t panels = ceil_div(w_pairs(), shape().pairs);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = x_pairs() * begin / threads, last = x_pairs() * end / threads;
      arrange(2 * first, std::min(2 * last, x_tiles()));
      for (int64_t i = 0; i < panels; ++i) run(w_pairs() * i / panels, w_pairs() * (i + 1) / panels, first, last);
    });
  }

  // As many parts along w as keep every thread busy, and along x what is still missing.
  void run_along_w(int64_t threads) const {
    const int64_t w_parts = std::min(w_pairs(), ceil_div(ceil_div(w_pairs(), shape().pairs), threads) * threads);
    const int64_t x_parts = std::min(x_pairs(), ceil_div(threads, w_parts));
    at::parallel_for(0, w_parts * x_parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / x_parts, j = part % x_parts;
        run(w_pairs() * i / w_parts, w_pairs() * (i + 1) / w_parts, x_pairs() * j / x_parts,
            x_pairs() * (j + 1) / x_parts);
      }
    });
  }
};

template <typename Out>
void multiply_many_rows(const QuantizedMatrix& x, const QuantizedMatrix& w, const float* bias, Out* out) {
  static thread_local Scratch<Operand> scratch;
  const int64_t threads = at::get_num_threads();
  for (int64_t begin = 0; begin < x.rows; begin += kSlabRows) {
    const int64_t rows = std::min(kSlabRows, x.rows - begin);
    const int64_t tiles = ceil_div(rows, kTileRows);
    Operand* arranged = scratch.at_least(tiles * x.blocks * kTileOperands);
    const auto arrange = [&](int64_t first_tile, int64_t last_tile) {
      arrange_x(x, begin + first_tile * kTileRows, last_tile - first_tile,
                arranged + first_tile * x.blocks * kTileOperands);
    };
    const ManyRows<Out> slab{w, arranged, rows, bias, out + begin * w.rows};
    if (slab.divides_along_x(threads)) {
      slab.run_along_x(threads, arrange);
    } else {
      arrange(0, tiles);
      slab.run_along_w(threads);
    }
  }
}

template <typename Out>
void multiply(const QuantizedMatrix& x, const QuantizedMatrix& w, const float* bias, void* out) {
  if (x.rows == 0 || w.rows == 0) return;
  const auto run = x.rows <= max_dot_rows() ? multiply_few_rows<Out> : multiply_many_rows<Out>;
  run(x, w, bias, static_cast<Out*>(out));
}

}  // namespace

void mixed_mx_mm(const QuantizedMatrix& x, const QuantizedMatrix& w, const float* bias, void* out,
                 c10::ScalarType out_dtype) {
  if (out_dtype == c10::ScalarType::BFloat16) return multiply<c10::BFloat16>(x, w, bias, out);
  if (out_dtype == c10::ScalarType::Half) return multiply<c10::Half>(x, w, bias, out);
  multiply<float>(x, w, bias, out);
}

}  // namespace micromix
