// SPDX-License-Identifier: Apache-2.0
// BatchNorm, ReLU and depthwise convolutions of one source. Passes: statistics 1, convolutions 1 + outputs; backward:
// convolutions (gradients of what the ReLU saw), reduction 2, gradients 3. Normalised and rectified values are made
// where the convolutions load them and are never written.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../depthwise.h"
#include "depthwise_group.h"
#include "dispatch.h"
#include "mixed_batch_norm.h"

namespace fastnas {

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise_cpu(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride) {
  const char* op = "batch_norm_depthwise";
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 1);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const at::ScalarType dtype = x.scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = make_source_table(op, x, norm);
  set_running_statistics(op, table, given(running_mean), given(running_var));
  const at::Tensor source = as_operand(x, dtype, format);
  const std::vector<at::Tensor> w = as_operands(weights, acc, at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> ys;
  for (int64_t i = 0; i < group.size(); ++i)
    ys.push_back(at::empty({group.N, group.C, group.oh, group.ow}, x.options(), format));
  if (ys[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* values = const_pointer<T>(source);
      batch_statistics(Mix<T>(layout_of(x.sizes(), columns)), {values}, table);
      const ForwardCoefficients f = forward_coefficients(table);
      std::vector<T*> to;
      for (const at::Tensor& y : ys) to.push_back(static_cast<T*>(y.mutable_data_ptr()));
      Depthwise<T>(group, columns, Source{true, &f.coef, &f.bias})
          .forward(values, const_pointers<acc_type<T>>(w), to);
    });
  const at::TensorOptions options =
      x.options().dtype(acc).memory_format(at::MemoryFormat::Contiguous);
  return {ys, from_doubles(table.mean, {group.C}, options),
          from_doubles(table.var, {group.C}, options)};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
batch_norm_depthwise_backward_cpu(at::TensorList grads, at::IntArrayRef present,
                                  const at::Tensor& x, const at::Tensor& mean,
                                  const at::Tensor& var, int64_t kind, double eps,
                                  const OptionalTensor& gamma, const OptionalTensor& beta,
                                  at::TensorList weights, at::IntArrayRef dilations, int64_t stride,
                                  bool need_x, bool need_norm, at::IntArrayRef need_weights) {
  const char* op = "batch_norm_depthwise_backward";
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 1);
  check_source_statistics(op, x, norm, mean, var);
  const std::vector<int64_t> size{x.size(2), x.size(3)};
  const bool need_source = need_x || need_norm;
  const DepthwiseGroup group = check_depthwise_backward(
      op, grads, present, x, size, weights, dilations, stride, true, need_source, need_weights);
  const at::ScalarType dtype = grads[0].scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = make_source_table(op, x, norm);
  set_statistics(op, table, mean, var);
  const ForwardCoefficients f = forward_coefficients(table);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  const at::Tensor source = as_operand(x, dtype, format);
  const std::vector<at::Tensor> w = as_operands(weights, acc, at::MemoryFormat::Contiguous);
  const at::TensorOptions plain = grads[0].options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor dh = at::empty({0}, plain);  // of what the ReLU saw
  if (need_source) dh = at::empty(x.sizes(), grads[0].options(), format);
  MixGradients out;
  if (need_x) out.dxs.push_back(at::empty(x.sizes(), grads[0].options(), format));
  const int64_t rows = need_source && gamma ? 1 : 0;
  out.dgamma = from_doubles(std::vector<double>(rows * group.C), {rows, group.C}, plain.dtype(acc));
  out.dbeta = from_doubles(std::vector<double>(rows * group.C), {rows, group.C}, plain.dtype(acc));
  std::vector<std::vector<double>> sums;
  for (int64_t i = 0; i < group.size(); ++i)
    sums.emplace_back(need_weights[i] ? group.C * group.convolutions[i].taps() : 0);
  if (grads[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      std::vector<const T*> g(group.size(), nullptr);
      for (int64_t i = 0, j = 0; i < group.size(); ++i)
        if (present[i]) g[i] = const_pointer<T>(gs[j++]);
      const T* values = const_pointer<T>(source);
      T* to = need_source ? static_cast<T*>(dh.mutable_data_ptr()) : nullptr;
      Depthwise<T>(group, columns, Source{true, &f.coef, &f.bias})
          .backward(g, values, const_pointers<acc_type<T>>(w), to, sums);
      if (!need_source) return;
      const Layout layout = layout_of(x.sizes(), columns);
      T* dx = need_x ? static_cast<T*>(out.dxs[0].mutable_data_ptr()) : nullptr;
      mix_backward(Mix<T>(layout), layout, Slot<const T>{to, layout.C, 1}, {values}, table, {dx},
                   out, mean.to(acc), false);
    });
  std::vector<at::Tensor> dws;
  for (int64_t i = 0; i < group.size(); ++i)
    if (need_weights[i])
      dws.push_back(from_doubles(sums[i], weights[i].sizes(), weights[i].options()));
  return {need_x ? out.dxs[0] : at::empty({0}, plain), dws, out.dgamma, out.dbeta};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("batch_norm_depthwise", &fastnas::batch_norm_depthwise_cpu);
  m.impl("batch_norm_depthwise_backward", &fastnas::batch_norm_depthwise_backward_cpu);
}
