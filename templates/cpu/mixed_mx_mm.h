// The product of two quantized matrices.
#pragma once

#include <array>
#include <cstdint>

#include <c10/core/ScalarType.h>

#include "mx_formats.h"

namespace micromix {

// A run of blocks along K of one coding, in every row of a matrix.
struct Segment {
  Coding coding;
  const uint8_t* bytes;
  int64_t first_block;   // along K
  int64_t blocks;
  int64_t row_bytes;     // from one row to the next
  int64_t plane_stride;  // between the planes of FP6 weights
};

struct QuantizedMatrix {
  int64_t rows;
  int64_t blocks;        // K / 32
  const uint8_t* scale;  // (rows, blocks)
  std::array<Segment, 3> segments;
};

// out (x.rows, w.rows) = x w^T + bias, out_dtype Float, BFloat16 or Half. bias: (w.rows,) or null.
void mixed_mx_mm(const QuantizedMatrix& x, const QuantizedMatrix& w, const float* bias, void* out,
                 c10::ScalarType out_dtype);

}  // namespace micromix
