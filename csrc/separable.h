// SPDX-License-Identifier: Apache-2.0
// What separable_group asks of its arguments, on every device.
#pragma once
#include <optional>

#include "depthwise.h"

namespace fastnas {

using OptionalTensor = std::optional<at::Tensor>;

// The BatchNorm before the ReLU, as in mixed_batch_norm; kind 0: there is none.
struct SourceNorm {
  int64_t kind;
  double eps;
  const OptionalTensor &gamma, &beta;
};

inline void check_source_norm(const char* op, const at::Tensor& x, const SourceNorm& norm) {
  check_floating(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected x of shape (N, C, H, W), but got ", x.sizes());
  TORCH_CHECK_VALUE(norm.kind >= 0 && norm.kind <= 2, op, ": expected kind 0, 1 or 2, but got ",
                    norm.kind);
  TORCH_CHECK_VALUE(norm.gamma.has_value() == norm.beta.has_value(), op,
                    ": expected gamma and beta or neither");
}

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
                                               at::IntArrayRef need_pointwise) {
  check_source_norm(op, x, norm);
  TORCH_CHECK_VALUE(norm.kind == 0 || (mean.numel() == x.size(1) && var.numel() == x.size(1)), op,
                    ": expected mean and var of shape [", x.size(1), "], but got ", mean.sizes(),
                    " and ", var.sizes());
  const DepthwiseGroup group =
      check_depthwise_backward(op, grads, present, x, x.sizes().slice(2), depthwise, dilations,
                               stride, true, true, need_depthwise);
  check_pointwise(op, group, pointwise, x);
  TORCH_CHECK_VALUE(need_pointwise.size() == pointwise.size(), op,
                    ": expected need_pointwise of one entry per weight (", pointwise.size(),
                    "), but got ", need_pointwise.size());
  return group;
}

}  // namespace fastnas
