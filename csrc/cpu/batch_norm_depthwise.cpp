// SPDX-License-Identifier: Apache-2.0
// BatchNorm, ReLU and depthwise convolutions of one source. Passes: statistics 1, convolutions 1 + outputs; backward:
// convolutions (gradients of what the ReLU saw), reduction 2, gradients 3. Normalised and rectified values are made
// where the convolutions load them and are never written.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "../depthwise.h"
#include "depthwise_group.h"
#include "dispatch.h"
#include "mixed_batch_norm.h"

namespace fastnas {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::vector<at::Tensor> given(const OptionalTensor& t) {
  return t ? std::vector<at::Tensor>{*t} : std::vector<at::Tensor>{};
}

// The norm as the only row of a table whose weight is 1.
NormTable norm_table(const char* op, const at::Tensor& x, int64_t kind, double eps,
                     const OptionalTensor& gamma, const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(kind == kBatch || kind == kRunning, op, ": expected kind 1 or 2, but got ",
                    kind);
  TORCH_CHECK_VALUE(gamma.has_value() == beta.has_value(), op,
                    ": expected gamma and beta or neither");
  const at::Tensor one =
      at::empty({1}, x.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
  *one.mutable_data_ptr<double>() = 1;
  const int64_t affine = gamma.has_value();
  return make_norm_table(op, x.size(1), one, {kind}, {eps}, {affine}, given(gamma), given(beta));
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise_cpu(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride) {
  const char* op = "batch_norm_depthwise";
  check_floating(op, "x", x);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const at::ScalarType dtype = x.scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = norm_table(op, x, kind, eps, gamma, beta);
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
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected x of shape (N, C, H, W), but got ", x.sizes());
  const std::vector<int64_t> size{x.size(2), x.size(3)};
  const bool need_source = need_x || need_norm;
  const DepthwiseGroup group = check_depthwise_backward(
      op, grads, present, x, size, weights, dilations, stride, true, need_source, need_weights);
  const at::ScalarType dtype = grads[0].scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = norm_table(op, x, kind, eps, gamma, beta);
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
