// SPDX-License-Identifier: Apache-2.0
// What separable_group asks of its arguments, on every device.
#pragma once
#include "depthwise.h"
#include "source_norm.h"

namespace fastnas {

inline void check_pointwise(const char* op, const DepthwiseGroup& group, at::TensorList pointwise,
                            const at::Tensor& x) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(pointwise.size()) == group.size(), op,
                    ": expected one pointwise weight per depthwise one, but got ", group.size(),
                    " and ", pointwise.size());
  const std::vector<int64_t> size{group.C, group.C, 1, 1};
  for (size_t i = 0; i < pointwise.size(); ++i) {
    check_floating(op, "pointwise", pointwise[i]);
    TORCH_CHECK_VALUE(
        pointwise[i].sizes() == at::IntArrayRef(size) && pointwise[i].device() == x.device(), op,
        ": expected pointwise[", i, "] of shape ", at::IntArrayRef(size), " on ", x.device(),
        ", but got ", pointwise[i].sizes(), " on ", pointwise[i].device());
  }
}

inline DepthwiseGroup check_separable_backward(const char* op, at::TensorList grads,
                                               at::IntArrayRef present, const at::Tensor& x,
                                               const SourceNorm& norm, const at::Tensor& mean,
                                               const at::Tensor& var, at::TensorList depthwise,
                                               at::TensorList pointwise, at::IntArrayRef dilations,
                                               int64_t stride, at::IntArrayRef need_depthwise,
                                               at::IntArrayRef need_pointwise,
                                               at::TensorList outputs, at::TensorList carried) {
  check_source_norm(op, x, norm, 0);
  check_source_statistics(op, x, norm, mean, var);
  const DepthwiseGroup group =
      check_depthwise_backward(op, grads, present, x, x.sizes().slice(2), depthwise, dilations,
                               stride, true, true, need_depthwise);
  check_pointwise(op, group, pointwise, x);
  TORCH_CHECK_VALUE(need_pointwise.size() == pointwise.size(), op,
                    ": expected need_pointwise of one entry per weight (", pointwise.size(),
                    "), but got ", need_pointwise.size());
  TORCH_CHECK_VALUE(
      outputs.size() == carried.size() && (outputs.empty() || outputs.size() == grads.size()), op,
      ": expected as many outputs and carried as grads (", grads.size(), ") or none, but got ",
      outputs.size(), " and ", carried.size());
  for (size_t i = 0; i < carried.size(); ++i)
    TORCH_CHECK_VALUE(
        carried[i].numel() == 0 ||
            (carried[i].sizes() == at::IntArrayRef({4, group.C}) &&
             outputs[i].sizes() == grads[i].sizes() && outputs[i].device() == grads[i].device()),
        op, ": expected carried[", i, "] of shape [4, ", group.C,
        "] and its output like its gradient, or empty, but got ", carried[i].sizes(), " and ",
        outputs[i].sizes());
  return group;
}

}  // namespace fastnas
