// SPDX-License-Identifier: Apache-2.0
// From torch's dtypes to the kernels' storage types.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "scalar_types.h"

namespace fastnas {

// Calls f with a value of the storage type that stands for `dtype`.
template <typename F>
void dispatch(const char* op, at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, float64, float16 or bfloat16, but got ",
                       dtype);
  }
}

template <typename T>
const T* const_pointer(const at::Tensor& x) {
  return x.numel() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

template <typename T>
std::vector<const T*> const_pointers(at::TensorList xs) {
  std::vector<const T*> out;
  for (const at::Tensor& x : xs) out.push_back(const_pointer<T>(x));
  return out;
}

template <typename T>
std::vector<T*> pointers_to(at::TensorList xs) {
  std::vector<T*> out;
  for (const at::Tensor& x : xs)
    out.push_back(x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr);
  return out;
}

inline std::vector<double> to_doubles(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat && t.is_contiguous()) {
    const float* p = t.const_data_ptr<float>();
    return {p, p + t.numel()};
  }
  const at::Tensor d = t.to(at::kDouble).contiguous();
  const double* p = d.const_data_ptr<double>();
  return {p, p + d.numel()};
}

inline at::Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef shape,
                               const at::TensorOptions& options) {
  at::Tensor t = at::empty(shape, options);
  if (t.scalar_type() == at::kFloat) {  // without a detour: these are many and small
    std::copy(values.begin(), values.end(), t.mutable_data_ptr<float>());
    return t;
  }
  at::Tensor d = at::empty(shape, options.dtype(at::kDouble));
  std::copy(values.begin(), values.end(), d.mutable_data_ptr<double>());
  return d.to(t.scalar_type());
}

}  // namespace fastnas
