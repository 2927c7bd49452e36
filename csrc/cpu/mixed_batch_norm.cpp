// SPDX-License-Identifier: Apache-2.0
// BatchNorm of some operands and the weighted sum of all. Passes: statistics K, sum K + 1; backward: reduction K + 1,
// gradients 2K + 1. Normalised operands are never written.
#include "mixed_batch_norm.h"

#include <torch/library.h>

namespace fastnas {

NormTable make_norm_table(const char* op, int64_t C, const at::Tensor& weights,
                          at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                          at::TensorList gammas, at::TensorList betas) {
  const int64_t K = kinds.size();
  TORCH_CHECK_VALUE(weights.size(0) == K && static_cast<int64_t>(eps.size()) == K &&
                        static_cast<int64_t>(affine.size()) == K && gammas.size() == betas.size(),
                    op, ": expected kinds, eps and affine of one entry per input (",
                    weights.size(0), "), but got ", K, ", ", eps.size(), " and ", affine.size());
  NormTable t{K, C, kinds.vec(), to_doubles(weights), eps.vec(), {}, {}, {}, {}, {}, {}};
  t.mean.assign(K * C, 0.0);
  t.var.assign(K * C, 1.0);
  t.gamma.assign(K * C, 1.0);
  t.beta.assign(K * C, 0.0);
  t.known.assign(K, false);
  int64_t row = 0;
  for (int64_t k = 0; k < K; ++k) {
    TORCH_CHECK_VALUE(kinds[k] >= kPlain && kinds[k] <= kRunning, op,
                      ": expected kinds of 0, 1 or 2, but got ", kinds[k]);
    t.affine_row.push_back(affine[k] ? row : -1);
    if (!affine[k]) continue;
    TORCH_CHECK_VALUE(row < static_cast<int64_t>(gammas.size()) && gammas[row].numel() == C &&
                          betas[row].numel() == C,
                      op, ": expected a gamma and a beta of ", C, " values for each affine norm");
    const std::vector<double> gamma = to_doubles(gammas[row]), beta = to_doubles(betas[row]);
    std::copy(gamma.begin(), gamma.end(), t.gamma.begin() + k * C);
    std::copy(beta.begin(), beta.end(), t.beta.begin() + k * C);
    ++row;
  }
  return t;
}

NormTable make_source_table(const char* op, const at::Tensor& x, const SourceNorm& norm) {
  const at::Tensor one =
      at::empty({1}, x.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
  *one.mutable_data_ptr<double>() = 1;
  return make_norm_table(op, x.size(1), one, {norm.kind}, {norm.eps}, {norm.gamma.has_value()},
                         given(norm.gamma), given(norm.beta));
}

void set_running_statistics(const char* op, NormTable& t, at::TensorList means,
                            at::TensorList vars) {
  size_t row = 0;
  for (int64_t k = 0; k < t.K; ++k) {
    if (t.kinds[k] != kRunning) continue;
    TORCH_CHECK_VALUE(row < means.size() && row < vars.size() && means[row].numel() == t.C &&
                          vars[row].numel() == t.C,
                      op, ": expected running statistics of ", t.C,
                      " values for each norm in evaluation");
    const std::vector<double> mean = to_doubles(means[row]), var = to_doubles(vars[row]);
    std::copy(mean.begin(), mean.end(), t.mean.begin() + k * t.C);
    std::copy(var.begin(), var.end(), t.var.begin() + k * t.C);
    ++row;
  }
}

void set_statistics(const char* op, NormTable& t, const at::Tensor& mean, const at::Tensor& var) {
  TORCH_CHECK_VALUE(mean.numel() == t.K * t.C && var.numel() == t.K * t.C, op,
                    ": expected mean and var of shape [", t.K, ", ", t.C, "], but got ",
                    mean.sizes(), " and ", var.sizes());
  t.mean = to_doubles(mean);
  t.var = to_doubles(var);
}

void set_made_statistics(NormTable& t, at::TensorList carriers) {
  for (size_t k = 0; k < carriers.size(); ++k) {
    if (t.kinds[k] != kBatch || carriers[k].numel() == 0) continue;
    const std::vector<double> rows = to_doubles(carriers[k]);
    std::copy_n(rows.begin(), t.C, t.mean.begin() + k * t.C);
    std::copy_n(rows.begin() + t.C, t.C, t.var.begin() + k * t.C);
    t.known[k] = true;
  }
}

std::vector<at::Tensor> made_carriers(const std::vector<double>& made, int64_t outputs, int64_t C,
                                      const at::TensorOptions& options) {
  std::vector<at::Tensor> out;
  for (int64_t i = 0; i < outputs; ++i) {
    std::vector<double> rows(4 * C);  // the last two are for gradients alone
    std::copy_n(made.begin() + i * 2 * C, 2 * C, rows.begin());
    out.push_back(from_doubles(rows, {4, C}, options));
  }
  return out;
}

ForwardCoefficients forward_coefficients(const NormTable& t) {
  ForwardCoefficients f{std::vector<double>(t.K * t.C), std::vector<double>(t.C)};
  for (int64_t k = 0; k < t.K; ++k)
    for (int64_t c = 0; c < t.C; ++c) {
      const int64_t i = k * t.C + c;
      if (t.kinds[k] == kPlain) {
        f.coef[i] = t.w[k];
        continue;
      }
      const double scale = t.gamma[i] * t.inverse_deviation(k, c);
      f.coef[i] = t.w[k] * scale;
      f.bias[c] += t.w[k] * (t.beta[i] - scale * t.mean[i]);
    }
  return f;
}

BackwardCoefficients backward_coefficients(const NormTable& t, const std::vector<double>& sums,
                                           const std::vector<double>& dots, double count) {
  const int64_t K = t.K, C = t.C;
  int64_t rows = 0;
  for (int64_t row : t.affine_row) rows += row >= 0;
  BackwardCoefficients b;
  b.a.resize(K * C);
  b.b.resize(K * C);
  b.c.resize(K * C);
  b.dw.resize(K);
  b.dgamma.resize(rows * C);
  b.dbeta.resize(rows * C);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = k * C + c;
      if (t.kinds[k] == kPlain) {
        b.a[i] = t.w[k];
        b.dw[k] += dots[i];
        continue;
      }
      const double r = t.inverse_deviation(k, c), tk = r * dots[i];
      b.a[i] = t.w[k] * r * t.gamma[i];
      if (t.kinds[k] == kBatch && count > 0) {
        b.b[i] = -b.a[i] * r * tk / count;
        b.c[i] = -b.a[i] * sums[c] / count;
      }
      b.dw[k] += t.gamma[i] * tk + t.beta[i] * sums[c];
      if (t.affine_row[k] < 0) continue;
      b.dgamma[t.affine_row[k] * C + c] = t.w[k] * tk;
      b.dbeta[t.affine_row[k] * C + c] = t.w[k] * sums[c];
    }
  return b;
}

at::Tensor carried_gradients(const NormTable& t, const BackwardCoefficients& b,
                             at::IntArrayRef need, const at::TensorOptions& options) {
  std::vector<double> rows;
  for (size_t k = 0; k < need.size(); ++k)
    if (need[k] == kCarried)
      for (const std::vector<double>* values : {&b.a, &b.b, &t.mean, &b.c})
        rows.insert(rows.end(), values->begin() + k * t.C, values->begin() + (k + 1) * t.C);
  const int64_t count = std::count(need.begin(), need.end(), kCarried);
  return from_doubles(rows, {count, 4, t.C}, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_batch_norm_cpu(
    at::TensorList xs, const at::Tensor& weights, at::IntArrayRef kinds, at::ArrayRef<double> eps,
    at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
    at::TensorList running_means, at::TensorList running_vars, at::TensorList carriers) {
  const char* op = "mixed_batch_norm";
  check_inputs(op, xs, weights);
  check_weights(op, weights, xs.size(), xs[0]);
  TORCH_CHECK_VALUE(xs[0].dim() >= 2, op, ": expected inputs of shape (N, C, ...), but got ",
                    xs[0].sizes());
  check_carriers(op, xs, carriers);
  const at::ScalarType dtype = result_dtype(xs);
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  at::Tensor y = at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format);
  NormTable table = make_norm_table(op, xs[0].size(1), weights, kinds, eps, affine, gammas, betas);
  set_running_statistics(op, table, running_means, running_vars);
  if (y.numel()) {
    set_made_statistics(table, carriers);
    const Layout layout = layout_of(y.sizes(), format != at::MemoryFormat::Contiguous);
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const Mix<T> mix(layout);
      const std::vector<const T*> x = const_pointers<T>(operands);
      batch_statistics(mix, x, table);
      const ForwardCoefficients f = forward_coefficients(table);
      const Slot<T> out{static_cast<T*>(y.mutable_data_ptr()), layout.C, 1};
      mix.combine(x, out, f.coef, f.bias, [](int64_t, int64_t) {});
    });
  }
  return {y, from_doubles(table.mean, {table.K, table.C}, weights.options()),
          from_doubles(table.var, {table.K, table.C}, weights.options())};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
mixed_batch_norm_backward_cpu(const at::Tensor& grad, at::TensorList xs, const at::Tensor& weights,
                              const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef kinds,
                              at::ArrayRef<double> eps, at::IntArrayRef affine,
                              at::TensorList gammas, at::TensorList betas, at::IntArrayRef need_xs,
                              bool need_weights) {
  const char* op = "mixed_batch_norm_backward";
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.dim() >= 2, op, ": expected grad of shape (N, C, ...), but got ",
                    grad.sizes());
  check_saved(op, xs, grad.sizes(), grad);
  check_weights(op, weights, xs.size(), grad);
  TORCH_CHECK_VALUE(need_xs.size() == xs.size(), op, ": expected need_xs of one entry per input (",
                    xs.size(), "), but got ", need_xs.size());
  NormTable table = make_norm_table(op, grad.size(1), weights, kinds, eps, affine, gammas, betas);
  set_statistics(op, table, mean, var);
  const at::ScalarType dtype = grad.scalar_type();
  at::Tensor like = grad;
  for (const at::Tensor& x : xs)
    if (x.sizes() == grad.sizes()) {
      like = x;
      break;
    }
  const at::MemoryFormat format = memory_format(like);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  const at::Tensor g = as_operand(grad, dtype, format);
  MixGradients out;
  out.dw = at::empty({0}, weights.options());
  for (int64_t need : need_xs)
    if (need == kWritten) out.dxs.push_back(at::empty(grad.sizes(), grad.options(), format));
  const Layout layout = layout_of(grad.sizes(), format != at::MemoryFormat::Contiguous);
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<T*> dx(table.K, nullptr);
    for (int64_t k = 0, i = 0; k < table.K; ++k)
      if (need_xs[k] == kWritten) dx[k] = static_cast<T*>(out.dxs[i++].mutable_data_ptr());
    const Slot<const T> slot{const_pointer<T>(g), layout.C, 1};
    mix_backward(Mix<T>(layout), layout, slot, const_pointers<T>(operands), table, dx, out, weights,
                 need_weights, need_xs);
  });
  return {out.dxs, out.dw, out.dgamma, out.dbeta, out.carried};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("mixed_batch_norm", &fastnas::mixed_batch_norm_cpu);
  m.impl("mixed_batch_norm_backward", &fastnas::mixed_batch_norm_backward_cpu);
}
