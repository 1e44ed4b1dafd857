// The quantizer, bit for bit that of micromix_compile/numerics/reference.py. One row at a time: widen it to float32 (and
// normalize it), gather its channels, then encode block by block. The loops are plain so that the compiler vectorizes
// them for whatever the machine has.
#include "reorder_quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/Parallel.h>

#include "quantize_row.h"
#include "rotation.h"

namespace micromix {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // below it, waking another thread costs more than it saves

// Encodes x[0 .. 31] and returns the scale byte. A block with a NaN or an infinity gets zero codes.
template <const ElemFormat& format>
int encode_block(const float* x, ScaleRounding rounding, uint32_t (&codes)[kBlock]) {
  const int byte = scale_byte<format>(largest_bits(x, kBlock), rounding);
  encode_scaled<format>(x, byte, codes);
  return byte;
}

struct Fp4Block {
  static constexpr int bytes = kBlock / 2;

  static int quantize(const float* x, ScaleRounding rounding, uint8_t* packed) {
    uint32_t codes[kBlock];
    const int byte = encode_block<kE2M1>(x, rounding, codes);
    store_nibbles(codes, packed);
    return byte;
  }
};

struct Fp8Block {
  static constexpr int bytes = kBlock;

  static int quantize(const float* x, ScaleRounding rounding, uint8_t* bytes_out) {
    uint32_t codes[kBlock];
    const int byte = encode_block<kE4M3>(x, rounding, codes);
    store_bytes(codes, bytes_out);
    return byte;
  }
};

// Multiplies the magnitudes of E4M3 codes by 2**exponent.
void raise_e4m3(uint32_t (&codes)[kBlock], int exponent) {
  for (uint32_t& code : codes) {
    uint32_t magnitude = code & 0x7F;
    for (int step = 0; step < exponent; ++step) magnitude = magnitude < 8 ? magnitude << 1 : magnitude + 8;
    code = (code & 0x80) | magnitude;
  }
}

// FP6 codes as E4M3 bytes with the constant factor in the scale (packing.align_fp6): where the byte would pass 254,
// the codes take the excess.
template <const ElemFormat& format>
struct Fp6AsFp8Block {
  static constexpr int bytes = kBlock;

  static int quantize(const float* x, ScaleRounding rounding, uint8_t* aligned) {
    uint32_t codes[kBlock];
    const int byte = encode_block<format>(x, rounding, codes);
    for (uint32_t& code : codes) code = ((code & 0x20) << 2) | ((code & 0x1F) << (3 - format.mantissa_bits));
    const int excess = byte == kNanScale ? 0 : std::max(byte + format.e4m3_shift - kMaxScale, 0);
    if (excess > 0) raise_e4m3(codes, excess);
    store_bytes(codes, aligned);
    return byte == kNanScale ? kNanScale : byte + format.e4m3_shift - excess;
  }
};

// y: the segment's channels of one row. scale: its first scale byte.
template <typename Format>
void quantize_segment(const float* y, int64_t k, ScaleRounding rounding, uint8_t* q, uint8_t* scale) {
  for (int64_t block = 0; block < k / kBlock; ++block) {
    scale[block] = static_cast<uint8_t>(Format::quantize(y + block * kBlock, rounding, q + block * Format::bytes));
  }
}

// y: (K,) channels of a row, in E4M3 with one scale for all. largest: the bits of the row's largest magnitude.
void quantize_whole_row(const float* y, int64_t k, uint32_t largest, ScaleRounding rounding, uint8_t* q,
                        uint8_t* scale) {
  const int byte = std::max(scale_byte<kE4M3>(largest, rounding), 1);
  for (int64_t i = 0; i < k; i += kBlock) {
    uint32_t codes[kBlock];
    encode_scaled<kE4M3>(y + i, byte, codes);
    store_bytes(codes, q + i);
  }
  std::fill_n(scale, k / kBlock, static_cast<uint8_t>(byte));
}

// y: (K,) reordered channels of row `row`. x: the `channels` of the row as they came.
void quantize_row(const float* y, const float* x, int64_t channels, int64_t row, const QuantizeLayout& layout,
                  const QuantizedOutput& out) {
  const auto [perm, k4, k6, k8, fp6, rounding, activations, rotated] = layout;
  const int64_t k = layout.k(), narrow = k4 + k6;
  const auto quantize_fp6 =
      fp6 == Fp6::e2m3 ? quantize_segment<Fp6AsFp8Block<kE2M3>> : quantize_segment<Fp6AsFp8Block<kE3M2>>;
  uint8_t* scale = out.scale + row * (k / kBlock);
  if (activations == Activations::fp8) {
    quantize_whole_row(y, k, largest_bits(x, channels), rounding, out.q8 + row * k, scale);
  } else if (activations == Activations::mxfp6) {
    quantize_fp6(y, narrow, rounding, out.q8 + row * k, scale);
    quantize_segment<Fp8Block>(y + narrow, k8, rounding, out.q8 + row * k + narrow, scale + narrow / kBlock);
  } else {
    quantize_segment<Fp4Block>(y, k4, rounding, out.q4 + row * (k4 / 2), scale);
    quantize_fp6(y + k4, k6, rounding, out.q6 + row * k6, scale + k4 / kBlock);
    quantize_segment<Fp8Block>(y + narrow, k8, rounding, out.q8 + row * k8, scale + narrow / kBlock);
  }
}

template <typename T>
void round_row_as(float* row, int64_t count) {
  constexpr int64_t part = 64;
  T narrowed[part];
  for (int64_t i = 0; i < count; i += part) {
    const int64_t n = std::min(part, count - i);
    narrow(row + i, n, narrowed);
    widen(narrowed, n, row + i);
  }
}

void round_row(float* row, int64_t count, c10::ScalarType dtype) {
  if (dtype == c10::ScalarType::BFloat16) round_row_as<c10::BFloat16>(row, count);
  if (dtype == c10::ScalarType::Half) round_row_as<c10::Half>(row, count);
}

// Mean of the squares, which are float32 as in PyTorch; summed in double, so at least as accurate as any order there.
float mean_square(const float* row, int64_t count) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += static_cast<double>(row[i + lane] * row[i + lane]);
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(row[i] * row[i]);
  double sum = 0;
  for (const double part : sums) sum += part;
  return static_cast<float>(sum / static_cast<double>(count));
}

// ops.rms_norm, with its rounding steps.
void normalize_row(float* row, int64_t count, const RmsNorm& norm) {
  const float factor = 1.0f / std::sqrt(mean_square(row, count) + norm.eps);
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
  round_row(row, count, norm.normalized);
  for (int64_t i = 0; i < count; ++i) row[i] *= norm.weight[i];
  round_row(row, count, norm.product);
}

}  // namespace

void reorder_quantize(const FloatMatrix& x, const RmsNorm* norm, const QuantizeLayout& layout,
                      const QuantizedOutput& out) {
  const int64_t k = layout.k();
  const int64_t rows_per_task = kElementsPerTask / std::max<int64_t>(std::max(k, x.channels), 1) + 1;
  at::parallel_for(0, x.rows, rows_per_task, [&](int64_t begin, int64_t end) {
    std::vector<float> row(x.channels + 1);  // the last entry is the zero that padding channels read
    std::vector<float> reordered(k);
    for (int64_t index = begin; index < end; ++index) {
      widen_channels(x.data, x.dtype, index * x.row_stride, x.channels, row.data());
      if (norm != nullptr) normalize_row(row.data(), x.channels, *norm);
      for (int64_t i = 0; i < k; ++i) reordered[i] = row[layout.channel_perm[i]];
      for (int64_t i = 0; i < layout.rotated; i += kBlock) rotate_block(reordered.data() + i);
      quantize_row(reordered.data(), row.data(), x.channels, index, layout, out);
    }
  });
}

}  // namespace micromix
