// The MX element formats and byte layouts of micromix_compile/numerics/{formats,packing}.py, for C++.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace micromix {

constexpr int kBlock = 32;             // elements that share one scale
constexpr int kNanScale = 255;         // E8M0 byte of a block that holds a NaN or an infinity
constexpr int kMaxScale = 254;
constexpr int kExponentBias = 127;     // of float32 and of E8M0
constexpr uint32_t kMantissaMask = 0x7FFFFF;
constexpr uint32_t kMagnitudeMask = 0x7FFFFFFF;

enum class ScaleRounding { floor, rceil, even, fit };
enum class Fp6 { e2m3, e3m2 };
enum class Activations { same, fp8, mxfp6 };  // layout.ACTIVATIONS

struct ElemFormat {
  int bits;
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number; subnormals share it
  int emax;
  float max_value;
  int max_code;
  int e4m3_shift;  // value = 2**e4m3_shift * E4M3(the code moved into an E4M3 byte)
};

constexpr ElemFormat kE2M1{4, 1, 0, 2, 6.0f, 0x07, 6};
constexpr ElemFormat kE2M3{6, 3, 0, 2, 7.5f, 0x1F, 6};
constexpr ElemFormat kE3M2{6, 2, -2, 4, 28.0f, 0x1F, 4};
constexpr ElemFormat kE4M3{8, 3, -6, 8, 448.0f, 0x7E, 0};

// How the bytes of a segment encode its elements. Activations hold FP6 as E4M3 bytes, weights as three byte planes.
enum class Coding { fp4, fp6_e2m3_planes, fp6_e3m2_planes, e4m3 };

// Bytes from one block to the next: for the planes, in each of the three.
constexpr int block_bytes(Coding coding) {
  return coding == Coding::fp4 ? kBlock / 2 : coding == Coding::e4m3 ? kBlock : kBlock / 4;
}

inline float float_from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

// 2**(byte - 127); NaN for 255. Byte 0 is the subnormal 2**-127, which a plain shift would make zero.
inline float scale_value(uint8_t byte) {
  if (byte == kNanScale) return float_from_bits(0x7FC00000);
  return float_from_bits(byte == 0 ? 0x00400000u : uint32_t{byte} << 23);
}

// Value of an element code whose largest code is finite, and of every E4M3 code but NaN.
constexpr float decode_magnitude(int code, const ElemFormat& format) {
  const int exponent = code >> format.mantissa_bits;
  const int mantissa = code & ((1 << format.mantissa_bits) - 1);
  const int significand = exponent > 0 ? mantissa + (1 << format.mantissa_bits) : mantissa;
  const int step = (exponent > 0 ? exponent - 1 : 0) + format.min_exponent - format.mantissa_bits;
  return static_cast<float>(significand) * std::bit_cast<float>(static_cast<uint32_t>(step + kExponentBias) << 23);
}

inline float decode_e4m3(uint8_t code) {
  const int magnitude = code & 0x7F;
  const float value = magnitude > kE4M3.max_code ? float_from_bits(0x7FC00000) : decode_magnitude(magnitude, kE4M3);
  return code & 0x80 ? -value : value;
}

inline float decode_fp4(uint8_t nibble) {
  const float value = decode_magnitude(nibble & 0x7, kE2M1);
  return nibble & 0x8 ? -value : value;
}

// How the fourth E4M3 byte of FP6 weights hides in the bits that the codes leave unused in the other three
// (numerics/packing.py). Bits `mask` of the fourth byte are those of plane `plane`, shifted left by `shift` (right
// where it is negative).
struct PlaneMove {
  int plane;
  uint8_t mask;
  int shift;
};

struct PlaneLayout {
  uint8_t used;  // the bits of an E4M3 byte that a code uses
  int count;
  PlaneMove moves[5];
};

constexpr PlaneLayout kE2M3Planes{0x9F, 4, {{0, 0x80, 1}, {0, 0x10, -1}, {1, 0x0C, -3}, {2, 0x03, -5}}};
constexpr PlaneLayout kE3M2Planes{
    0xBE, 5, {{0, 0x82, 1}, {1, 0x20, -1}, {1, 0x04, 2}, {2, 0x10, -2}, {2, 0x08, 3}}};

constexpr const PlaneLayout& plane_layout(Coding coding) {
  return coding == Coding::fp6_e2m3_planes ? kE2M3Planes : kE3M2Planes;
}

}  // namespace micromix
