// SPDX-License-Identifier: Apache-2.0
// ReLU, or BatchNorm and ReLU, and the separable convolutions that read them. Passes: statistics 1 where there is a norm,
// convolutions 1 + outputs; backward: convolutions 1 + outputs + 1, and what the norm takes.
#include "separable_group.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../separable.h"
#include "dispatch.h"
#include "mixed_batch_norm.h"

namespace fastnas {

namespace {

// Weights in the dtype that sums are taken in, filled up to so many channels.
template <typename T>
struct Filled {
  std::vector<at::Tensor> tensors;
  std::vector<const acc_type<T>*> pointers;

  Filled(at::TensorList weights, at::ScalarType acc, int64_t channels, bool square) {
    for (const at::Tensor& w : weights) {
      at::Tensor t = as_operand(w, acc, at::MemoryFormat::Contiguous);
      if (w.size(0) != channels) {
        std::vector<int64_t> shape = w.sizes().vec();
        shape[0] = channels;
        if (square) shape[1] = channels;
        t = at::zeros(shape, t.options());
        t.narrow(0, 0, w.size(0)).narrow(1, 0, w.size(1)).copy_(w);
      }
      tensors.push_back(t);
    }
    pointers = const_pointers<acc_type<T>>(tensors);
  }
};

// Sums of filled weights, and what of them belongs to the weights themselves.
struct FilledSums {
  std::vector<std::vector<double>> values;
  int64_t columns;  // of a row

  FilledSums(at::TensorList weights, at::IntArrayRef need, int64_t rows, int64_t columns)
      : columns(columns) {
    for (size_t i = 0; i < weights.size(); ++i)
      values.emplace_back(need[i] ? rows * columns * weights[i].size(2) * weights[i].size(3) : 0);
  }

  std::vector<at::Tensor> as_weights(at::TensorList weights, at::IntArrayRef need) const {
    std::vector<at::Tensor> out;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!need[i]) continue;
      const at::Tensor& w = weights[i];
      const int64_t rows = w.size(0), n = rows ? w.numel() / rows : 0;
      if (w.numel() == static_cast<int64_t>(values[i].size())) {
        out.push_back(from_doubles(values[i], w.sizes(), w.options()));
        continue;
      }
      std::vector<double> mine;
      for (int64_t r = 0; r < rows; ++r) {
        const double* from = values[i].data() + r * columns * w.size(2) * w.size(3);
        mine.insert(mine.end(), from, from + n);
      }
      out.push_back(from_doubles(mine, w.sizes(), w.options()));
    }
    return out;
  }
};

std::vector<at::Tensor> zeros(at::TensorList weights, at::IntArrayRef need) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < weights.size(); ++i)
    if (need[i]) out.push_back(at::zeros(weights[i].sizes(), weights[i].options()));
  return out;
}

template <typename T>
DepthwiseGroup filled(DepthwiseGroup group) {
  group.C = Separable<T>::filled(group.C);
  return group;
}

// What the convolutions read behind a norm, for so many channels; nothing without one.
struct NormSource {
  ForwardCoefficients f;
  bool normalised;

  NormSource(const NormTable& table, bool normalised, int64_t channels) : normalised(normalised) {
    if (!normalised) return;
    f = forward_coefficients(table);
    f.coef.resize(channels);
    f.bias.resize(channels);
  }

  Source source() const {
    return {true, normalised ? &f.coef : nullptr, normalised ? &f.bias : nullptr};
  }
};

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>>
separable_group_cpu(const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
                    const OptionalTensor& beta, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, at::TensorList depthwise,
                    at::TensorList pointwise, at::IntArrayRef dilations, int64_t stride,
                    const OptionalTensor& carrier, bool carry) {
  const char* op = "separable_group";
  const at::NoGradGuard no_grad;
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 0);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), depthwise, dilations, stride);
  check_pointwise(op, group, pointwise, x);
  check_carriers(op, x, given(carrier));
  check_carries(op, carry, x);
  const at::ScalarType dtype = x.scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = make_source_table(op, x, norm);
  if (kind != kPlain) set_running_statistics(op, table, given(running_mean), given(running_var));
  if (x.numel()) set_made_statistics(table, given(carrier));
  const at::Tensor source = as_operand(x, dtype, format);
  std::vector<at::Tensor> ys;
  for (int64_t i = 0; i < group.size(); ++i)
    ys.push_back(at::empty({group.N, group.C, group.oh, group.ow}, x.options(), format));
  std::vector<double> made(carry ? group.size() * 2 * group.C : 0);
  if (ys[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* values = const_pointer<T>(source);
      if (kind != kPlain) batch_statistics(Mix<T>(layout_of(x.sizes(), columns)), {values}, table);
      const DepthwiseGroup whole = filled<T>(group);
      const NormSource read(table, kind != kPlain, whole.C);
      const Filled<T> taps(depthwise, acc, whole.C, false), matrices(pointwise, acc, whole.C, true);
      std::vector<T*> to;
      for (const at::Tensor& y : ys) to.push_back(static_cast<T*>(y.mutable_data_ptr()));
      Separable<T>(whole, columns, read.source(), group.C)
          .forward(values, taps.pointers, matrices.pointers, to, carry ? made.data() : nullptr);
    });
  const at::TensorOptions options =
      x.options().dtype(acc).memory_format(at::MemoryFormat::Contiguous);
  const std::vector<at::Tensor> carriers =
      made_carriers(made, carry ? group.size() : 0, group.C, options);
  if (kind == kPlain) return {ys, at::empty({0}, options), at::empty({0}, options), carriers};
  return {ys, from_doubles(table.mean, {group.C}, options),
          from_doubles(table.var, {group.C}, options), carriers};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor,
           at::Tensor>
separable_group_backward_cpu(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                             const at::Tensor& mean, const at::Tensor& var, int64_t kind,
                             double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                             at::TensorList depthwise, at::TensorList pointwise,
                             at::IntArrayRef dilations, int64_t stride, int64_t need_x,
                             bool need_norm, at::IntArrayRef need_depthwise,
                             at::IntArrayRef need_pointwise, at::TensorList outputs,
                             at::TensorList carried) {
  const char* op = "separable_group_backward";
  const at::NoGradGuard no_grad;
  const SourceNorm norm{kind, eps, gamma, beta};
  const DepthwiseGroup group =
      check_separable_backward(op, grads, present, x, norm, mean, var, depthwise, pointwise,
                               dilations, stride, need_depthwise, need_pointwise, outputs, carried);
  const bool need_source = need_x || (need_norm && kind != kPlain);
  const at::ScalarType dtype = grads[0].scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(x);
  const bool columns = format != at::MemoryFormat::Contiguous;
  NormTable table = make_source_table(op, x, norm);
  if (kind != kPlain) set_statistics(op, table, mean, var);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  const std::vector<at::Tensor> ys = as_operands(outputs, dtype, format);
  const at::Tensor source = as_operand(x, dtype, format);
  const at::TensorOptions plain = grads[0].options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor dh = at::empty({0}, plain);  // of what the ReLU saw
  if (need_source) dh = at::empty(x.sizes(), grads[0].options(), format);
  MixGradients out;
  const bool written = kind != kPlain && need_x == kWritten;
  if (written) out.dxs.push_back(at::empty(x.sizes(), grads[0].options(), format));
  const int64_t rows = need_source && gamma ? 1 : 0;
  out.dgamma = from_doubles(std::vector<double>(rows * group.C), {rows, group.C}, plain.dtype(acc));
  out.dbeta = out.dgamma.clone();
  out.carried = at::empty({0, 4, group.C}, plain.dtype(acc));
  std::vector<at::Tensor> ddepthwise, dpointwise;
  if (grads[0].numel() == 0) {
    const std::vector<double> none(kind != kPlain && need_x == kCarried ? 4 * group.C : 0);
    out.carried = from_doubles(none, {none.empty() ? 0 : 1, 4, group.C}, plain.dtype(acc));
    ddepthwise = zeros(depthwise, need_depthwise);
    dpointwise = zeros(pointwise, need_pointwise);
  } else {
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      std::vector<const T*> g(group.size(), nullptr);
      std::vector<typename Separable<T>::Carried> c(group.size());
      for (int64_t i = 0, j = 0; i < group.size(); ++i) {
        if (!present[i]) continue;
        if (!carried.empty() && carried[j].numel())
          c[i] = {const_pointer<T>(ys[j]), to_doubles(carried[j])};
        g[i] = const_pointer<T>(gs[j++]);
      }
      const T* values = const_pointer<T>(source);
      T* to = need_source ? static_cast<T*>(dh.mutable_data_ptr()) : nullptr;
      const DepthwiseGroup whole = filled<T>(group);
      const NormSource read(table, kind != kPlain, whole.C);
      const Filled<T> taps(depthwise, acc, whole.C, false), matrices(pointwise, acc, whole.C, true);
      FilledSums ddw(depthwise, need_depthwise, whole.C, 1);
      FilledSums dpw(pointwise, need_pointwise, whole.C, whole.C);
      Separable<T>(whole, columns, read.source(), group.C)
          .backward(g, c, values, taps.pointers, matrices.pointers, to, ddw.values, dpw.values);
      ddepthwise = ddw.as_weights(depthwise, need_depthwise);
      dpointwise = dpw.as_weights(pointwise, need_pointwise);
      if (!need_source || kind == kPlain) return;
      const Layout layout = layout_of(x.sizes(), columns);
      T* dx = written ? static_cast<T*>(out.dxs[0].mutable_data_ptr()) : nullptr;
      mix_backward(Mix<T>(layout), layout, Slot<const T>{to, layout.C, 1}, {values}, table, {dx},
                   out, mean.to(acc), false, {need_x});
    });
  }
  at::Tensor dx = at::empty({0}, plain);
  if (need_x) dx = written ? out.dxs[0] : dh;
  return {dx, ddepthwise, dpointwise, out.dgamma, out.dbeta, out.carried};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("separable_group", &fastnas::separable_group_cpu);
  m.impl("separable_group_backward", &fastnas::separable_group_backward_cpu);
}
