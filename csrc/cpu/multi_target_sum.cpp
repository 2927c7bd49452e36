// SPDX-License-Identifier: Apache-2.0
// X_t = sum_k w_tk x_k for several targets t, BatchNorm of some operands before: what mixed_sum and mixed_batch_norm
// are for one. Passes: statistics K where normalised, sums K + T; backward: reduction K + T, in which the gradients of
// operands without statistics of their own are written, and for the others once more K + T. A weight of 0 leaves its
// operand out of the sum.
#include "multi_target_sum.h"

#include <torch/library.h>

#include "mixed_batch_norm.h"

namespace fastnas {

namespace {

// Weights [T][K]; the norms of the operands; and the layout, in which operands without norms have no channels.
struct Targets {
  int64_t T, K;
  std::vector<double> w;
  NormTable table;
  bool plain;

  // The table as target t has it.
  NormTable& of(int64_t t) {
    table.w.assign(w.begin() + t * K, w.begin() + (t + 1) * K);
    return table;
  }

  Layout layout(at::IntArrayRef shape, int64_t elements, at::MemoryFormat format) const {
    return plain ? Layout{elements, 1, 1, true}
                 : layout_of(shape, format != at::MemoryFormat::Contiguous);
  }
};

Targets make_targets(const char* op, at::IntArrayRef shape, const at::Tensor& weights,
                     at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                     at::TensorList gammas, at::TensorList betas) {
  Targets targets;
  targets.T = weights.size(0);
  targets.K = weights.size(1);
  targets.w = to_doubles(weights);
  targets.plain = all_plain(kinds);
  check_channels(op, shape, targets.plain);
  targets.table = make_norm_table(op, targets.plain ? 1 : shape[1], weights.select(0, 0), kinds,
                                  eps, affine, gammas, betas);
  return targets;
}

template <typename T>
void forward(Targets& targets, const MultiTargetMix<T>& mix, const std::vector<const T*>& xs,
             const std::vector<T*>& ys) {
  batch_statistics(mix, xs, targets.table);
  Sums<T> sums;
  sums.xs = xs;
  for (int64_t t = 0; t < targets.T; ++t) {
    const ForwardCoefficients f = forward_coefficients(targets.of(t));
    sums.add(ys[t], f.coef, f.bias);
  }
  mix.combine(sums);
}

// Adds the gradient of an operand, a sum over those of the targets: dx_k = sum_t a_tk g_t + b_k (x_k - mean_k) + c_k,
// where b and c are the sums of each target's.
template <typename T>
void add_gradient(Sums<T>& sums, T* dx, const T* x, const std::vector<BackwardCoefficients>& parts,
                  const NormTable& table, int64_t k) {
  const int64_t C = table.C;
  std::vector<double> a, b(C), bias(C);
  for (const BackwardCoefficients& p : parts) {
    a.insert(a.end(), p.a.begin() + k * C, p.a.begin() + (k + 1) * C);
    for (int64_t c = 0; c < C; ++c) {
      b[c] += p.b[k * C + c];
      bias[c] += p.c[k * C + c];
    }
  }
  if (table.kinds[k] != kBatch) return sums.add(dx, a, bias);
  for (int64_t c = 0; c < C; ++c) bias[c] -= b[c] * table.mean[k * C + c];
  sums.add(dx, a, bias, x, b);
}

template <typename T>
std::vector<BackwardCoefficients> coefficients(Targets& targets, double count,
                                               const std::vector<std::vector<double>>& sums,
                                               const std::vector<std::vector<double>>& dots) {
  std::vector<BackwardCoefficients> out;
  for (int64_t t = 0; t < targets.T; ++t)
    out.push_back(backward_coefficients(targets.of(t), sums[t], dots[t], count));
  return out;
}

// What is no operand's gradient: dw [T][K], and dgamma and dbeta added up over the targets.
struct Others {
  std::vector<double> dw, dgamma, dbeta;

  explicit Others(const std::vector<BackwardCoefficients>& parts) {
    for (const BackwardCoefficients& p : parts) {
      dw.insert(dw.end(), p.dw.begin(), p.dw.end());
      dgamma.resize(p.dgamma.size());
      dbeta.resize(p.dbeta.size());
      for (size_t i = 0; i < p.dgamma.size(); ++i) {
        dgamma[i] += p.dgamma[i];
        dbeta[i] += p.dbeta[i];
      }
    }
  }
};

template <typename T>
Others backward(Targets& targets, const Layout& layout, const std::vector<const T*>& gs,
                const std::vector<const T*>& xs, const std::vector<T*>& dxs) {
  const MultiTargetMix<T> mix(layout);
  const int64_t K = targets.K, C = targets.table.C;
  std::vector<std::vector<double>> sums(targets.T, std::vector<double>(C)),
      dots(targets.T, std::vector<double>(K * C));
  const double count = static_cast<double>(layout.values());
  const auto gradients = [&](bool batch) {
    const std::vector<BackwardCoefficients> parts = coefficients<T>(targets, count, sums, dots);
    Sums<T> out;
    out.xs = gs;
    for (int64_t k = 0; k < K; ++k)
      if (dxs[k] && (targets.table.kinds[k] == kBatch) == batch)
        add_gradient(out, dxs[k], xs[k], parts, targets.table, k);
    return out;
  };
  const bool reduces = std::any_of(xs.begin(), xs.end(), [](const T* x) { return x != nullptr; });
  if (reduces)
    mix.reduce(gs, xs, targets.table.mean, sums, dots, gradients(false));
  else
    mix.combine(gradients(false));
  mix.combine(gradients(true));
  return Others(coefficients<T>(targets, count, sums, dots));
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> multi_target_sum_cpu(
    at::TensorList xs, const at::Tensor& weights, at::IntArrayRef kinds, at::ArrayRef<double> eps,
    at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
    at::TensorList running_means, at::TensorList running_vars) {
  const char* op = "multi_target_sum";
  check_inputs(op, xs, weights);
  check_target_weights(op, weights, xs.size(), xs[0]);
  const at::ScalarType dtype = result_dtype(xs);
  const at::MemoryFormat format = memory_format(xs[0]);
  Targets targets = make_targets(op, xs[0].sizes(), weights, kinds, eps, affine, gammas, betas);
  set_running_statistics(op, targets.table, running_means, running_vars);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  std::vector<at::Tensor> ys;
  for (int64_t t = 0; t < targets.T; ++t)
    ys.push_back(at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format));
  if (xs[0].numel())
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const MultiTargetMix<T> mix(targets.layout(xs[0].sizes(), xs[0].numel(), format));
      forward(targets, mix, const_pointers<T>(operands), pointers_to<T>(ys));
    });
  const NormTable& table = targets.table;
  const std::vector<int64_t> shape =
      targets.plain ? std::vector<int64_t>{0} : std::vector<int64_t>{table.K, table.C};
  const std::vector<double> none;
  return {ys, from_doubles(targets.plain ? none : table.mean, shape, weights.options()),
          from_doubles(targets.plain ? none : table.var, shape, weights.options())};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
multi_target_sum_backward_cpu(at::TensorList grads, at::TensorList xs, const at::Tensor& weights,
                              const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef kinds,
                              at::ArrayRef<double> eps, at::IntArrayRef affine,
                              at::TensorList gammas, at::TensorList betas, at::IntArrayRef need_xs,
                              bool need_weights) {
  const char* op = "multi_target_sum_backward";
  check_target_gradients(op, grads, xs, weights, need_xs);
  const at::Tensor& first = grads[0];
  Targets targets = make_targets(op, first.sizes(), weights, kinds, eps, affine, gammas, betas);
  if (!targets.plain) set_statistics(op, targets.table, mean, var);
  const at::ScalarType dtype = first.scalar_type();
  const at::MemoryFormat format = saved_format(xs, first);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format),
                                gs = as_operands(grads, dtype, format);
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(first.sizes(), first.options(), format));
  const Layout layout = targets.layout(first.sizes(), first.numel(), format);
  at::Tensor dw, dgamma, dbeta;
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<T*> dx(targets.K, nullptr);
    for (int64_t k = 0, i = 0; k < targets.K; ++k)
      if (need_xs[k]) dx[k] = static_cast<T*>(dxs[i++].mutable_data_ptr());
    const Others others =
        backward(targets, layout, const_pointers<T>(gs), const_pointers<T>(operands), dx);
    const int64_t C = targets.table.C, rows = gammas.size();
    dw = need_weights ? from_doubles(others.dw, {targets.T, targets.K}, weights.options())
                      : at::empty({0}, weights.options());
    dgamma = from_doubles(others.dgamma, {rows, C}, weights.options());
    dbeta = from_doubles(others.dbeta, {rows, C}, weights.options());
  });
  return {dxs, dw, dgamma, dbeta};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("multi_target_sum", &fastnas::multi_target_sum_cpu);
  m.impl("multi_target_sum_backward", &fastnas::multi_target_sum_backward_cpu);
}
