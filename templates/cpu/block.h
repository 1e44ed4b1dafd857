// One block of 32 decoded elements in registers, from any coding. What it is made of depends on the instruction set.
#pragma once

#include "float_rows.h"
#include "isa.h"

#if MICROMIX_AVX512_BF16
#include "avx512_bf16.h"
#else
#include "portable.h"
#endif

namespace micromix {

// bytes: the block's first byte (in the first plane, for FP6 weights).
template <Coding coding>
inline Block decode_block(const uint8_t* bytes, int64_t plane_stride, uint8_t scale) {
  if constexpr (coding == Coding::fp4) {
    return decode_fp4_block(bytes, scale);
  } else if constexpr (coding == Coding::e4m3) {
    return decode_e4m3_block(bytes, scale);
  } else {
    return decode_fp6_block<coding>(bytes, plane_stride, scale);
  }
}

}  // namespace micromix
