// Any machine: an Operand is a float32, and loops are plain so that the compiler takes what vectors there are.
#pragma once

#include <cstdint>
#include <cstring>

#include <c10/util/Half.h>

#include "mx_formats.h"

namespace micromix {

using Operand = float;
typedef float Lanes __attribute__((vector_size(64)));  // 16 floats: the compiler splits them into the machine's vectors
struct Block {
  alignas(64) float value[kBlock];
};

struct ValueTables {
  alignas(64) float fp4[16];
  alignas(64) float e4m3[256];

  ValueTables();
};

extern const ValueTables kTables;

inline Lanes no_lanes() { return Lanes{}; }

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Block load_block(const Operand* from) {
  Block block;
  std::memcpy(block.value, from, sizeof block.value);
  return block;
}

inline void store_block(Operand* to, const Block& block) { std::memcpy(to, block.value, sizeof block.value); }

inline void dot(Lanes& sums, const Block& a, const Block& b) {
  sums += load_lanes(a.value) * load_lanes(b.value);
  sums += load_lanes(a.value + 16) * load_lanes(b.value + 16);
}

inline float sum(Lanes lanes) {
  float halves[16];
  std::memcpy(halves, &lanes, sizeof lanes);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
  }
  return halves[0];
}

inline Block decode_fp4_block(const uint8_t* bytes, uint8_t scale) {
  const float factor = scale_value(scale);
  Block block;
  for (int i = 0; i < kBlock / 2; ++i) {
    block.value[2 * i] = kTables.fp4[bytes[i] & 0xF] * factor;
    block.value[2 * i + 1] = kTables.fp4[bytes[i] >> 4] * factor;
  }
  return block;
}

inline Block decode_e4m3_block(const uint8_t* bytes, uint8_t scale) {
  const float factor = scale_value(scale);
  Block block;
  for (int i = 0; i < kBlock; ++i) block.value[i] = kTables.e4m3[bytes[i]] * factor;
  return block;
}

template <Coding coding>
inline Block decode_fp6_block(const uint8_t* bytes, int64_t plane_stride, uint8_t scale) {
  constexpr const PlaneLayout& layout = plane_layout(coding);
  constexpr int quarter = kBlock / 4;
  uint8_t codes[kBlock] = {};
  for (int i = 0; i < quarter; ++i) {
    for (int plane = 0; plane < 3; ++plane) codes[plane * quarter + i] = bytes[plane * plane_stride + i] & layout.used;
    for (int j = 0; j < layout.count; ++j) {
      const auto [plane, mask, shift] = layout.moves[j];
      const int source = bytes[plane * plane_stride + i];
      codes[3 * quarter + i] |= static_cast<uint8_t>((shift > 0 ? source << shift : source >> -shift) & mask);
    }
  }
  return decode_e4m3_block(codes, scale);
}

// ---- The tile product

constexpr int kRowsAtOnce = 4;       // rows of W whose sums stay in registers at once
constexpr int kOperandsPerStep = 1;  // a single k

// lanes += one step of `w` times the 16 rows of X at `x`.
inline void multiply_step(Lanes& lanes, const Operand* w, const Operand* x) { lanes += *w * load_lanes(x); }

// ---- Rows of floats

inline void widen(const c10::Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void narrow(const float* from, int64_t count, c10::Half* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<c10::Half>(from[i]);
}

// Writes values[i] + bias[i] for i < count <= 16.
template <typename Out>
inline void write_sums(const float* values, const float* bias, int64_t count, Out* out) {
  float biased[16];
  for (int i = 0; i < 16; ++i) biased[i] = values[i] + bias[i];
  narrow(biased, count, out);
}

// ---- Codes, one in the low bits of each word, to bytes

inline void store_bytes(const uint32_t (&codes)[kBlock], uint8_t* bytes) {
  for (int i = 0; i < kBlock; ++i) bytes[i] = static_cast<uint8_t>(codes[i]);
}

inline void store_nibbles(const uint32_t (&codes)[kBlock], uint8_t* bytes) {
  for (int i = 0; i < kBlock / 2; ++i) bytes[i] = static_cast<uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
}

}  // namespace micromix
