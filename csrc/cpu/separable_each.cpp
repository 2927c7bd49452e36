// SPDX-License-Identifier: Apache-2.0
// separable_group of each of several sources. On a CPU a call's work is the same as that of one after the other; what is
// saved is what a call costs outside.
#include "../separable_each.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace fastnas {

SeparableGroup separable_group_cpu;
SeparableGroupBackward separable_group_backward_cpu;

EachForward separable_each_cpu(at::TensorList xs, at::IntArrayRef kinds, at::ArrayRef<double> eps,
                               at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
                               at::TensorList running_means, at::TensorList running_vars,
                               at::TensorList depthwise, at::TensorList pointwise,
                               at::IntArrayRef dilations, int64_t stride, at::TensorList carriers,
                               bool carry) {
  const char* op = "separable_each";
  const at::NoGradGuard no_grad;
  const EachSource e{xs,    kinds,     eps,       affine,    gammas,
                     betas, depthwise, pointwise, dilations, stride};
  check_each(op, e);
  check_carriers(op, xs, carriers);
  return each_one(op, e, running_means, running_vars, carriers, carry, separable_group_cpu);
}

EachBackward separable_each_backward_cpu(
    at::TensorList grads, at::TensorList xs, const at::Tensor& mean, const at::Tensor& var,
    at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
    at::TensorList betas, at::TensorList depthwise, at::TensorList pointwise,
    at::IntArrayRef dilations, int64_t stride, at::IntArrayRef need_xs, at::IntArrayRef need_norms,
    at::IntArrayRef need_depthwise, at::IntArrayRef need_pointwise, at::TensorList outputs,
    at::TensorList carried) {
  const char* op = "separable_each_backward";
  const at::NoGradGuard no_grad;
  const EachSource e{xs,    kinds,     eps,       affine,    gammas,
                     betas, depthwise, pointwise, dilations, stride};
  const EachNeeds need{need_xs, need_norms, need_depthwise, need_pointwise};
  check_each_backward(op, e, grads, mean, var, need, outputs, carried);
  return each_one_backward(e, grads, mean, var, need, outputs, carried,
                           separable_group_backward_cpu);
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("separable_each", &fastnas::separable_each_cpu);
  m.impl("separable_each_backward", &fastnas::separable_each_backward_cpu);
}
