// SPDX-License-Identifier: Apache-2.0
// What separable_each asks of its arguments, on every device, and the way through it of one source after the other.
#pragma once
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>

#include "separable.h"

namespace fastnas {

// Sources with a norm and a convolution each, as the forward and the backward have them.
struct EachSource {
  at::TensorList xs;
  at::IntArrayRef kinds;
  at::ArrayRef<double> eps;
  at::IntArrayRef affine;
  at::TensorList gammas, betas, depthwise, pointwise;
  at::IntArrayRef dilations;
  int64_t stride;

  size_t size() const { return xs.size(); }
  int64_t affine_rows() const {
    int64_t rows = 0;
    for (int64_t a : affine) rows += a != 0;
    return rows;
  }
};

inline DepthwiseGroup check_each(const char* op, const EachSource& e) {
  check_inputs(op, e.xs, e.xs.empty() ? at::Tensor() : e.xs[0]);
  const at::Tensor& x = e.xs[0];
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected xs of shape (N, C, H, W), but got ", x.sizes());
  const size_t K = e.size();
  TORCH_CHECK_VALUE(
      e.kinds.size() == K && e.eps.size() == K && e.affine.size() == K && e.depthwise.size() == K &&
          e.pointwise.size() == K && e.dilations.size() == K,
      op, ": expected kinds, eps, affine, weights and dilations of one entry per ", "input (", K,
      "), but got ", e.kinds.size(), ", ", e.eps.size(), ", ", e.affine.size(), ", ",
      e.depthwise.size(), ", ", e.pointwise.size(), " and ", e.dilations.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(e.gammas.size()) == e.affine_rows() &&
                        static_cast<int64_t>(e.betas.size()) == e.affine_rows(),
                    op, ": expected a gamma and a beta for each affine norm (", e.affine_rows(),
                    "), but got ", e.gammas.size(), " and ", e.betas.size());
  for (int64_t kind : e.kinds)
    TORCH_CHECK_VALUE(kind == 1 || kind == 2, op, ": expected kinds of 1 or 2, but got ", kind);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), e.depthwise, e.dilations, e.stride);
  check_pointwise(op, group, e.pointwise, x);
  return group;
}

// What a backward takes besides: gradients of all outputs, statistics [K][C] and what is needed of whom.
struct EachNeeds {
  at::IntArrayRef xs, norms, depthwise, pointwise;

  bool any_source() const {
    bool any = false;
    for (size_t k = 0; k < xs.size(); ++k) any = any || xs[k] || norms[k];
    return any;
  }
};

inline DepthwiseGroup check_each_backward(const char* op, const EachSource& e, at::TensorList grads,
                                          const at::Tensor& mean, const at::Tensor& var,
                                          const EachNeeds& need, at::TensorList outputs,
                                          at::TensorList carried) {
  const DepthwiseGroup group = check_each(op, e);
  const std::vector<int64_t> sizes{group.N, group.C, group.oh, group.ow};
  const int64_t K = static_cast<int64_t>(e.size());
  const std::vector<int64_t> table{K, group.C};
  const auto of_each = [&](size_t n) { return static_cast<int64_t>(n) == K; };
  TORCH_CHECK_VALUE(of_each(grads.size()) && of_each(need.xs.size()) &&
                        of_each(need.norms.size()) && of_each(need.depthwise.size()) &&
                        of_each(need.pointwise.size()),
                    op, ": expected grads and needs of one entry per input (", K, "), but got ",
                    grads.size(), ", ", need.xs.size(), ", ", need.norms.size(), ", ",
                    need.depthwise.size(), " and ", need.pointwise.size());
  TORCH_CHECK_VALUE(mean.sizes() == at::IntArrayRef(table) && var.sizes() == mean.sizes() &&
                        mean.device() == e.xs[0].device() && var.device() == mean.device(),
                    op, ": expected mean and var of shape ", at::IntArrayRef(table), " on ",
                    e.xs[0].device(), ", but got ", mean.sizes(), " and ", var.sizes());
  check_floating(op, "mean", mean);
  check_floating(op, "var", var);
  for (const at::Tensor& g : grads) {
    check_floating(op, "grads", g);
    TORCH_CHECK_VALUE(g.sizes() == at::IntArrayRef(sizes) && g.device() == e.xs[0].device(), op,
                      ": expected grads of shape ", at::IntArrayRef(sizes), " on ",
                      e.xs[0].device(), ", but got ", g.sizes(), " on ", g.device());
  }
  TORCH_CHECK_VALUE(
      outputs.size() == carried.size() && (outputs.empty() || of_each(carried.size())), op,
      ": expected as many outputs and carried as grads (", K, ") or none, but got ", outputs.size(),
      " and ", carried.size());
  return group;
}

using EachForward =
    std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
using EachBackward = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>,
                                std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>;

// The ops of one source, on a device.
using SeparableGroup = EachForward(const at::Tensor& x, int64_t kind, double eps,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, at::TensorList depthwise,
                                   at::TensorList pointwise, at::IntArrayRef dilations,
                                   int64_t stride, const OptionalTensor& carrier, bool carry);
using SeparableGroupBackward =
    std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor,
               at::Tensor>(at::TensorList grads, at::IntArrayRef present, const at::Tensor& x,
                           const at::Tensor& mean, const at::Tensor& var, int64_t kind, double eps,
                           const OptionalTensor& gamma, const OptionalTensor& beta,
                           at::TensorList depthwise, at::TensorList pointwise,
                           at::IntArrayRef dilations, int64_t stride, int64_t need_x,
                           bool need_norm, at::IntArrayRef need_depthwise,
                           at::IntArrayRef need_pointwise, at::TensorList outputs,
                           at::TensorList carried);

// Entry `next` of a list, which is then the following one; nothing where there is none to take.
inline OptionalTensor take(bool has, at::TensorList list, size_t& next) {
  return has ? OptionalTensor(list[next++]) : std::nullopt;
}

inline EachForward each_one(const char* op, const EachSource& e, at::TensorList running_means,
                            at::TensorList running_vars, at::TensorList carriers, bool carry,
                            SeparableGroup& group) {
  const size_t rows = std::count(e.kinds.begin(), e.kinds.end(), 2);
  TORCH_CHECK_VALUE(running_means.size() == rows && running_vars.size() == rows, op,
                    ": expected running statistics for each norm in evaluation (", rows,
                    "), but got ", running_means.size(), " and ", running_vars.size());
  std::vector<at::Tensor> ys, means, vars, made;
  for (size_t k = 0, gamma = 0, beta = 0, mean = 0, var = 0; k < e.size(); ++k) {
    const bool affine = e.affine[k], running = e.kinds[k] == 2;
    const bool given = !carriers.empty() && carriers[k].numel();
    auto [y, used_mean, used_var, carrier] = group(
        e.xs[k], e.kinds[k], e.eps[k], take(affine, e.gammas, gamma), take(affine, e.betas, beta),
        take(running, running_means, mean), take(running, running_vars, var),
        e.depthwise.slice(k, 1), e.pointwise.slice(k, 1), e.dilations.slice(k, 1), e.stride,
        given ? OptionalTensor(carriers[k]) : std::nullopt, carry);
    ys.push_back(y[0]);
    means.push_back(used_mean);
    vars.push_back(used_var);
    made.insert(made.end(), carrier.begin(), carrier.end());
  }
  return {ys, at::stack(means), at::stack(vars), made};
}

inline EachBackward each_one_backward(const EachSource& e, at::TensorList grads,
                                      const at::Tensor& mean, const at::Tensor& var,
                                      const EachNeeds& need, at::TensorList outputs,
                                      at::TensorList carried, SeparableGroupBackward& group) {
  std::vector<at::Tensor> dxs, ddepthwise, dpointwise, dgammas, dbetas, numbers;
  const std::vector<int64_t> present{1};
  for (size_t k = 0, gamma = 0, beta = 0; k < e.size(); ++k) {
    const bool affine = e.affine[k], came = !carried.empty() && carried[k].numel();
    const size_t some = came ? 1 : 0, first = came ? k : 0;
    auto [dx, dw, dp, dgamma, dbeta, number] =
        group(grads.slice(k, 1), present, e.xs[k], mean[k], var[k], e.kinds[k], e.eps[k],
              take(affine, e.gammas, gamma), take(affine, e.betas, beta), e.depthwise.slice(k, 1),
              e.pointwise.slice(k, 1), e.dilations.slice(k, 1), e.stride, need.xs[k],
              need.norms[k] != 0, need.depthwise.slice(k, 1), need.pointwise.slice(k, 1),
              outputs.slice(first, some), carried.slice(first, some));
    if (need.xs[k]) dxs.push_back(dx);
    ddepthwise.insert(ddepthwise.end(), dw.begin(), dw.end());
    dpointwise.insert(dpointwise.end(), dp.begin(), dp.end());
    numbers.push_back(number);
    if (!affine || !need.any_source()) continue;
    // A row for each affine norm, those that nobody needs too.
    dgammas.push_back(dgamma.size(0) ? dgamma : at::zeros({1, dgamma.size(1)}, dgamma.options()));
    dbetas.push_back(dbeta.size(0) ? dbeta : at::zeros({1, dbeta.size(1)}, dbeta.options()));
  }
  const at::Tensor none = at::empty({0, mean.size(1)}, numbers[0].options());
  return {dxs,
          ddepthwise,
          dpointwise,
          dgammas.empty() ? none : at::cat(dgammas),
          dbetas.empty() ? none.clone() : at::cat(dbetas),
          at::cat(numbers)};
}

}  // namespace fastnas
