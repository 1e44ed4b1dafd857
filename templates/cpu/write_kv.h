// Write keys and values of new tokens as E4M3 bytes to their places in a cache.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

#include "mx_formats.h"

namespace micromix {

// Keys or values (batch, heads, tokens, channels), with unit stride along the channels, and the cache that they go to.
struct CachedStates {
  const void* data;
  int64_t channels;
  int64_t batch_stride, head_stride, token_stride;
  int64_t block_size;  // channels that share a scale
  uint8_t* q;          // (batch, heads, length, channels)
  uint8_t* scale;      // (batch, heads, length, channels / block_size)
};

struct CacheShape {
  int64_t batch, heads, tokens, length;
  c10::ScalarType dtype;     // of keys and values: Float, BFloat16 or Half
  const int64_t* positions;  // (tokens,), each from 0 to length - 1
  ScaleRounding rounding;
};

void write_kv(const CachedStates& keys, const CachedStates& values, const CacheShape& shape);

}  // namespace micromix
