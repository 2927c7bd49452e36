// SPDX-License-Identifier: Apache-2.0
// ReLU and the pointwise convolution that reads it, on CUDA: in one kernel (products.h), or the library's own, one after
// the other, where channels are many. The ReLU is made again in the backward, so that nothing but x is kept.
#include "../relu_pointwise.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "products_host.h"

namespace fastnas::cuda {

at::Tensor relu_pointwise(const at::Tensor& x, const at::Tensor& weight) {
  const char* op = "relu_pointwise";
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Product p = check_product(op, x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  if (x.numel() == 0)  // convolutions refuse images without pixels
    return at::zeros({p.N, p.outputs, x.size(2), x.size(3)}, x.options()).contiguous(format);
  if (few_channels(p.C, p.outputs))
    return multiply({as_operand(x, x.scalar_type(), format)}, {weight}, format, false, true)[0];
  return at::convolution(at::relu(x), weight.to(x.scalar_type()), {}, {1, 1}, {0, 0}, {1, 1}, false,
                         {0, 0}, 1)
      .to(x.scalar_type(), false, false, format);
}

std::tuple<at::Tensor, at::Tensor> relu_pointwise_backward(const at::Tensor& grad,
                                                           const at::Tensor& x,
                                                           const at::Tensor& weight, bool need_x,
                                                           bool need_weight) {
  const char* op = "relu_pointwise_backward";
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Product p = check_product_backward(op, grad, x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType dtype = grad.scalar_type();
  const at::MemoryFormat format = memory_format(x);
  at::Tensor dx = at::empty({0}, grad.options()), dw = at::empty({0}, weight.options());
  if (x.numel() == 0) {
    if (need_x) dx = at::zeros(x.sizes(), grad.options()).contiguous(format);
    if (need_weight) dw = at::zeros(weight.sizes(), weight.options());
  } else if (few_channels(p.C, p.outputs)) {
    const at::Tensor source = as_operand(x, dtype, format), g = as_operand(grad, dtype, format);
    if (need_x) dx = multiply({g}, {weight}, format, true, false, source)[0];
    if (need_weight) dw = multiply_backward({g}, {source}, {weight}, format, true)[0];
  } else if (need_x || need_weight) {
    const at::Tensor h = as_operand(x, dtype, format).relu();
    auto [dh, sums, none] = at::convolution_backward(
        as_operand(grad, dtype, format), h, weight.to(dtype), std::nullopt, {1, 1}, {0, 0}, {1, 1},
        false, {0, 0}, 1, {need_x, need_weight, false});
    if (need_x) dx = at::threshold_backward(dh, h, 0).to(dtype, false, false, format);
    if (need_weight) dw = sums.to(weight.scalar_type()).contiguous();
  }
  return {dx, dw};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("relu_pointwise", &fastnas::cuda::relu_pointwise);
  m.impl("relu_pointwise_backward", &fastnas::cuda::relu_pointwise_backward);
}
