// Rotation of one block, bit for bit that of micromix_compile/numerics/rotation.py.
#pragma once

#include <cstring>

#include "mx_formats.h"

namespace micromix {

constexpr int kHalf = kBlock / 2;
typedef float HalfBlock __attribute__((vector_size(kHalf * sizeof(float))));

// Elements of `a` from `first` on and those of `b`, taken in turns. Before version 12 GCC has no such built-in function.
template <int first>
inline HalfBlock interleave(HalfBlock a, HalfBlock b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3,
                                 first + 19, first + 4, first + 20, first + 5, first + 21, first + 6, first + 22,
                                 first + 7, first + 23);
#else
  HalfBlock mixed;
  for (int i = 0; i < kHalf; ++i) mixed[i] = i % 2 == 0 ? a[first + i / 2] : b[first + i / 2];
  return mixed;
#endif
}

// rotation.rotate_activation: five times, all pairs 16 apart, whose sum and difference come to lie side by side. As plain
// loops it took one and a half times as long as the rest of the quantizer, so a sixth (512 rows of 576 channels, GCC 12,
// AVX-512).
inline void rotate_block(float* y) {
  HalfBlock upper, lower;
  std::memcpy(&upper, y, sizeof upper);
  std::memcpy(&lower, y + kHalf, sizeof lower);
  upper *= 1.0f / kBlock;
  lower *= 1.0f / kBlock;
  for (int stage = 0; stage < 5; ++stage) {
    const HalfBlock sums = upper + lower, differences = upper - lower;
    upper = interleave<0>(sums, differences);
    lower = interleave<kHalf / 2>(sums, differences);
  }
  std::memcpy(y, &upper, sizeof upper);
  std::memcpy(y + kHalf, &lower, sizeof lower);
}

}  // namespace micromix
