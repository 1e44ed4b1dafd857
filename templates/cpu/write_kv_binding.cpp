// The op of micromix_compile/ops/kv_cache.py for CPU tensors: checks every argument, then calls the kernel.
#include <string_view>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "arguments.h"
#include "write_kv.h"

namespace {

using at::Tensor;
using micromix::concat;
using micromix::name_of;
using micromix::text_of;

std::string text_of_front(const Tensor& key, int64_t length) {
  return text_of({key.size(0), key.size(1), length});
}

void check_part(const std::string& name, const Tensor& part, const Tensor& x, int64_t length) {
  CHECK_TYPE(part.scalar_type() == at::kByte, name, " must be uint8, got ", name_of(part.dtype()));
  CHECK_VALUE(part.dim() == 4 && part.is_contiguous(), name, " must be 4-dimensional and contiguous, got shape ",
              text_of(part.sizes()));
  CHECK_VALUE(part.size(0) == x.size(0) && part.size(1) == x.size(1) && part.size(2) == length, name,
              " must begin with (B, H, L) = ", text_of_front(x, length), ", got shape ", text_of(part.sizes()));
}

micromix::CachedStates states_of(const std::string& letter, const Tensor& x, const Tensor& q, const Tensor& scale,
                                 int64_t length) {
  check_part(letter + "_q", q, x, length);
  check_part(letter + "_scale", scale, x, length);
  const int64_t channels = x.size(3), blocks = scale.size(3);
  CHECK_VALUE(q.size(3) == channels, letter, "_q must have heads of ", channels, " channels, got shape ",
              text_of(q.sizes()));
  CHECK_VALUE(blocks > 0 && channels > 0 && channels % blocks == 0, letter, "_scale must have whole blocks of ", channels,
              " channels, got ", text_of(scale.sizes()));
  return {x.const_data_ptr(),  channels,          x.stride(0), x.stride(1), x.stride(2), channels / blocks,
          q.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<uint8_t>()};
}

void check_new_states(const Tensor& key, const Tensor& value, const Tensor& position) {
  CHECK_TYPE(position.scalar_type() == at::kInt || position.scalar_type() == at::kLong,
             "position must be int32 or int64, got ", name_of(position.dtype()));
  CHECK_VALUE(key.dim() == 4 && position.dim() == 1 && position.size(0) == key.size(2),
              "key must be (B, H, T, D) and position (T,), got shapes ", text_of(key.sizes()), " and ",
              text_of(position.sizes()));
  CHECK_VALUE(value.dim() == 4 && value.sizes().slice(0, 3) == key.sizes().slice(0, 3) && value.dtype() == key.dtype(),
              "value must be (B, H, T, D) ", name_of(key.dtype()), " with ", text_of(key.sizes().slice(0, 3)),
              " in front as key has, got ", text_of(value.sizes()), " ", name_of(value.dtype()));
  CHECK_TYPE(micromix::is_kernel_float(key.scalar_type()), "key and value must be float32, bfloat16 or float16, got ",
             name_of(key.dtype()));
}

Tensor unit_channel_stride(const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

void write_kv(const Tensor& key, const Tensor& value, const Tensor& position, const Tensor& k_q, const Tensor& k_scale,
              const Tensor& v_q, const Tensor& v_scale, std::string_view scale_rounding) {
  const micromix::ScaleRounding rounding = micromix::parse_rounding(scale_rounding);
  check_new_states(key, value, position);
  const Tensor keys = unit_channel_stride(key), values = unit_channel_stride(value);
  const int64_t length = k_q.dim() == 4 ? k_q.size(2) : 0;
  const micromix::CachedStates k = states_of("k", keys, k_q, k_scale, length);
  const micromix::CachedStates v = states_of("v", values, v_q, v_scale, length);
  const Tensor positions = position.to(at::kLong).contiguous();
  const int64_t* at = positions.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < positions.size(0); ++token) {
    CHECK_VALUE(at[token] >= 0 && at[token] < length, "position must be from 0 to ", length - 1, ", got ", at[token],
                ": the cache holds ", length, " tokens");
  }
  micromix::write_kv(k, v, {key.size(0), key.size(1), key.size(2), length, key.scalar_type(), at, rounding});
}

}  // namespace

TORCH_LIBRARY_IMPL(MICROMIX_NAMESPACE, CPU, m) { m.impl("write_kv", &write_kv); }
