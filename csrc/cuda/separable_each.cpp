// SPDX-License-Identifier: Apache-2.0
// separable_group of each of several sources, on CUDA: the launches of one source serve all of them, where they are alike
// and their convolutions fit tiles.
#include "../separable_each.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "separable_host.h"

namespace fastnas::cuda {

SeparableGroup separable_group;
SeparableGroupBackward separable_group_backward;

namespace {

// Whether all are of one dtype and in one memory format.
bool alike(at::TensorList ts) {
  return std::all_of(ts.begin(), ts.end(), [&](const at::Tensor& t) {
    return t.scalar_type() == ts[0].scalar_type() && memory_format(t) == memory_format(ts[0]);
  });
}

}  // namespace

EachForward separable_each(at::TensorList xs, at::IntArrayRef kinds, at::ArrayRef<double> eps,
                           at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
                           at::TensorList running_means, at::TensorList running_vars,
                           at::TensorList depthwise, at::TensorList pointwise,
                           at::IntArrayRef dilations, int64_t stride, at::TensorList carriers,
                           bool carry) {
  const char* op = "separable_each";
  check_no_carriers(op, carriers, carry);
  const at::NoGradGuard no_grad;
  // Autocast would take the products of x in float32 behind a norm in half, forward but not backward.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const EachSource e{xs,    kinds,     eps,       affine,    gammas,
                     betas, depthwise, pointwise, dilations, stride};
  const DepthwiseGroup group = check_each(op, e);
  const at::Tensor& x = xs[0];
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  Depthwise d =
      make_depthwise(group, as_operands(xs, x.scalar_type(), format), x, format, depthwise, true);
  if (!alike(xs) || needs_table(d.c))
    return each_one(op, e, running_means, running_vars, carriers, carry, separable_group);
  NormArguments norms = make_norms(op, group.C, group.size(), x, kinds, eps, affine, gammas, betas);
  add_running_statistics(op, group.C, norms, running_means, running_vars);
  const Coefficients f = normalise_sources(d, norms);
  return {convolve_separably(d, pointwise), f.mean, f.var, {}};
}

EachBackward separable_each_backward(
    at::TensorList grads, at::TensorList xs, const at::Tensor& mean, const at::Tensor& var,
    at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
    at::TensorList betas, at::TensorList depthwise, at::TensorList pointwise,
    at::IntArrayRef dilations, int64_t stride, at::IntArrayRef need_xs, at::IntArrayRef need_norms,
    at::IntArrayRef need_depthwise, at::IntArrayRef need_pointwise, at::TensorList outputs,
    at::TensorList carried) {
  const char* op = "separable_each_backward";
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const EachSource e{xs,    kinds,     eps,       affine,    gammas,
                     betas, depthwise, pointwise, dilations, stride};
  const EachNeeds need{need_xs, need_norms, need_depthwise, need_pointwise};
  const DepthwiseGroup group = check_each_backward(op, e, grads, mean, var, need, outputs, carried);
  for (int64_t n : need_xs) check_written(op, n);
  check_no_carriers(op, carried);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const at::ScalarType dtype = grads[0].scalar_type();
  const at::MemoryFormat format = memory_format(xs[0]);
  Depthwise d =
      make_depthwise(group, as_operands(xs, dtype, format), grads[0], format, depthwise, true);
  if (!alike(xs) || needs_table(d.c) ||
      !std::all_of(grads.begin(), grads.end(),
                   [&](const at::Tensor& g) { return g.scalar_type() == dtype; }))
    return each_one_backward(e, grads, mean, var, need, outputs, carried, separable_group_backward);
  const NormArguments norms =
      make_norms(op, group.C, group.size(), xs[0], kinds, eps, affine, gammas, betas);
  const at::Tensor means = as_operand(mean, d.acc(), at::MemoryFormat::Contiguous);
  const at::Tensor vars = as_operand(var, d.acc(), at::MemoryFormat::Contiguous);
  const Coefficients f = normalise_sources(d, by_statistics(norms, means, vars));
  const std::vector<int64_t> present(group.size(), 1);
  const SeparableGradients out =
      separable_backward(d, as_operands(grads, dtype, format), present, &norms, means, vars,
                         pointwise, need_xs, need_norms, need_depthwise, need_pointwise);
  const SourceGradients& source = out.source;
  return {source.dxs,    source.dweights, out.dpointwise,
          source.dgamma, source.dbeta,    at::empty({0, 4, group.C}, source.dgamma.options())};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("separable_each", &fastnas::cuda::separable_each);
  m.impl("separable_each_backward", &fastnas::cuda::separable_each_backward);
}
