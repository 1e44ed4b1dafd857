// How the ops read their arguments and what they say of bad ones.
#pragma once

#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "mx_formats.h"

#ifndef MICROMIX_NAMESPACE
#define MICROMIX_NAMESPACE micromix
#endif

// Messages are put together without iostream: where a toolchain links libstdc++ statically, its locales are not those
// of the libstdc++ that torch loaded, and a stream crashes.
#define CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, micromix::concat(__VA_ARGS__))
#define CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, micromix::concat(__VA_ARGS__))

namespace micromix {

inline void append(std::string& text, std::string_view part) { text += part; }
inline void append(std::string& text, int64_t number) { text += std::to_string(number); }

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

// "torch.float64" and "(3, 4)", as Python's messages have them.
inline std::string name_of(const caffe2::TypeMeta dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype.toScalarType()).first);
}

inline std::string text_of(at::IntArrayRef shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

inline ScaleRounding parse_rounding(std::string_view name) {
  if (name == "floor") return ScaleRounding::floor;
  if (name == "rceil") return ScaleRounding::rceil;
  if (name == "even") return ScaleRounding::even;
  CHECK_VALUE(name == "fit", "'", name, "' is not a valid ScaleRounding");
  return ScaleRounding::fit;
}

inline bool is_kernel_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

}  // namespace micromix
