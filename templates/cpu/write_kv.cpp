// micromix_compile/numerics/kv_cache.py, bit for bit: one row, a head's channels of a token, at a time.
#include "write_kv.h"

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>

#include "quantize_row.h"

namespace micromix {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // as in reorder_quantize.cpp

// y: the row's channels, and room for kBlock more behind them.
void write_row(const float* y, const CachedStates& states, ScaleRounding rounding, int64_t at) {
  uint8_t* q = states.q + at * states.channels;
  uint8_t* scale = states.scale + at * (states.channels / states.block_size);
  for (int64_t first = 0; first < states.channels; first += states.block_size) {
    const int byte = scale_byte<kE4M3>(largest_bits(y + first, states.block_size), rounding);
    *scale++ = static_cast<uint8_t>(byte);
    for (int64_t i = 0; i < states.block_size; i += kBlock) {
      uint32_t codes[kBlock];
      encode_scaled<kE4M3>(y + first + i, byte, codes);
      std::copy_n(codes, std::min<int64_t>(kBlock, states.block_size - i), q + first + i);
    }
  }
}

}  // namespace

void write_kv(const CachedStates& keys, const CachedStates& values, const CacheShape& shape) {
  const int64_t rows = shape.batch * shape.heads * shape.tokens, channels = std::max(keys.channels, values.channels);
  const int64_t rows_per_task = kElementsPerTask / std::max<int64_t>(channels, 1) + 1;
  at::parallel_for(0, 2 * rows, rows_per_task, [&](int64_t begin, int64_t end) {
    std::vector<float> y(channels + kBlock);
    for (int64_t index = begin; index < end; ++index) {
      const CachedStates& states = index < rows ? keys : values;
      const int64_t row = index % rows, token = row % shape.tokens, heads = row / shape.tokens;
      const int64_t offset = heads / shape.heads * states.batch_stride + heads % shape.heads * states.head_stride +
                             token * states.token_stride;
      widen_channels(states.data, shape.dtype, offset, states.channels, y.data());
      write_row(y.data(), states, shape.rounding, heads * shape.length + shape.positions[token]);
    }
  });
}

}  // namespace micromix
