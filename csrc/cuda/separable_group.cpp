// SPDX-License-Identifier: Apache-2.0
// Separable convolutions, on CUDA: depthwise convolutions that normalise what they read, then the products of all of them
// (products.h), or the library's pointwise convolutions where channels are many. What is between two convolutions is
// computed again in the backward, so that nothing but sources is kept.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "products_host.h"
#include "separable_host.h"

namespace fastnas::cuda {

namespace {

bool any_of(at::IntArrayRef list) {
  return std::any_of(list.begin(), list.end(), [](int64_t i) { return i != 0; });
}

std::vector<at::Tensor> pointwise(const Depthwise& d, const std::vector<at::Tensor>& hs,
                                  at::TensorList weights) {
  if (hs[0].numel() == 0) return hs;  // convolutions refuse images without pixels
  if (few_channels(d.group.C, d.group.C)) return multiply(hs, weights.vec(), d.format, false);
  std::vector<at::Tensor> ys;
  const at::ScalarType dtype = d.like.scalar_type();
  for (size_t i = 0; i < hs.size(); ++i)
    ys.push_back(
        at::convolution(hs[i], weights[i].to(dtype), {}, {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 1)
            .to(dtype, false, false, d.format));
  return ys;
}

// The gradients of what the products read, and of the weights that need one. gs and hs: of the present ones.
struct PointwiseGradients {
  std::vector<at::Tensor> dhs, dweights;
};

PointwiseGradients pointwise_backward(const Depthwise& d, const std::vector<at::Tensor>& gs,
                                      const std::vector<at::Tensor>& hs,
                                      const std::vector<at::Tensor>& weights, bool need_hs,
                                      const std::vector<bool>& need) {
  PointwiseGradients out;
  const at::ScalarType dtype = d.like.scalar_type();
  const bool few = few_channels(d.group.C, d.group.C), pixels = gs[0].numel() > 0;
  out.dhs = gs;  // gradients that nobody needs stand in the list all the same
  std::vector<at::Tensor> some_gs, some_hs, some_weights;
  for (size_t i = 0; i < gs.size(); ++i) {
    if (!pixels) {
      if (need[i]) out.dweights.push_back(at::zeros_like(weights[i]));
    } else if (few) {
      if (!need[i]) continue;
      some_gs.push_back(gs[i]);
      some_hs.push_back(hs[i]);
      some_weights.push_back(weights[i]);
    } else {
      if (!need_hs && !need[i]) continue;
      // An output that no weight's gradient asks for was not computed: something of its shape stands for it.
      const at::Tensor& h = need[i] ? hs[i] : gs[i];
      auto [dh, dw, db] =
          at::convolution_backward(gs[i], h, weights[i].to(dtype), std::nullopt, {1, 1}, {0, 0},
                                   {1, 1}, false, {0, 0}, 1, {need_hs, need[i], false});
      if (need_hs) out.dhs[i] = dh.to(dtype, false, false, d.format);
      if (need[i]) out.dweights.push_back(dw.to(weights[i].scalar_type()));
    }
  }
  if (!few || !pixels) return out;
  if (need_hs) out.dhs = multiply(gs, weights, d.format, true);
  if (!some_gs.empty()) out.dweights = multiply_backward(some_gs, some_hs, some_weights, d.format);
  return out;
}

}  // namespace

std::vector<at::Tensor> convolve_separably(Depthwise& d, at::TensorList pointwise) {
  add_weights(d);
  return cuda::pointwise(d, convolve(d), pointwise);
}

SeparableGradients separable_backward(Depthwise& d, const std::vector<at::Tensor>& gs,
                                      at::IntArrayRef present, const NormArguments* norms,
                                      const at::Tensor& mean, const at::Tensor& var,
                                      at::TensorList pointwise, at::IntArrayRef need_xs,
                                      at::IntArrayRef need_norms, at::IntArrayRef need_depthwise,
                                      at::IntArrayRef need_pointwise) {
  add_weights(d);
  const bool need_hs = any_of(need_xs) || any_of(need_norms) || any_of(need_depthwise);
  const std::vector<at::Tensor> all =
      any_of(need_pointwise) ? convolve(d) : std::vector<at::Tensor>(d.group.size());
  std::vector<at::Tensor> hs, weights;
  std::vector<bool> need;
  for (size_t i = 0; i < all.size(); ++i) {
    if (!present[i]) continue;
    hs.push_back(all[i]);
    weights.push_back(pointwise[i]);
    need.push_back(need_pointwise[i] != 0);
  }
  const PointwiseGradients between = pointwise_backward(d, gs, hs, weights, need_hs, need);
  SeparableGradients out;
  for (size_t i = 0, j = 0; i < all.size(); ++i)  // with zeros for outputs that are absent
    if (need_pointwise[i])
      out.dpointwise.push_back(present[i] ? between.dweights[j++] : at::zeros_like(pointwise[i]));
  out.source = source_backward(d, output_gradients(between.dhs, present), norms, mean, var, need_xs,
                               need_norms, need_depthwise);
  return out;
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>>
separable_group(const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
                const OptionalTensor& beta, const OptionalTensor& running_mean,
                const OptionalTensor& running_var, at::TensorList depthwise,
                at::TensorList pointwise, at::IntArrayRef dilations, int64_t stride,
                const OptionalTensor& carrier, bool carry) {
  const char* op = "separable_group";
  check_no_carriers(op, given(carrier), carry);
  const at::NoGradGuard no_grad;
  // Autocast would take the products of x in float32 behind a norm in half, forward but not backward.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 0);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), depthwise, dilations, stride);
  check_pointwise(op, group, pointwise, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  Depthwise d =
      make_depthwise(group, {as_operand(x, x.scalar_type(), format)}, x, format, depthwise, true);
  Coefficients f;
  if (kind != 0) {
    f = normalise_sources(d, make_source_norms(op, x, norm, running_mean, running_var));
    f.mean = f.mean.view({-1});
    f.var = f.var.view({-1});
  } else {  // two tensors: outputs of an op do not share their memory
    f.mean = scratch(0, d.acc(), x);
    f.var = scratch(0, d.acc(), x);
  }
  return {convolve_separably(d, pointwise), f.mean, f.var, {}};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor,
           at::Tensor>
separable_group_backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                         const at::Tensor& mean, const at::Tensor& var, int64_t kind, double eps,
                         const OptionalTensor& gamma, const OptionalTensor& beta,
                         at::TensorList depthwise, at::TensorList pointwise,
                         at::IntArrayRef dilations, int64_t stride, int64_t need_x, bool need_norm,
                         at::IntArrayRef need_depthwise, at::IntArrayRef need_pointwise,
                         at::TensorList outputs, at::TensorList carried) {
  const char* op = "separable_group_backward";
  const at::NoGradGuard no_grad;
  // Autocast would take the products of x in float32 behind a norm in half, forward but not backward.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const SourceNorm norm{kind, eps, gamma, beta};
  const DepthwiseGroup group =
      check_separable_backward(op, grads, present, x, norm, mean, var, depthwise, pointwise,
                               dilations, stride, need_depthwise, need_pointwise, outputs, carried);
  check_written(op, need_x);
  check_no_carriers(op, carried);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType dtype = grads[0].scalar_type();
  const at::MemoryFormat format = memory_format(x);
  Depthwise d =
      make_depthwise(group, {as_operand(x, dtype, format)}, grads[0], format, depthwise, true);
  const at::Tensor means = as_operand(mean, d.acc(), at::MemoryFormat::Contiguous).view({1, -1});
  const at::Tensor vars = as_operand(var, d.acc(), at::MemoryFormat::Contiguous).view({1, -1});
  std::optional<NormArguments> norms;
  Coefficients f;
  if (kind != 0) {
    norms = make_source_norms(op, x, norm, means, vars);
    f = normalise_sources(d, by_statistics(*norms, means, vars));
  }
  const SeparableGradients out = separable_backward(
      d, as_operands(grads, dtype, format), present, norms ? &*norms : nullptr, means, vars,
      pointwise, {need_x}, {need_norm}, need_depthwise, need_pointwise);
  const SourceGradients& source = out.source;
  const at::Tensor dx = need_x ? source.dxs[0] : at::empty({0}, d.like.options());
  return {dx,
          source.dweights,
          out.dpointwise,
          source.dgamma,
          source.dbeta,
          at::empty({0, 4, x.size(1)}, source.dgamma.options())};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("separable_group", &fastnas::cuda::separable_group);
  m.impl("separable_group_backward", &fastnas::cuda::separable_group_backward);
}
