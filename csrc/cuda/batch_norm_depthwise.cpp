// SPDX-License-Identifier: Apache-2.0
// BatchNorm, ReLU and depthwise convolutions of one source, on CUDA: the convolutions normalise what they bring into
// shared memory, and their backward takes the sums of the norm's on the way. Nothing is written between the two.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "depthwise_host.h"

namespace fastnas::cuda {

Coefficients normalise_sources(Depthwise& d, const NormArguments& norms) {
  const Plan plan =
      plan_channels(d.sources[0].sizes(), d.like.scalar_type(), d.format, pointers(d.sources));
  Coefficients f = mix_coefficients(plan, d.sources, norms, true);
  d.c.scale = at_row(f.table, 0);
  d.c.shift = at_row(f.table, plan.tables(norms.norms.K));
  d.c.pitch = d.c.sources == 1 ? 0 : plan.period;
  return f;
}

SourceGradients source_backward(const Depthwise& d, const OutputGradients& from,
                                const NormArguments* norms, const at::Tensor& mean,
                                const at::Tensor& var, at::IntArrayRef need_xs,
                                at::IntArrayRef need_norms, at::IntArrayRef need_weights) {
  const int64_t C = d.group.C, K = static_cast<int64_t>(d.sources.size());
  const cudaStream_t stream = d.stream();
  const at::TensorOptions acc = d.like.options().dtype(d.acc());
  SourceGradients out{{}, weight_gradients(d, from, need_weights), {}, {}};
  const int64_t rows = norms ? norms->affine_rows : 0;
  bool any = false, sums = false;
  for (int64_t k = 0; k < K; ++k) {
    any = any || need_xs[k] || (norms && need_norms[k]);
    sums = sums || (norms && needs_dot(*norms, k, need_xs[k], false));
  }
  if (!norms || !any) {
    out.dgamma = at::empty({0, C}, acc);
    out.dbeta = at::empty({0, C}, acc);
    if (any) out.dxs = input_gradients(d, from, {});
    return out;
  }
  const int64_t parts = sums ? input_sum_parts(d.c) : 0;
  at::Tensor partial = scratch(2 * K * C * parts, d.acc(), d.like);
  const std::vector<at::Tensor> dhs =
      input_gradients(d, from, {parts, pointer(mean), mutable_pointer(partial)});
  ApartGradients gradients{};
  gradients.K = static_cast<int>(K);
  std::vector<const void*> walked = pointers(d.sources);
  bool written = false;
  for (int64_t k = 0; k < K; ++k) {
    gradients.gs[k] = pointer(dhs[k]);
    walked.push_back(gradients.gs[k]);
    if (norms->norms.kinds[k] == kBatch)
      gradients.xs[k] = pointer(d.sources[k]);  // else a * g is all there is
    if (!need_xs[k]) continue;
    out.dxs.push_back(at::empty(d.sources[k].sizes(), d.like.options(), d.format));
    gradients.dxs[k] = mutable_pointer(out.dxs.back());
    walked.push_back(gradients.dxs[k]);
    written = true;
  }
  const Plan plan = plan_channels(dhs[0].sizes(), dhs[0].scalar_type(), d.format, walked);
  at::Tensor centre;
  if (sums && !parts && plan.elements) {  // of the one source that such convolutions have
    centre = centre_rows(plan, mean);
    partial = scratch(2 * plan.partials(), d.acc(), d.like);
    Dots dots{};
    dots.g = pointer(dhs[0]);
    dots.step = 1;
    dots.xs[0] = pointer(d.sources[0]);
    dots.K = 1;
    dots.centre = pointer(centre);
    dots.partial = mutable_pointer(partial);
    C10_CUDA_CHECK(launch_dots(plan, dots, stream));
  }
  const at::Tensor tables = scratch(3 * plan.tables(K), d.acc(), d.like);
  gradients.a = at_row(tables, 0);
  gradients.b = at_row(tables, plan.tables(K));
  gradients.c = at_row(tables, 2 * plan.tables(K));
  out.dgamma = at::empty({rows, C}, acc);
  out.dbeta = at::empty({rows, C}, acc);
  const NormGradients args{pointer(partial),
                           pointer(mean),
                           pointer(var),
                           at_row(tables, 0),
                           at_row(tables, plan.tables(K)),
                           at_row(tables, 2 * plan.tables(K)),
                           mutable_pointer(out.dgamma),
                           mutable_pointer(out.dbeta),
                           nullptr,
                           parts};
  C10_CUDA_CHECK(launch_norm_gradients(plan, norms->norms, args, stream));
  if (written) C10_CUDA_CHECK(launch_apart_gradients(plan, gradients, stream));
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
      make_depthwise(group, {as_operand(x, x.scalar_type(), format)}, x, format, weights, true);
  const Coefficients f =
      normalise_sources(d, make_source_norms(op, x, norm, running_mean, running_var));
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
      make_depthwise(group, {as_operand(x, dtype, format)}, grads[0], format, weights, true);
  const at::Tensor means = as_operand(mean, d.acc(), at::MemoryFormat::Contiguous).view({1, -1});
  const at::Tensor vars = as_operand(var, d.acc(), at::MemoryFormat::Contiguous).view({1, -1});
  const NormArguments norms = make_source_norms(op, x, norm, means, vars);
  const Coefficients f = normalise_sources(d, by_statistics(norms, means, vars));
  if (need_x || need_norm) add_weights(d);
  SourceGradients out = source_backward(d, output_gradients(gs, present), &norms, means, vars,
                                        {need_x}, {need_norm}, need_weights);
  const at::Tensor dx = need_x ? out.dxs[0] : at::empty({0}, d.like.options());
  return {dx, out.dweights, out.dgamma, out.dbeta};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("batch_norm_depthwise", &fastnas::cuda::batch_norm_depthwise);
  m.impl("batch_norm_depthwise_backward", &fastnas::cuda::batch_norm_depthwise_backward);
}
