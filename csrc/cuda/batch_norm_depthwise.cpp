// SPDX-License-Identifier: Apache-2.0
// BatchNorm, ReLU and depthwise convolutions of one source, on CUDA: the kernels of mixed_batch_norm normalise into a
// temporary tensor that the convolutions read, in the backward once more. Nothing but x is kept between the two.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../source_norm.h"
#include "host.h"

namespace fastnas::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_batch_norm(
    at::TensorList xs, const at::Tensor& weights, at::IntArrayRef kinds, at::ArrayRef<double> eps,
    at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
    at::TensorList running_means, at::TensorList running_vars, at::TensorList carriers);
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
mixed_batch_norm_backward(const at::Tensor& grad, at::TensorList xs, const at::Tensor& weights,
                          const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef kinds,
                          at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
                          at::TensorList betas, at::IntArrayRef need_xs, bool need_weights);
std::vector<at::Tensor> depthwise_group(const at::Tensor& x, at::TensorList weights,
                                        at::IntArrayRef dilations, int64_t stride, bool relu);
std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights);

namespace {

at::Tensor one(const at::Tensor& x) {
  return at::ones({1}, x.options()
                           .dtype(accumulate_dtype(x.scalar_type()))
                           .memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride) {
  const char* op = "batch_norm_depthwise";
  check_source_norm(op, x, {kind, eps, gamma, beta}, 1);
  TORCH_CHECK_VALUE(
      kind == 1 || (running_mean && running_var && running_mean->numel() == x.size(1) &&
                    running_var->numel() == x.size(1)),
      op, ": expected running statistics of ", x.size(1), " values for a norm in evaluation");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [h, mean, var] =
      mixed_batch_norm({x}, one(x), {kind}, {eps}, {gamma.has_value()}, given(gamma), given(beta),
                       given(running_mean), given(running_var), {});
  return {depthwise_group(h, weights, dilations, stride, true), mean.view({-1}), var.view({-1})};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
batch_norm_depthwise_backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                              const at::Tensor& mean, const at::Tensor& var, int64_t kind,
                              double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                              at::TensorList weights, at::IntArrayRef dilations, int64_t stride,
                              bool need_x, bool need_norm, at::IntArrayRef need_weights) {
  const char* op = "batch_norm_depthwise_backward";
  check_source_norm(op, x, {kind, eps, gamma, beta}, 1);
  check_source_statistics(op, x, {kind, eps, gamma, beta}, mean, var);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor w = one(x);
  const int64_t affine = gamma.has_value();
  const at::Tensor h = std::get<0>(
      mixed_batch_norm({x}, w, {2}, {eps}, {affine}, given(gamma), given(beta), {mean}, {var}, {}));
  const bool need_source = need_x || need_norm;
  const std::vector<int64_t> size{x.size(2), x.size(3)};
  auto [dh, dws] = depthwise_group_backward(grads, present, h, size, weights, dilations, stride,
                                            true, need_source, need_weights);
  const at::Tensor none = at::empty({0}, w.options());
  const auto no_rows = [&] { return at::empty({0, x.size(1)}, w.options()); };
  if (!need_source) return {none, dws, no_rows(), no_rows()};
  const auto [dxs, dw, dgamma, dbeta, carried] =
      mixed_batch_norm_backward(dh, {x}, w, mean.view({1, -1}), var.view({1, -1}), {kind}, {eps},
                                {affine}, given(gamma), given(beta), {need_x}, false);
  return {need_x ? dxs[0] : none, dws, dgamma, dbeta};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("batch_norm_depthwise", &fastnas::cuda::batch_norm_depthwise);
  m.impl("batch_norm_depthwise_backward", &fastnas::cuda::batch_norm_depthwise_backward);
}
