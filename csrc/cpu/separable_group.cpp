// SPDX-License-Identifier: Apache-2.0
// ReLU, or BatchNorm and ReLU, and the separable convolutions that read them. Passes: statistics 1 where there is a norm,
// convolutions 1 + outputs; backward: convolutions 1 + outputs + 1, and what the norm takes.
#include "separable_group.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "../separable.h"
#include "dispatch.h"
#include "mixed_batch_norm.h"

namespace fastnas {

std::vector<at::Tensor> depthwise_group_cpu(const at::Tensor& x, at::TensorList weights,
                                            at::IntArrayRef dilations, int64_t stride, bool relu);
std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward_cpu(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights);
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise_cpu(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride);
std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
batch_norm_depthwise_backward_cpu(at::TensorList grads, at::IntArrayRef present,
                                  const at::Tensor& x, const at::Tensor& mean,
                                  const at::Tensor& var, int64_t kind, double eps,
                                  const OptionalTensor& gamma, const OptionalTensor& beta,
                                  at::TensorList weights, at::IntArrayRef dilations, int64_t stride,
                                  bool need_x, bool need_norm, at::IntArrayRef need_weights);

namespace {

struct CpuOps {
  static constexpr auto depthwise_group = depthwise_group_cpu;
  static constexpr auto depthwise_group_backward = depthwise_group_backward_cpu;
  static constexpr auto batch_norm_depthwise = batch_norm_depthwise_cpu;
  static constexpr auto batch_norm_depthwise_backward = batch_norm_depthwise_backward_cpu;
};

SeparableComposition<CpuOps> composition(const at::Tensor& x, const SourceNorm& norm,
                                         at::TensorList depthwise, at::TensorList pointwise,
                                         at::IntArrayRef dilations, int64_t stride) {
  return {x, norm, depthwise, pointwise, dilations, stride, accumulate_dtype(x.scalar_type())};
}

bool is_fused(const at::Tensor& x) {
  bool fits = false;
  dispatch("separable_group", x.scalar_type(),
           [&](auto tag) { fits = Separable<decltype(tag)>::fits(x.size(1)); });
  return fits;
}

std::vector<at::Tensor> given(const OptionalTensor& t) {
  return t ? std::vector<at::Tensor>{*t} : std::vector<at::Tensor>{};
}

// The norm as the only row of a table whose weight is 1; none has a plain row.
NormTable norm_table(const char* op, const at::Tensor& x, const SourceNorm& norm) {
  const at::Tensor one =
      at::empty({1}, x.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
  *one.mutable_data_ptr<double>() = 1;
  const int64_t affine = norm.gamma.has_value();
  return make_norm_table(op, x.size(1), one, {norm.kind}, {norm.eps}, {affine}, given(norm.gamma),
                         given(norm.beta));
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> separable_group_cpu(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList depthwise, at::TensorList pointwise,
    at::IntArrayRef dilations, int64_t stride) {
  const char* op = "separable_group";
  const at::NoGradGuard no_grad;
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), depthwise, dilations, stride);
  check_pointwise(op, group, pointwise, x);
  if (!is_fused(x))
    return composition(x, norm, depthwise, pointwise, dilations, stride)
        .forward(running_mean, running_var);
  const at::ScalarType dtype = x.scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = norm_table(op, x, norm);
  if (kind != kPlain) set_running_statistics(op, table, given(running_mean), given(running_var));
  const at::Tensor source = as_operand(x, dtype, format);
  const auto dw = as_operands(depthwise, acc, at::MemoryFormat::Contiguous);
  const auto pw = as_operands(pointwise, acc, at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> ys;
  for (int64_t i = 0; i < group.size(); ++i)
    ys.push_back(at::empty({group.N, group.C, group.oh, group.ow}, x.options(), format));
  if (ys[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* values = const_pointer<T>(source);
      ForwardCoefficients f;
      if (kind != kPlain) {
        batch_statistics(Mix<T>(layout_of(x.sizes(), columns)), {values}, table);
        f = forward_coefficients(table);
      }
      std::vector<T*> to;
      for (const at::Tensor& y : ys) to.push_back(static_cast<T*>(y.mutable_data_ptr()));
      const Source read{true, kind == kPlain ? nullptr : &f.coef,
                        kind == kPlain ? nullptr : &f.bias};
      Separable<T>(group, columns, read)
          .forward(values, const_pointers<acc_type<T>>(dw), const_pointers<acc_type<T>>(pw), to);
    });
  const at::TensorOptions options =
      x.options().dtype(acc).memory_format(at::MemoryFormat::Contiguous);
  if (kind == kPlain) return {ys, at::empty({0}, options), at::empty({0}, options)};
  return {ys, from_doubles(table.mean, {group.C}, options),
          from_doubles(table.var, {group.C}, options)};
}

namespace {

std::vector<std::vector<double>> zeros(at::TensorList weights, at::IntArrayRef need) {
  std::vector<std::vector<double>> out;
  for (size_t i = 0; i < weights.size(); ++i) out.emplace_back(need[i] ? weights[i].numel() : 0);
  return out;
}

std::vector<at::Tensor> as_weights(const std::vector<std::vector<double>>& sums,
                                   at::TensorList weights, at::IntArrayRef need) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < weights.size(); ++i)
    if (need[i]) out.push_back(from_doubles(sums[i], weights[i].sizes(), weights[i].options()));
  return out;
}

}  // namespace

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor>
separable_group_backward_cpu(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                             const at::Tensor& mean, const at::Tensor& var, int64_t kind,
                             double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                             at::TensorList depthwise, at::TensorList pointwise,
                             at::IntArrayRef dilations, int64_t stride, bool need_x, bool need_norm,
                             at::IntArrayRef need_depthwise, at::IntArrayRef need_pointwise) {
  const char* op = "separable_group_backward";
  const at::NoGradGuard no_grad;
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm);
  const bool need_source = need_x || (need_norm && kind != kPlain);
  const DepthwiseGroup group =
      check_depthwise_backward(op, grads, present, x, x.sizes().slice(2), depthwise, dilations,
                               stride, true, true, need_depthwise);
  check_pointwise(op, group, pointwise, x);
  TORCH_CHECK_VALUE(need_pointwise.size() == pointwise.size(), op,
                    ": expected need_pointwise of one entry per weight, but got ",
                    need_pointwise.size());
  const at::ScalarType dtype = grads[0].scalar_type(), acc = accumulate_dtype(dtype);
  if (!is_fused(x))
    return composition(x, norm, depthwise, pointwise, dilations, stride)
        .backward(grads, present, mean, var, need_x, need_norm, need_depthwise, need_pointwise)
        .tuple();
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = norm_table(op, x, norm);
  ForwardCoefficients f;
  if (kind != kPlain) {
    set_statistics(op, table, mean, var);
    f = forward_coefficients(table);
  }
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  const at::Tensor source = as_operand(x, dtype, format);
  const auto dw = as_operands(depthwise, acc, at::MemoryFormat::Contiguous);
  const auto pw = as_operands(pointwise, acc, at::MemoryFormat::Contiguous);
  const at::TensorOptions plain = grads[0].options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor dh = at::empty({0}, plain);  // of what the ReLU saw
  if (need_source) dh = at::empty(x.sizes(), grads[0].options(), format);
  MixGradients out;
  if (need_x && kind != kPlain) out.dxs.push_back(at::empty(x.sizes(), grads[0].options(), format));
  const int64_t rows = need_source && gamma ? 1 : 0;
  out.dgamma = from_doubles(std::vector<double>(rows * group.C), {rows, group.C}, plain.dtype(acc));
  out.dbeta = out.dgamma.clone();
  std::vector<std::vector<double>> ddw = zeros(depthwise, need_depthwise);
  std::vector<std::vector<double>> dpw = zeros(pointwise, need_pointwise);
  if (grads[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      std::vector<const T*> g(group.size(), nullptr);
      for (int64_t i = 0, j = 0; i < group.size(); ++i)
        if (present[i]) g[i] = const_pointer<T>(gs[j++]);
      const T* values = const_pointer<T>(source);
      T* to = need_source ? static_cast<T*>(dh.mutable_data_ptr()) : nullptr;
      const Source read{true, kind == kPlain ? nullptr : &f.coef,
                        kind == kPlain ? nullptr : &f.bias};
      Separable<T>(group, columns, read)
          .backward(g, values, const_pointers<acc_type<T>>(dw), const_pointers<acc_type<T>>(pw), to,
                    ddw, dpw);
      if (!need_source || kind == kPlain) return;
      const Layout layout = layout_of(x.sizes(), columns);
      T* dx = need_x ? static_cast<T*>(out.dxs[0].mutable_data_ptr()) : nullptr;
      mix_backward(Mix<T>(layout), layout, Slot<const T>{to, layout.C, 1}, {values}, table, {dx},
                   out, mean.to(acc), false);
    });
  at::Tensor dx = at::empty({0}, plain);
  if (need_x) dx = kind == kPlain ? dh : out.dxs[0];
  return {dx, as_weights(ddw, depthwise, need_depthwise),
          as_weights(dpw, pointwise, need_pointwise), out.dgamma, out.dbeta};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("separable_group", &fastnas::separable_group_cpu);
  m.impl("separable_group_backward", &fastnas::separable_group_backward_cpu);
}
