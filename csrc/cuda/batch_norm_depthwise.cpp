// SPDX-License-Identifier: Apache-2.0
// BatchNorm, ReLU and depthwise convolutions of one source, on CUDA: the convolutions normalise what they bring into
// shared memory, and their backward takes the sums of the norm's on the way. Nothing is written between the two.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "depthwise_host.h"

namespace fastnas::cuda {

Coefficients normalise_source(const char* op, Depthwise& d, const SourceNorm& norm,
                              const OptionalTensor& mean, const OptionalTensor& var) {
  const NormArguments norms = make_source_norms(op, d.source, norm, mean, var);
  const Plan plan =
      plan_channels(d.source.sizes(), d.like.scalar_type(), d.format, {pointer(d.source)});
  Coefficients f = mix_coefficients(plan, {d.source}, norms);
  d.c.scale = at_row(f.table, 0);
  d.c.shift = at_row(f.table, plan.period);
  return f;
}

SourceGradients source_backward(const char* op, const Depthwise& d, const OutputGradients& from,
                                const SourceNorm& norm, const at::Tensor& mean,
                                const at::Tensor& var, bool need_x, bool need_norm,
                                at::IntArrayRef need_weights) {
  const int64_t C = d.group.C;
  const cudaStream_t stream = d.stream();
  const at::TensorOptions acc = d.like.options().dtype(d.acc());
  SourceGradients out{at::empty({0}, d.like.options()), weight_gradients(d, from, need_weights),
                      at::empty({0, C}, acc), at::empty({0, C}, acc)};
  if (norm.kind == 0) {
    if (need_x) out.dx = input_gradient(d, from, {});
    return out;
  }
  if (!need_x && !need_norm) return out;

  const at::Tensor means = as_operand(mean, d.acc(), at::MemoryFormat::Contiguous);
  const at::Tensor vars = as_operand(var, d.acc(), at::MemoryFormat::Contiguous);
  const NormArguments norms = make_source_norms(op, d.source, norm, means, vars);
  const bool sums = needs_dot(norms, 0, need_x, false);
  const int64_t parts = sums ? input_sum_parts(d.c) : 0;
  at::Tensor partial = scratch(2 * C * parts, d.acc(), d.like);
  const at::Tensor dh = input_gradient(d, from, {parts, pointer(means), mutable_pointer(partial)});
  if (need_x) out.dx = at::empty(d.source.sizes(), d.like.options(), d.format);
  const Plan plan = plan_channels(dh.sizes(), dh.scalar_type(), d.format,
                                  {pointer(d.source), pointer(dh), pointer(out.dx)});
  at::Tensor centre;
  if (sums && !parts && plan.elements) {
    centre = centre_rows(plan, means.view({1, C}));
    partial = scratch(2 * plan.partials(), d.acc(), d.like);
    Dots dots{};
    dots.g = pointer(dh);
    dots.step = 1;
    dots.xs[0] = pointer(d.source);
    dots.K = 1;
    dots.centre = pointer(centre);
    dots.partial = mutable_pointer(partial);
    C10_CUDA_CHECK(launch_dots(plan, dots, stream));
  }
  MixGradients tables;
  tables.tables = scratch(3 * plan.tables(1), d.acc(), d.like);
  out.dgamma = at::empty({norms.affine_rows, C}, acc);
  out.dbeta = at::empty({norms.affine_rows, C}, acc);
  const NormGradients args{pointer(partial),
                           pointer(means),
                           pointer(vars),
                           at_row(tables.tables, 0),
                           at_row(tables.tables, plan.tables(1)),
                           at_row(tables.tables, 2 * plan.tables(1)),
                           mutable_pointer(out.dgamma),
                           mutable_pointer(out.dbeta),
                           nullptr,
                           parts};
  C10_CUDA_CHECK(launch_norm_gradients(plan, norms.norms, args, stream));
  if (need_x)
    C10_CUDA_CHECK(launch_gradients(plan,
                                    gradient_arguments(plan, tables, pointer(dh), 1, {d.source},
                                                       norms, {mutable_pointer(out.dx)}),
                                    stream));
  return out;
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> batch_norm_depthwise(
    const at::Tensor& x, int64_t kind, double eps, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::TensorList weights, at::IntArrayRef dilations,
    int64_t stride) {
  const char* op = "batch_norm_depthwise";
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 1);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  Depthwise d =
      make_depthwise(group, as_operand(x, x.scalar_type(), format), x, format, weights, true);
  const Coefficients f = normalise_source(op, d, norm, running_mean, running_var);
  add_weights(d);
  return {convolve(d), f.mean.view({-1}), f.var.view({-1})};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
batch_norm_depthwise_backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                              const at::Tensor& mean, const at::Tensor& var, int64_t kind,
                              double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                              at::TensorList weights, at::IntArrayRef dilations, int64_t stride,
                              bool need_x, bool need_norm, at::IntArrayRef need_weights) {
  const char* op = "batch_norm_depthwise_backward";
  const SourceNorm norm{kind, eps, gamma, beta};
  check_source_norm(op, x, norm, 1);
  check_source_statistics(op, x, norm, mean, var);
  const DepthwiseGroup group =
      check_depthwise_backward(op, grads, present, x, x.sizes().slice(2), weights, dilations,
                               stride, true, need_x || need_norm, need_weights);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType dtype = grads[0].scalar_type();
  const at::MemoryFormat format = memory_format(x);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  Depthwise d =
      make_depthwise(group, as_operand(x, dtype, format), grads[0], format, weights, true);
  const Coefficients f = normalise_source(op, d, {2, eps, gamma, beta}, mean, var);
  if (need_x || need_norm) add_weights(d);
  SourceGradients out = source_backward(op, d, output_gradients(gs, present), norm, mean, var,
                                        need_x, need_norm, need_weights);
  return {out.dx, out.dweights, out.dgamma, out.dbeta};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("batch_norm_depthwise", &fastnas::cuda::batch_norm_depthwise);
  m.impl("batch_norm_depthwise_backward", &fastnas::cuda::batch_norm_depthwise_backward);
}
