// Reorder the channels of a matrix and quantize its rows as [MXFP4 | MXFP6 | MXFP8].
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

#include "mx_formats.h"

namespace micromix {

// A float matrix (rows, channels) with unit stride along the channels.
struct FloatMatrix {
  const void* data;
  c10::ScalarType dtype;  // Float, BFloat16 or Half
  int64_t rows;
  int64_t channels;
  int64_t row_stride;
};

struct QuantizeLayout {
  const int32_t* channel_perm;  // (k4 + k6 + k8,), entries in [0, channels]; `channels` reads as zero
  int64_t k4, k6, k8;
  Fp6 fp6;
  ScaleRounding rounding;
  Activations activations;
  int64_t rotated;  // channels, whole blocks
  int64_t k() const { return k4 + k6 + k8; }
};

// Of activations that are not split like the weights, q4 and q6 are empty, and q8 is (rows, K).
struct QuantizedOutput {
  uint8_t* q4;     // (rows, k4 / 2)
  uint8_t* q6;     // (rows, k6)
  uint8_t* q8;     // (rows, k8)
  uint8_t* scale;  // (rows, K / 32)
};

// RMSNorm before the quantizer: weight (channels,) float32 values; `normalized` and `product` are the types that the
// normalized row and its product with the weight are rounded to.
struct RmsNorm {
  const float* weight;
  float eps;
  c10::ScalarType normalized;
  c10::ScalarType product;
};

void reorder_quantize(const FloatMatrix& x, const RmsNorm* norm, const QuantizeLayout& layout,
                      const QuantizedOutput& out);

}  // namespace micromix
