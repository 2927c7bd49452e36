// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions of one source, ReLU inside. x is packed once for all of them (planes.h); the backward packs
// each output gradient once for both of its uses.
#include "depthwise_group.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../depthwise.h"
#include "dispatch.h"

namespace fastnas {

namespace {

// Weights in the dtype that sums are taken in, and pointers to them.
std::vector<at::Tensor> as_sums(at::TensorList weights, at::ScalarType dtype) {
  return as_operands(weights, accumulate_dtype(dtype), at::MemoryFormat::Contiguous);
}

}  // namespace

std::vector<at::Tensor> depthwise_group_cpu(const at::Tensor& x, at::TensorList weights,
                                            at::IntArrayRef dilations, int64_t stride, bool relu) {
  const char* op = "depthwise_group";
  check_floating(op, "x", x);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, x.scalar_type(), format);
  const std::vector<at::Tensor> w = as_sums(weights, x.scalar_type());
  std::vector<at::Tensor> ys;
  for (int64_t i = 0; i < group.size(); ++i)
    ys.push_back(at::empty({group.N, group.C, group.oh, group.ow}, x.options(), format));
  if (ys[0].numel() == 0) return ys;
  dispatch(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    std::vector<T*> to;
    for (const at::Tensor& y : ys) to.push_back(static_cast<T*>(y.mutable_data_ptr()));
    Depthwise<T>(group, format != at::MemoryFormat::Contiguous, Source{relu})
        .forward(const_pointer<T>(source), const_pointers<acc_type<T>>(w), to);
  });
  return ys;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward_cpu(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights) {
  const char* op = "depthwise_group_backward";
  const DepthwiseGroup group = check_depthwise_backward(
      op, grads, present, x, size, weights, dilations, stride, relu, need_x, need_weights);
  const at::ScalarType dtype = grads[0].scalar_type();
  const at::MemoryFormat format = memory_format(x.dim() == 4 ? x : grads[0]);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  const at::Tensor source = x.numel() ? as_operand(x, dtype, format) : x;
  const std::vector<at::Tensor> w = as_sums(weights, dtype);
  at::Tensor dx = at::empty({0}, grads[0].options());
  if (need_x) dx = at::empty({group.N, group.C, group.H, group.W}, grads[0].options(), format);
  std::vector<std::vector<double>> sums;
  for (int64_t i = 0; i < group.size(); ++i)
    sums.emplace_back(need_weights[i] ? group.C * group.convolutions[i].taps() : 0);
  if (grads[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      std::vector<const T*> g(group.size(), nullptr);
      for (int64_t i = 0, j = 0; i < group.size(); ++i)
        if (present[i]) g[i] = const_pointer<T>(gs[j++]);
      Depthwise<T>(group, format != at::MemoryFormat::Contiguous, Source{relu})
          .backward(g, const_pointer<T>(source), const_pointers<acc_type<T>>(w),
                    need_x ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr, sums);
    });
  std::vector<at::Tensor> dws;
  for (int64_t i = 0; i < group.size(); ++i)
    if (need_weights[i])
      dws.push_back(from_doubles(sums[i], weights[i].sizes(), weights[i].options()));
  return {dx, dws};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("depthwise_group", &fastnas::depthwise_group_cpu);
  m.impl("depthwise_group_backward", &fastnas::depthwise_group_backward_cpu);
}
