// SPDX-License-Identifier: Apache-2.0
// What separable_group asks of its arguments, on every device, and its composition of the ops that it stands for.
#pragma once
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

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

struct SeparableGradients {
  at::Tensor dx;
  std::vector<at::Tensor> ddepthwise, dpointwise;
  at::Tensor dgamma, dbeta;

  std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor>
  tuple() const {
    return {dx, ddepthwise, dpointwise, dgamma, dbeta};
  }
};

// The composition, with the ops of one device. Products are taken in `dtype`. What is between the convolutions is
// computed again in the backward, as the fused kernels do.
template <typename Ops>
struct SeparableComposition {
  const at::Tensor& x;
  SourceNorm norm;
  at::TensorList depthwise, pointwise;
  at::IntArrayRef dilations;
  int64_t stride;
  at::ScalarType dtype;

  // The outputs of the depthwise convolutions, mean and variance.
  std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> between(
      int64_t kind, const OptionalTensor& mean, const OptionalTensor& var) const {
    if (kind == 0) {
      const at::Tensor none = at::empty({0}, x.options().dtype(accumulate_dtype(x.scalar_type())));
      return {Ops::depthwise_group(x, depthwise, dilations, stride, true), none, none};
    }
    return Ops::batch_norm_depthwise(x, kind, norm.eps, norm.gamma, norm.beta, mean, var, depthwise,
                                     dilations, stride);
  }

  std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> forward(
      const OptionalTensor& running_mean, const OptionalTensor& running_var) const {
    auto [ys, mean, var] = between(norm.kind, running_mean, running_var);
    for (size_t i = 0; i < ys.size(); ++i)
      ys[i] = at::convolution(ys[i].to(dtype), pointwise[i].to(dtype), {}, {1, 1}, {0, 0}, {1, 1},
                              false, {0, 0}, 1)
                  .to(x.scalar_type(), false, false, memory_format(x));
    return {ys, mean, var};
  }

  SeparableGradients backward(at::TensorList grads, at::IntArrayRef present, const at::Tensor& mean,
                              const at::Tensor& var, bool need_x, bool need_norm,
                              at::IntArrayRef need_depthwise,
                              at::IntArrayRef need_pointwise) const {
    const std::vector<at::Tensor> hs =
        std::get<0>(between(norm.kind == 0 ? 0 : 2, mean, var));  // the statistics are known
    SeparableGradients out;
    std::vector<at::Tensor> dhs;
    const bool need_source = need_x || need_norm;
    for (size_t i = 0, j = 0; i < hs.size(); ++i) {
      if (!present[i]) continue;
      const at::Tensor& g = grads[j++];
      const bool need = need_pointwise[i], need_h = need_source || need_depthwise[i];
      auto [dh, dw, db] = at::convolution_backward(
          g.to(dtype), hs[i].to(dtype), pointwise[i].to(dtype), c10::nullopt, {1, 1}, {0, 0},
          {1, 1}, false, {0, 0}, 1, {need_h, need, false});
      // A gradient that nobody needs stands in the list all the same.
      dhs.push_back(need_h ? dh.to(g.scalar_type()) : g);
      if (need) out.dpointwise.push_back(dw.to(pointwise[i].scalar_type()));
    }
    const at::TensorOptions acc = x.options()
                                      .dtype(accumulate_dtype(x.scalar_type()))
                                      .memory_format(at::MemoryFormat::Contiguous);
    out.dgamma = out.dbeta = at::empty({0, x.size(1)}, acc);
    if (norm.kind == 0) {
      std::tie(out.dx, out.ddepthwise) =
          Ops::depthwise_group_backward(dhs, present, x, x.sizes().slice(2), depthwise, dilations,
                                        stride, true, need_x, need_depthwise);
    } else {
      std::tie(out.dx, out.ddepthwise, out.dgamma, out.dbeta) = Ops::batch_norm_depthwise_backward(
          dhs, present, x, mean, var, norm.kind, norm.eps, norm.gamma, norm.beta, depthwise,
          dilations, stride, need_x, need_norm, need_depthwise);
    }
    return out;
  }
};

}  // namespace fastnas
