// SPDX-License-Identifier: Apache-2.0
// Separable convolutions of one source, on CUDA: the ops that they are made of, one after the other. What is between
// two convolutions is computed again in the backward, so that nothing but x is kept.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../separable.h"
#include "host.h"

namespace fastnas::cuda {

std::vector<at::Tensor> depthwise_group(const at::Tensor& x, at::TensorList weights,
                                        at::IntArrayRef dilations, int64_t stride, bool relu);
std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights);
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride);
std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
batch_norm_depthwise_backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                              const at::Tensor& mean, const at::Tensor& var, int64_t kind,
                              double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                              at::TensorList weights, at::IntArrayRef dilations, int64_t stride,
                              bool need_x, bool need_norm, at::IntArrayRef need_weights);

namespace {

struct Gradients {
  at::Tensor dx;
  std::vector<at::Tensor> ddepthwise, dpointwise;
  at::Tensor dgamma, dbeta;

  std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor,
             at::Tensor>
  tuple() const {
    return {dx,     ddepthwise, dpointwise,
            dgamma, dbeta,      at::empty({0, 4, dgamma.size(1)}, dgamma.options())};
  }
};

struct Composition {
  const at::Tensor& x;
  SourceNorm norm;
  at::TensorList depthwise, pointwise;
  at::IntArrayRef dilations;
  int64_t stride;

  // The outputs of the depthwise convolutions, mean and variance.
  std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> between(
      int64_t kind, const OptionalTensor& mean, const OptionalTensor& var) const {
    if (kind == 0) {
      // Two tensors: outputs of an op do not share their memory.
      const auto none = [&] {
        return at::empty({0}, x.options().dtype(accumulate_dtype(x.scalar_type())));
      };
      return {cuda::depthwise_group(x, depthwise, dilations, stride, true), none(), none()};
    }
    return cuda::batch_norm_depthwise(x, kind, norm.eps, norm.gamma, norm.beta, mean, var,
                                      depthwise, dilations, stride);
  }

  std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> forward(
      const OptionalTensor& running_mean, const OptionalTensor& running_var) const {
    auto [ys, mean, var] = between(norm.kind, running_mean, running_var);
    for (size_t i = 0; i < ys.size() && ys[i].numel(); ++i)
      ys[i] = at::convolution(ys[i], pointwise[i].to(x.scalar_type()), {}, {1, 1}, {0, 0}, {1, 1},
                              false, {0, 0}, 1)
                  .to(x.scalar_type(), false, false, memory_format(x));
    return {ys, mean, var};
  }

  Gradients backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& mean,
                     const at::Tensor& var, bool need_x, bool need_norm,
                     at::IntArrayRef need_depthwise, at::IntArrayRef need_pointwise) const {
    const std::vector<at::Tensor> hs =
        std::get<0>(between(norm.kind == 0 ? 0 : 2, mean, var));  // the statistics are known
    Gradients out;
    std::vector<at::Tensor> dhs;
    const bool need_source = need_x || need_norm;
    for (size_t i = 0, j = 0; i < hs.size(); ++i) {
      if (!present[i]) continue;
      const at::Tensor& g = grads[j++];
      const bool need = need_pointwise[i], need_h = need_source || need_depthwise[i];
      if (g.numel() == 0) {  // convolutions refuse images without pixels
        dhs.push_back(g);
        if (need) out.dpointwise.push_back(at::zeros_like(pointwise[i]));
        continue;
      }
      auto [dh, dw, db] =
          at::convolution_backward(g, hs[i], pointwise[i].to(g.scalar_type()), std::nullopt, {1, 1},
                                   {0, 0}, {1, 1}, false, {0, 0}, 1, {need_h, need, false});
      // A gradient that nobody needs stands in the list all the same.
      dhs.push_back(need_h ? dh.to(g.scalar_type()) : g);
      if (need) out.dpointwise.push_back(dw.to(pointwise[i].scalar_type()));
    }
    const at::TensorOptions acc = x.options()
                                      .dtype(accumulate_dtype(x.scalar_type()))
                                      .memory_format(at::MemoryFormat::Contiguous);
    out.dgamma = at::empty({0, x.size(1)}, acc);
    out.dbeta = at::empty({0, x.size(1)}, acc);
    if (norm.kind == 0) {
      std::tie(out.dx, out.ddepthwise) =
          cuda::depthwise_group_backward(dhs, present, x, x.sizes().slice(2), depthwise, dilations,
                                         stride, true, need_x, need_depthwise);
    } else {
      std::tie(out.dx, out.ddepthwise, out.dgamma, out.dbeta) = cuda::batch_norm_depthwise_backward(
          dhs, present, x, mean, var, norm.kind, norm.eps, norm.gamma, norm.beta, depthwise,
          dilations, stride, need_x, need_norm, need_depthwise);
    }
    return out;
  }
};

}  // namespace

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
  check_pointwise(op, check_depthwise(op, x.sizes(), x.device(), depthwise, dilations, stride),
                  pointwise, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Composition composition{x, norm, depthwise, pointwise, dilations, stride};
  return std::tuple_cat(composition.forward(running_mean, running_var),
                        std::make_tuple(std::vector<at::Tensor>()));
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
  check_separable_backward(op, grads, present, x, norm, mean, var, depthwise, pointwise, dilations,
                           stride, need_depthwise, need_pointwise, outputs, carried);
  check_written(op, need_x);
  check_no_carriers(op, carried);
  const c10::cuda::CUDAGuard guard(x.device());
  const Composition composition{x, norm, depthwise, pointwise, dilations, stride};
  return composition
      .backward(grads, present, mean, var, need_x, need_norm, need_depthwise, need_pointwise)
      .tuple();
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("separable_group", &fastnas::cuda::separable_group);
  m.impl("separable_group_backward", &fastnas::cuda::separable_group_backward);
}
