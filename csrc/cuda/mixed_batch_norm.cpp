// SPDX-License-Identifier: Apache-2.0
// BatchNorm of some operands and the weighted sum of all, on CUDA. Passes: statistics K, sum K + 1; backward: reduction
// K + 1, gradients 2K + 1. Normalised operands are never written.
#include "mixed_batch_norm.h"

#include <torch/library.h>

namespace fastnas::cuda {

namespace {

// A row of C values as the kernels read it.
void set_values(NormArguments& n, const at::Tensor& t, const void*& data, unsigned char& dtype) {
  n.kept.push_back(t.contiguous());
  data = pointer(n.kept.back());
  dtype = static_cast<unsigned char>(dtype_of(t.scalar_type()));
}

bool fits(const at::Tensor& t, int64_t C, const at::Tensor& like) {
  return t.numel() == C && t.device() == like.device();
}

void set_affine(const char* op, int64_t C, NormArguments& n, int64_t k, const at::Tensor& gamma,
                const at::Tensor& beta) {
  TORCH_CHECK_VALUE(fits(gamma, C, n.like) && fits(beta, C, n.like), op,
                    ": expected a gamma and a beta of ", C, " values for each affine norm on ",
                    n.like.device());
  check_floating(op, "gamma", gamma);
  check_floating(op, "beta", beta);
  n.norms.affine_row[k] = static_cast<signed char>(n.affine_rows++);
  set_values(n, gamma, n.norms.gamma[k], n.norms.gamma_dtype[k]);
  set_values(n, beta, n.norms.beta[k], n.norms.beta_dtype[k]);
}

}  // namespace

void* at_row(const at::Tensor& table, int64_t entries) {
  return table.numel()
             ? static_cast<char*>(table.mutable_data_ptr()) + entries * table.element_size()
             : nullptr;
}

NormArguments make_norms(const char* op, int64_t C, int64_t K, const at::Tensor& like,
                         at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                         at::TensorList gammas, at::TensorList betas) {
  TORCH_CHECK_VALUE(K <= kMaxOperands && static_cast<int64_t>(kinds.size()) == K &&
                        static_cast<int64_t>(eps.size()) == K &&
                        static_cast<int64_t>(affine.size()) == K && gammas.size() == betas.size(),
                    op, ": expected kinds, eps and affine of one entry per input (", K,
                    "), but got ", kinds.size(), ", ", eps.size(), " and ", affine.size());
  NormArguments n{};
  n.norms.K = static_cast<int>(K);
  n.like = like;
  for (int64_t k = 0; k < K; ++k) {
    TORCH_CHECK_VALUE(kinds[k] >= kPlain && kinds[k] <= kRunning, op,
                      ": expected kinds of 0, 1 or 2, but got ", kinds[k]);
    n.norms.kinds[k] = static_cast<unsigned char>(kinds[k]);
    n.norms.eps[k] = eps[k];
    n.norms.affine_row[k] = -1;
    if (!affine[k]) continue;
    const int64_t row = n.affine_rows;
    TORCH_CHECK_VALUE(row < static_cast<int64_t>(gammas.size()), op,
                      ": expected a gamma and a beta of ", C, " values for each affine norm on ",
                      n.like.device());
    set_affine(op, C, n, k, gammas[row], betas[row]);
  }
  return n;
}

NormArguments make_norms(const char* op, int64_t C, const at::Tensor& weights,
                         at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                         at::TensorList gammas, at::TensorList betas) {
  NormArguments n = make_norms(op, C, weights.size(0), weights, kinds, eps, affine, gammas, betas);
  n.kept.push_back(weights.contiguous());
  n.norms.weights = {pointer(n.kept.back()), dtype_of(weights.scalar_type())};
  return n;
}

NormArguments make_source_norms(const char* op, const at::Tensor& x, const SourceNorm& norm,
                                const OptionalTensor& mean, const OptionalTensor& var) {
  const int64_t C = x.size(1);
  NormArguments n = make_norms(op, C, 1, x, {norm.kind}, {norm.eps}, {norm.gamma.has_value()},
                               given(norm.gamma), given(norm.beta));
  add_running_statistics(op, C, n, given(mean), given(var));
  return n;
}

NormArguments by_statistics(const NormArguments& n, const at::Tensor& mean, const at::Tensor& var) {
  NormArguments out = n;
  const int64_t C = mean.size(-1);
  const auto dtype = static_cast<unsigned char>(dtype_of(mean.scalar_type()));
  for (int k = 0; k < n.norms.K; ++k) {
    out.norms.kinds[k] = kRunning;
    out.norms.mean[k] = at_row(mean, k * C);
    out.norms.var[k] = at_row(var, k * C);
    out.norms.mean_dtype[k] = out.norms.var_dtype[k] = dtype;
  }
  return out;
}

void add_running_statistics(const char* op, int64_t C, NormArguments& n, at::TensorList means,
                            at::TensorList vars) {
  size_t row = 0;
  for (int k = 0; k < n.norms.K; ++k) {
    if (n.norms.kinds[k] != kRunning) continue;
    const at::Tensor& like = n.like;
    TORCH_CHECK_VALUE(row < means.size() && row < vars.size() && fits(means[row], C, like) &&
                          fits(vars[row], C, like),
                      op, ": expected running statistics of ", C,
                      " values for each norm in evaluation on ", like.device());
    check_floating(op, "running_mean", means[row]);
    check_floating(op, "running_var", vars[row]);
    set_values(n, means[row], n.norms.mean[k], n.norms.mean_dtype[k]);
    set_values(n, vars[row], n.norms.var[k], n.norms.var_dtype[k]);
    ++row;
  }
}

void check_statistics(const char* op, int64_t C, const NormArguments& n, const at::Tensor& mean,
                      const at::Tensor& var) {
  const at::Tensor& like = n.like;
  TORCH_CHECK_VALUE(fits(mean, n.norms.K * C, like) && fits(var, n.norms.K * C, like), op,
                    ": expected mean and var of shape [", n.norms.K, ", ", C, "] on ",
                    like.device(), ", but got ", mean.sizes(), " and ", var.sizes());
  check_floating(op, "mean", mean);
  check_floating(op, "var", var);
}

Plan statistics_plan(const Plan& plan, int64_t K) {
  Plan out = plan;
  if (K > 1) share_out(out, ceil_div(2 * kReduceBlocks, K));
  return out;
}

Statistics batch_parts(const Plan& plan, const std::vector<at::Tensor>& operands,
                       const NormArguments& n, at::Tensor& parts) {
  const int64_t K = n.norms.K, partials = K * plan.partials();
  const at::Tensor& like = n.like;
  Statistics statistics{};
  statistics.K = static_cast<int>(K);
  bool batch = false;
  for (int64_t k = 0; k < K; ++k)
    if (n.norms.kinds[k] == kBatch) {
      statistics.xs[k] = pointer(operands[k]);
      batch = true;
    }
  parts = scratch(batch ? 3 * partials : 0, at::kDouble, like);
  double* const first = static_cast<double*>(mutable_pointer(parts));
  statistics.count = first;
  statistics.mean = first + partials;
  statistics.m2 = first + 2 * partials;
  if (batch) C10_CUDA_CHECK(launch_statistics(plan, statistics, stream_of(like)));
  return statistics;
}

Coefficients mix_coefficients(const Plan& plan, const std::vector<at::Tensor>& operands,
                              const NormArguments& n, bool apart) {
  const int64_t K = n.norms.K;
  const at::ScalarType acc = plan.dtype == Dtype::kDouble ? at::kDouble : at::kFloat;
  Coefficients out;
  out.mean = at::empty({K, plan.C}, n.like.options().dtype(acc));
  out.var = at::empty({K, plan.C}, n.like.options().dtype(acc));
  out.table = scratch(plan.tables(apart ? 2 * K : K + 1), acc, n.like);
  at::Tensor parts;
  const Plan shares = statistics_plan(plan, K);
  const Statistics statistics = batch_parts(shares, operands, n, parts);
  const Normalise normalise{statistics.count,
                            statistics.mean,
                            statistics.m2,
                            mutable_pointer(out.mean),
                            mutable_pointer(out.var),
                            at_row(out.table, 0),
                            at_row(out.table, plan.tables(K)),
                            apart};
  C10_CUDA_CHECK(launch_normalise(shares, n.norms, normalise, stream_of(n.like)));
  return out;
}

Combine combine_arguments(const Plan& plan, const Coefficients& f,
                          const std::vector<at::Tensor>& operands, void* y, int64_t step) {
  Combine args{};
  args.K = static_cast<int>(operands.size());
  for (int k = 0; k < args.K; ++k) args.xs[k] = pointer(operands[k]);
  args.coef = at_row(f.table, 0);
  args.bias = at_row(f.table, plan.tables(args.K));
  args.y = y;
  args.step = step;
  return args;
}

bool needs_dot(const NormArguments& n, int64_t k, bool need_x, bool need_weights) {
  return need_weights || n.norms.affine_row[k] >= 0 || (n.norms.kinds[k] == kBatch && need_x);
}

at::Tensor centre_rows(const Plan& plan, const at::Tensor& means) {
  if (plan.period == plan.C && aligned(means.const_data_ptr())) return means;
  const int64_t K = means.size(0);
  const at::Tensor rows = scratch(plan.tables(K), means.scalar_type(), means);
  C10_CUDA_CHECK(launch_repeat(plan, pointer(means), K, rows.mutable_data_ptr(), stream_of(means)));
  return rows;
}

MixGradients mix_backward(const Plan& plan, const void* g, int64_t step,
                          const std::vector<at::Tensor>& operands, const NormArguments& n,
                          const at::Tensor& weights, const at::Tensor& mean, const at::Tensor& var,
                          at::IntArrayRef need_xs, bool need_weights) {
  const int64_t K = n.norms.K, C = plan.C;
  const bool wide = plan.dtype == Dtype::kDouble;
  const at::ScalarType acc = wide ? at::kDouble : at::kFloat;
  const cudaStream_t stream = stream_of(weights);
  const at::Tensor means = as_operand(mean, acc, at::MemoryFormat::Contiguous);
  const at::Tensor vars = as_operand(var, acc, at::MemoryFormat::Contiguous);
  Dots dots{};
  dots.g = g;
  dots.step = step;
  dots.K = static_cast<int>(K);
  bool reduces = false;  // else no sum is asked for
  for (int64_t k = 0; k < K; ++k) {
    const bool dot = needs_dot(n, k, need_xs[k], need_weights);
    if (dot) dots.xs[k] = pointer(operands[k]);
    reduces = reduces || dot;
  }
  at::Tensor partial, centre;
  if (reduces && plan.elements) {
    centre = centre_rows(plan, means);
    partial = scratch((K + 1) * plan.partials(), acc, weights);
    dots.centre = pointer(centre);
    dots.partial = mutable_pointer(partial);
    C10_CUDA_CHECK(launch_dots(plan, dots, stream));
  }
  MixGradients out;
  out.tables = scratch(3 * plan.tables(K), acc, weights);
  out.dgamma = at::empty({n.affine_rows, C}, weights.options().dtype(acc));
  out.dbeta = at::empty({n.affine_rows, C}, weights.options().dtype(acc));
  const at::Tensor dw_parts = scratch(K * C, at::kDouble, weights);
  const NormGradients args{dots.partial,
                           pointer(means),
                           pointer(vars),
                           at_row(out.tables, 0),
                           at_row(out.tables, plan.tables(K)),
                           at_row(out.tables, 2 * plan.tables(K)),
                           mutable_pointer(out.dgamma),
                           mutable_pointer(out.dbeta),
                           static_cast<double*>(mutable_pointer(dw_parts))};
  C10_CUDA_CHECK(launch_norm_gradients(plan, n.norms, args, stream));
  const at::ScalarType given = weights.scalar_type();
  out.dw = at::empty({need_weights ? K : 0}, weights.options().dtype(acc));
  if (need_weights)
    C10_CUDA_CHECK(launch_fold(wide, true, args.dw, K, C, mutable_pointer(out.dw), stream));
  out.dw = out.dw.to(given);
  out.dgamma = out.dgamma.to(given);
  out.dbeta = out.dbeta.to(given);
  return out;
}

Gradients gradient_arguments(const Plan& plan, const MixGradients& tables, const void* g,
                             int64_t step, const std::vector<at::Tensor>& operands,
                             const NormArguments& n, const std::vector<void*>& dxs) {
  Gradients args{};
  args.g = g;
  args.step = step;
  args.K = n.norms.K;
  for (int k = 0; k < args.K; ++k) {
    if (n.norms.kinds[k] == kBatch)
      args.xs[k] = pointer(operands[k]);  // else a * g is all there is
    args.dxs[k] = dxs[k];
  }
  args.a = at_row(tables.tables, 0);
  args.b = at_row(tables.tables, plan.tables(args.K));
  args.c = at_row(tables.tables, 2 * plan.tables(args.K));
  return args;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_batch_norm(
    at::TensorList xs, const at::Tensor& weights, at::IntArrayRef kinds, at::ArrayRef<double> eps,
    at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
    at::TensorList running_means, at::TensorList running_vars, at::TensorList carriers) {
  const char* op = "mixed_batch_norm";
  check_no_carriers(op, carriers);
  check_inputs(op, xs, weights);
  check_weights(op, weights, xs.size(), xs[0]);
  TORCH_CHECK_VALUE(xs[0].dim() >= 2, op, ": expected inputs of shape (N, C, ...), but got ",
                    xs[0].sizes());
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const int64_t C = xs[0].size(1);
  const at::ScalarType dtype = result_dtype(xs);
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  at::Tensor y = at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format);
  NormArguments norms = make_norms(op, C, weights, kinds, eps, affine, gammas, betas);
  add_running_statistics(op, C, norms, running_means, running_vars);
  std::vector<const void*> walked = pointers(operands);
  walked.push_back(mutable_pointer(y));
  const Plan plan = plan_channels(xs[0].sizes(), dtype, format, walked);
  const Coefficients f = mix_coefficients(plan, operands, norms);
  C10_CUDA_CHECK(launch_combine(plan, combine_arguments(plan, f, operands, mutable_pointer(y), 1),
                                stream_of(y)));
  return {y, f.mean.to(weights.scalar_type()), f.var.to(weights.scalar_type())};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
mixed_batch_norm_backward(const at::Tensor& grad, at::TensorList xs, const at::Tensor& weights,
                          const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef kinds,
                          at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
                          at::TensorList betas, at::IntArrayRef need_xs, bool need_weights) {
  const char* op = "mixed_batch_norm_backward";
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.dim() >= 2, op, ": expected grad of shape (N, C, ...), but got ",
                    grad.sizes());
  check_saved(op, xs, grad.sizes(), grad);
  check_weights(op, weights, xs.size(), grad);
  TORCH_CHECK_VALUE(need_xs.size() == xs.size(), op, ": expected need_xs of one entry per input (",
                    xs.size(), "), but got ", need_xs.size());
  for (int64_t need : need_xs) check_written(op, need);
  const c10::cuda::CUDAGuard guard(grad.device());
  const int64_t C = grad.size(1);
  NormArguments norms = make_norms(op, C, weights, kinds, eps, affine, gammas, betas);
  check_statistics(op, C, norms, mean, var);
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
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(grad.sizes(), grad.options(), format));
  const std::vector<void*> to = gradient_pointers(need_xs, dxs);
  std::vector<const void*> walked = pointers(operands);
  walked.push_back(pointer(g));
  walked.insert(walked.end(), to.begin(), to.end());
  const Plan plan = plan_channels(grad.sizes(), dtype, format, walked);
  const MixGradients out =
      mix_backward(plan, pointer(g), 1, operands, norms, weights, mean, var, need_xs, need_weights);
  C10_CUDA_CHECK(launch_gradients(
      plan, gradient_arguments(plan, out, pointer(g), 1, operands, norms, to), stream_of(grad)));
  return {dxs, out.dw, out.dgamma, out.dbeta, at::empty({0, 4, C}, weights.options())};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("mixed_batch_norm", &fastnas::cuda::mixed_batch_norm);
  m.impl("mixed_batch_norm_backward", &fastnas::cuda::mixed_batch_norm_backward);
}
