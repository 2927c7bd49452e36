// SPDX-License-Identifier: Apache-2.0
// y = sum_k w_k x_k: the inputs are one long plane. Reads K elements and writes one for each of the output.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "dispatch.h"
#include "flat.h"

namespace fastnas {

at::Tensor mixed_sum_cpu(at::TensorList xs, const at::Tensor& weights) {
  check_inputs("mixed_sum", xs, weights);
  check_weights("mixed_sum", weights, xs.size(), xs[0]);
  const at::ScalarType dtype = result_dtype(xs);
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  at::Tensor y = at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format);
  const int64_t n = y.numel(), K = xs.size();
  if (n == 0) return y;
  dispatch("mixed_sum", dtype, [&](auto tag) {
    using T = decltype(tag);
    const RangeKernels<T>& kernels = range_kernels<T>();
    const auto coef = table<acc_type<T>>(to_doubles(weights), kernels.lanes);
    const std::vector<const T*> x = const_pointers<T>(operands);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    parallel_ranges(n, K, [&](int64_t, int64_t begin, int64_t count) {
      std::vector<const T*> at(x);
      for (const T*& p : at) p += begin;
      kernels.combine(at.data(), K, out + begin, count, coef.data(), nullptr, kernels.lanes);
    });
  });
  return y;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> mixed_sum_backward_cpu(const at::Tensor& grad,
                                                                       at::TensorList xs,
                                                                       const at::Tensor& weights,
                                                                       at::IntArrayRef need_xs,
                                                                       bool need_weights) {
  const char* op = "mixed_sum_backward";
  check_floating(op, "grad", grad);
  check_weights(op, weights, need_xs.size(), grad);
  check_saved(op, xs, grad.sizes(), grad);
  TORCH_CHECK_VALUE(!need_weights || xs.size() == need_xs.size(), op, ": expected ", need_xs.size(),
                    " inputs, but got ", xs.size());
  const at::ScalarType dtype = grad.scalar_type();
  const at::MemoryFormat format = memory_format(grad);
  const at::Tensor g = as_operand(grad, dtype, format);
  const int64_t n = g.numel(), K = need_xs.size();
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(grad.sizes(), grad.options(), format));
  at::Tensor dw = at::empty({0}, weights.options());
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    const RangeKernels<T>& kernels = range_kernels<T>();
    const T* gp = const_pointer<T>(g);
    if (need_weights) {
      const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
      const std::vector<double> dots =
          n ? dot_products<T>(gp, const_pointers<T>(operands), n) : std::vector<double>(K);
      dw = from_doubles(dots, {K}, weights.options());
    }
    if (dxs.empty() || n == 0) return;
    const auto coef = table<acc_type<T>>(to_doubles(weights), kernels.lanes);
    const std::vector<const T*> none(K, nullptr);
    std::vector<T*> to(K, nullptr);
    for (int64_t k = 0, i = 0; k < K; ++k)
      if (need_xs[k]) to[k] = static_cast<T*>(dxs[i++].mutable_data_ptr());
    parallel_ranges(n, K, [&](int64_t, int64_t begin, int64_t count) {
      std::vector<T*> at(to);
      for (T*& p : at)
        if (p) p += begin;
      kernels.gradients(gp + begin, none.data(), at.data(), K, count, coef.data(), nullptr, nullptr,
                        nullptr, kernels.lanes);
    });
  });
  return {dxs, dw};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("mixed_sum", &fastnas::mixed_sum_cpu);
  m.impl("mixed_sum_backward", &fastnas::mixed_sum_backward_cpu);
}
