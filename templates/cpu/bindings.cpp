// The ops of micromix_compile/ops/exact.py, and the exact one of ops/grouped.py, for CPU tensors: checks every argument,
// then calls the kernels.
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "arguments.h"
#include "isa.h"
#include "mixed_mx_mm.h"
#include "reorder_quantize.h"

namespace {

using at::Tensor;
using micromix::Activations;
using micromix::Coding;
using micromix::Fp6;
using micromix::kBlock;
using micromix::ScaleRounding;
using micromix::concat;
using micromix::is_kernel_float;
using micromix::name_of;
using micromix::parse_rounding;
using micromix::text_of;
using Quantized = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Fp6 parse_fp6(std::string_view name) {
  CHECK_VALUE(name == "e2m3" || name == "e3m2", "fp6 must be one of e2m3, e3m2, got '", name, "'");
  return name == "e2m3" ? Fp6::e2m3 : Fp6::e3m2;
}

Activations parse_activations(std::string_view name) {
  if (name == "same") return Activations::same;
  if (name == "fp8") return Activations::fp8;
  CHECK_VALUE(name == "mxfp6", "activations must be one of same, fp8, mxfp6, got '", name, "'");
  return Activations::mxfp6;
}

void check_split(int64_t k4, int64_t k6, int64_t k8, int64_t channels) {
  const std::pair<const char*, int64_t> parts[] = {{"k4", k4}, {"k6", k6}, {"k8", k8}};
  for (const auto& [name, k] : parts) {
    CHECK_VALUE(k >= 0 && k % kBlock == 0, name, " must be a non-negative multiple of ", kBlock, ", got ", k);
  }
  CHECK_VALUE(k4 + k6 + k8 == channels, "split (", k4, ", ", k6, ", ", k8, ") sums to ", k4 + k6 + k8,
                    ", but channel_perm has ", channels, " entries");
}

void check_matrix(const Tensor& x) {
  CHECK_TYPE(is_kernel_float(x.scalar_type()), "x must be float32, bfloat16 or float16, got ",
                   name_of(x.dtype()));
  CHECK_VALUE(x.dim() == 2, "x must be 2-dimensional (M, C), got shape ", text_of(x.sizes()));
}

// channel_perm as indices into a row followed by one zero: -1 becomes `channels`.
std::vector<int32_t> gather_indices(const Tensor& channel_perm, int64_t channels) {
  CHECK_VALUE(channel_perm.dim() == 1, "channel_perm must be 1-dimensional, got shape ",
                    text_of(channel_perm.sizes()));
  CHECK_TYPE(at::isIntegralType(channel_perm.scalar_type(), /*includeBool=*/false),
                   "channel_perm must hold integers, got ", name_of(channel_perm.dtype()));
  CHECK_VALUE(channels < std::numeric_limits<int32_t>::max(), "x has too many channels: ", channels);
  const Tensor perm = channel_perm.to(at::kLong).contiguous();
  const int64_t* entries = perm.const_data_ptr<int64_t>();
  std::vector<int32_t> indices(perm.numel());
  for (size_t i = 0; i < indices.size(); ++i) {
    CHECK_VALUE(entries[i] >= -1 && entries[i] < channels, "channel_perm[", i, "] must be in [-1, ", channels,
                      "), got ", entries[i]);
    indices[i] = static_cast<int32_t>(entries[i] < 0 ? channels : entries[i]);
  }
  return indices;
}

void check_rotated(int64_t rotated, int64_t channels) {
  CHECK_VALUE(rotated >= 0 && rotated <= channels && rotated % kBlock == 0, "rotated must be a multiple of ", kBlock,
                    " from 0 to ", channels, ", got ", rotated);
}

// The arguments of quantizers that say what becomes of rows.
struct Names {
  std::string_view fp6, scale_rounding, activations;
};

Quantized quantize(const Tensor& x, const micromix::RmsNorm* norm, const Tensor& channel_perm, int64_t k4, int64_t k6,
                   int64_t k8, const Names& names, int64_t rotated) {
  const int64_t k = k4 + k6 + k8;
  check_split(k4, k6, k8, channel_perm.dim() == 1 ? channel_perm.size(0) : k);
  check_rotated(rotated, k);
  const Activations activations = parse_activations(names.activations);
  const bool same = activations == Activations::same;
  const std::vector<int32_t> indices = gather_indices(channel_perm, x.size(1));
  const Tensor rows = x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
  const int64_t m = rows.size(0);
  const auto bytes = x.options().dtype(at::kByte);
  Quantized out{at::empty({m, same ? k4 / 2 : 0}, bytes), at::empty({m, same ? k6 : 0}, bytes),
                at::empty({m, same ? k8 : k}, bytes), at::empty({m, k / kBlock}, bytes)};
  const micromix::FloatMatrix matrix{rows.const_data_ptr(), rows.scalar_type(), m, rows.size(1), rows.stride(0)};
  const micromix::QuantizeLayout layout{indices.data(), k4, k6, k8, parse_fp6(names.fp6),
                                        parse_rounding(names.scale_rounding), activations, rotated};
  auto& [q4, q6, q8, scale] = out;
  micromix::reorder_quantize(matrix, norm, layout,
                             {q4.mutable_data_ptr<uint8_t>(), q6.mutable_data_ptr<uint8_t>(),
                              q8.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<uint8_t>()});
  return out;
}

Quantized reorder_quantize(const Tensor& x, const Tensor& channel_perm, int64_t k4, int64_t k6, int64_t k8,
                           std::string_view fp6, std::string_view scale_rounding, std::string_view activations,
                           int64_t rotated) {
  check_matrix(x);
  return quantize(x, nullptr, channel_perm, k4, k6, k8, {fp6, scale_rounding, activations}, rotated);
}

Quantized rms_norm_reorder_quantize(const Tensor& x, const Tensor& weight, double eps, const Tensor& channel_perm,
                                    int64_t k4, int64_t k6, int64_t k8, std::string_view fp6,
                                    std::string_view scale_rounding, std::string_view activations, int64_t rotated) {
  check_matrix(x);
  CHECK_TYPE(is_kernel_float(weight.scalar_type()), "weight must be float32, bfloat16 or float16, got ",
                   name_of(weight.dtype()));
  CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(1), "weight must have shape (", x.size(1),
                    ",), got ", text_of(weight.sizes()));
  const Tensor factors = weight.to(at::kFloat).contiguous();
  const micromix::RmsNorm norm{factors.const_data_ptr<float>(), static_cast<float>(eps), x.scalar_type(),
                               at::promote_types(x.scalar_type(), weight.scalar_type())};
  return quantize(x, &norm, channel_perm, k4, k6, k8, {fp6, scale_rounding, activations}, rotated);
}

// The arguments of one operand of the product, made contiguous and checked.
struct Packed {
  const char* name;  // "x" or "w", for messages
  Tensor q4, q6, q8, scale;

  void check(const Tensor& tensor, const char* part, int64_t dims, int64_t unit) const {
    CHECK_TYPE(tensor.scalar_type() == at::kByte, name, part, " must be uint8, got ", name_of(tensor.dtype()));
    CHECK_VALUE(tensor.dim() == dims, name, part, " must be ", dims, "-dimensional, got shape ",
                      text_of(tensor.sizes()));
    CHECK_VALUE(tensor.size(-2) == scale.size(0), name, part, " must have ", scale.size(0),
                      " rows, as the scale has, got shape ", text_of(tensor.sizes()));
    CHECK_VALUE(tensor.size(-1) % unit == 0, name, part, " must hold whole blocks of ", kBlock, ", got shape ",
                      text_of(tensor.sizes()));
  }

  micromix::QuantizedMatrix matrix(Coding fp6) const {
    const bool planes = fp6 != Coding::e4m3;
    CHECK_VALUE(scale.dim() == 2, name, "_scale must be 2-dimensional, got shape ", text_of(scale.sizes()));
    check(scale, "_scale", 2, 1);
    check(q4, "4", 2, block_bytes(Coding::fp4));
    check(q6, "6", planes ? 3 : 2, block_bytes(fp6));
    check(q8, "8", 2, kBlock);
    CHECK_VALUE(!planes || q6.size(0) == 3, name, "6 must have three byte planes, got shape ",
                      text_of(q6.sizes()));
    micromix::QuantizedMatrix result{scale.size(0), scale.size(1), scale.const_data_ptr<uint8_t>(), {}};
    const std::pair<Coding, const Tensor*> parts[] = {{Coding::fp4, &q4}, {fp6, &q6}, {Coding::e4m3, &q8}};
    int64_t first = 0;
    for (size_t i = 0; i < result.segments.size(); ++i) {
      const auto& [coding, tensor] = parts[i];
      const int64_t width = tensor->size(-1), blocks = width / block_bytes(coding);
      result.segments[i] = {coding, tensor->const_data_ptr<uint8_t>(), first, blocks, width, result.rows * width};
      first += blocks;
    }
    CHECK_VALUE(first == result.blocks, name, "_scale must have ", first, " columns, one for each block of ",
                      kBlock, ", got shape ", text_of(scale.sizes()));
    return result;
  }
};

Tensor mixed_mx_mm(const Tensor& x4, const Tensor& x6, const Tensor& x8, const Tensor& x_scale, const Tensor& w4,
                   const Tensor& w6, const Tensor& w8, const Tensor& w_scale, const std::optional<Tensor>& bias,
                   std::string_view fp6, at::ScalarType out_dtype) {
  const Coding planes = parse_fp6(fp6) == Fp6::e2m3 ? Coding::fp6_e2m3_planes : Coding::fp6_e3m2_planes;
  const Packed x{"x", x4.contiguous(), x6.contiguous(), x8.contiguous(), x_scale.contiguous()};
  const Packed w{"w", w4.contiguous(), w6.contiguous(), w8.contiguous(), w_scale.contiguous()};
  const micromix::QuantizedMatrix left = x.matrix(Coding::e4m3), right = w.matrix(planes);
  CHECK_VALUE(left.blocks == right.blocks, "x has K = ", left.blocks * kBlock, ", but w has K = ",
                    right.blocks * kBlock);
  Tensor offsets;
  if (bias.has_value()) {
    CHECK_VALUE(bias->dim() == 1 && bias->size(0) == right.rows, "bias must have shape (", right.rows,
                      ",), got ", text_of(bias->sizes()));
    offsets = bias->to(at::kFloat).contiguous();
  }
  const at::ScalarType kernel_dtype = is_kernel_float(out_dtype) ? out_dtype : at::kFloat;
  const Tensor out = at::empty({left.rows, right.rows}, x_scale.options().dtype(kernel_dtype));
  micromix::mixed_mx_mm(left, right, bias.has_value() ? offsets.const_data_ptr<float>() : nullptr,
                        out.mutable_data_ptr(), kernel_dtype);
  return out.to(out_dtype);
}

// Which rows of x each of `experts` reads, checked: rows as they are, and where the rows of each begin and end.
std::vector<int64_t> ends_of(const Tensor& rows, const Tensor& offs, int64_t tokens, int64_t experts) {
  const std::pair<const char*, const Tensor*> both[] = {{"rows", &rows}, {"offs", &offs}};
  for (const auto& [name, index] : both) {
    CHECK_TYPE(index->scalar_type() == at::kInt, name, " must be int32, got ", name_of(index->dtype()));
    CHECK_VALUE(index->dim() == 1, name, " must be 1-dimensional, got shape ", text_of(index->sizes()));
  }
  CHECK_VALUE(offs.size(0) == experts, "offs must be of the ", experts, " experts of w4, got shape ",
              text_of(offs.sizes()));
  std::vector<int64_t> ends{0};
  const int32_t* given = offs.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert < experts; ++expert) {
    CHECK_VALUE(given[expert] >= ends.back() && given[expert] <= rows.size(0), "offs must ascend from 0 to ",
                rows.size(0), ", got ", given[expert], " behind ", ends.back(), " (expert ", expert, ")");
    ends.push_back(given[expert]);
  }
  const int32_t* read = rows.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < ends.back(); ++row) {
    CHECK_VALUE(read[row] >= 0 && read[row] < tokens, "rows must be from 0 to ", tokens - 1, ", got ", read[row]);
  }
  return ends;
}

Tensor grouped_mx_mm(const Tensor& x4, const Tensor& x6, const Tensor& x8, const Tensor& x_scale, const Tensor& rows,
                     const Tensor& offs, const Tensor& w4, const Tensor& w6, const Tensor& w8, const Tensor& w_scale,
                     const std::optional<Tensor>& bias, std::string_view fp6, at::ScalarType out_dtype) {
  const Coding planes = parse_fp6(fp6) == Fp6::e2m3 ? Coding::fp6_e2m3_planes : Coding::fp6_e3m2_planes;
  CHECK_VALUE(w4.dim() == 3 && w4.size(0) > 0, "w4 must be (E, N, k4 // 2) of at least one expert, got shape ",
              text_of(w4.sizes()));
  const int64_t experts = w4.size(0), columns = w4.size(1);
  const std::pair<const char*, const Tensor*> others[] = {{"w6", &w6}, {"w8", &w8}, {"w_scale", &w_scale}};
  for (const auto& [name, part] : others) {
    CHECK_VALUE(part->dim() > 0 && part->size(0) == experts, name, " must be of the ", experts,
                " experts of w4, got shape ", text_of(part->sizes()));
  }
  Tensor offsets;
  if (bias.has_value()) {
    CHECK_VALUE(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == columns, "bias must have shape (",
                experts, ", ", columns, "), got ", text_of(bias->sizes()));
    offsets = bias->to(at::kFloat).contiguous();
  }
  const Packed x{"x", x4.contiguous(), x6.contiguous(), x8.contiguous(), x_scale.contiguous()};
  x.matrix(Coding::e4m3);  // checks it
  const Tensor read = rows.contiguous();
  const std::vector<int64_t> ends = ends_of(read, offs.contiguous(), x.scale.size(0), experts);
  const at::ScalarType kernel_dtype = is_kernel_float(out_dtype) ? out_dtype : at::kFloat;
  const Tensor out = at::zeros({rows.size(0), columns}, x_scale.options().dtype(kernel_dtype));
  for (int64_t expert = 0; expert < experts; ++expert) {
    const Packed w{"w", w4[expert].contiguous(), w6[expert].contiguous(), w8[expert].contiguous(),
                   w_scale[expert].contiguous()};
    const micromix::QuantizedMatrix right = w.matrix(planes);
    CHECK_VALUE(x.scale.size(1) == right.blocks, "x has K = ", x.scale.size(1) * kBlock, ", but w has K = ",
                right.blocks * kBlock);
    const Tensor own = read.slice(0, ends[expert], ends[expert + 1]);
    if (own.numel() == 0) continue;
    const Packed part{"x", x.q4.index_select(0, own), x.q6.index_select(0, own), x.q8.index_select(0, own),
                      x.scale.index_select(0, own)};
    micromix::mixed_mx_mm(part.matrix(Coding::e4m3), right,
                          bias.has_value() ? offsets.const_data_ptr<float>() + expert * columns : nullptr,
                          out.slice(0, ends[expert], ends[expert + 1]).mutable_data_ptr(), kernel_dtype);
  }
  return out.to(out_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(MICROMIX_NAMESPACE, CPU, m) {
  m.impl("reorder_quantize", &reorder_quantize);
  m.impl("rms_norm_reorder_quantize", &rms_norm_reorder_quantize);
  m.impl("mixed_mx_mm", &mixed_mx_mm);
  m.impl("grouped_mx_mm", &grouped_mx_mm);
}

extern "C" __attribute__((visibility("default"))) const char* micromix_isa() { return micromix::isa_name(); }
