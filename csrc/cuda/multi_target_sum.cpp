// SPDX-License-Identifier: Apache-2.0
// X_t = sum_k w_tk x_k for several targets t on CUDA, BatchNorm of some operands before. Passes: statistics K where
// normalised, sums K + T; backward: reduction K + T, gradients 2K + T.
#include "multi_target_sum.h"

#include <torch/library.h>

#include "mixed_batch_norm.h"

namespace fastnas::cuda {

namespace {

// Row of a table of two or more dimensions; null where it has no elements.
char* row_of(const at::Tensor& table, int64_t row) {
  if (!table.numel()) return nullptr;
  return static_cast<char*>(table.mutable_data_ptr()) +
         row * table.stride(0) * table.element_size();
}

// The norms as target t has them: with its row of the weights, which are the first tensor kept.
const Norms& norms_of(NormArguments& n, const at::Tensor& weights, int64_t t) {
  n.norms.weights = {row_of(weights, t), dtype_of(weights.scalar_type())};
  return n.norms;
}

NormArguments make_target_norms(const char* op, int64_t C, const at::Tensor& weights,
                                at::IntArrayRef kinds, at::ArrayRef<double> eps,
                                at::IntArrayRef affine, at::TensorList gammas,
                                at::TensorList betas) {
  return make_norms(op, C, weights.select(0, 0), kinds, eps, affine, gammas, betas);
}

// Coefficients [T][K][period] and biases [T][period] of the sums, and the statistics of the operands.
struct TargetTables {
  at::Tensor coef, bias, mean, var;
};

TargetTables normalised_tables(const Plan& plan, const std::vector<at::Tensor>& operands,
                               NormArguments& n, const at::Tensor& weights) {
  const int64_t T = weights.size(0), K = n.norms.K;
  const at::ScalarType acc = plan.dtype == Dtype::kDouble ? at::kDouble : at::kFloat;
  const cudaStream_t stream = stream_of(weights);
  at::Tensor kept;
  const Plan shares = statistics_plan(plan, K);
  const Statistics parts = batch_parts(shares, operands, n, kept);
  TargetTables out;
  out.mean = at::empty({K, plan.C}, weights.options().dtype(acc));
  out.var = at::empty({K, plan.C}, weights.options().dtype(acc));
  out.coef = at::empty({T, K, plan.period}, weights.options().dtype(acc));
  out.bias = at::empty({T, plan.period}, weights.options().dtype(acc));
  for (int64_t t = 0; t < T; ++t) {
    const Normalise normalise{parts.count,
                              parts.mean,
                              parts.m2,
                              mutable_pointer(out.mean),
                              mutable_pointer(out.var),
                              row_of(out.coef, t),
                              row_of(out.bias, t)};
    C10_CUDA_CHECK(launch_normalise(shares, norms_of(n, weights, t), normalise, stream));
  }
  return out;
}

// Coefficients [K][T][period] of the operands' gradients in those of the targets, [K][period] of the operands
// themselves and constants; and what is no operand's gradient. For operands without norms the weights are the first.
struct GradientTables {
  at::Tensor coef, own, bias, dw, dgamma, dbeta;
};

at::Tensor target_partials(const Plan& plan, const std::vector<at::Tensor>& gs,
                           const std::vector<at::Tensor>& operands, const at::Tensor& centre) {
  const int64_t G = gs.size(), K = operands.size();
  const at::ScalarType acc = accumulate_dtype(gs[0].scalar_type());
  const at::Tensor partial = scratch(G * (K + 1) * plan.partials(), acc, gs[0]);
  TargetDots dots{};
  for (int64_t g = 0; g < G; ++g) dots.gs[g] = pointer(gs[g]);
  for (int64_t k = 0; k < K; ++k) dots.xs[k] = pointer(operands[k]);
  dots.G = static_cast<int>(G);
  dots.K = static_cast<int>(K);
  dots.centre = pointer(centre);
  dots.partial = mutable_pointer(partial);
  C10_CUDA_CHECK(launch_target_dots(plan, dots, stream_of(gs[0])));
  return partial.view({G, (K + 1) * plan.partials()});
}

GradientTables plain_gradients(const Plan& plan, const std::vector<at::Tensor>& gs,
                               const std::vector<at::Tensor>& operands, const at::Tensor& weights,
                               bool need_weights) {
  const int64_t T = weights.size(0), K = weights.size(1);
  const at::ScalarType acc = accumulate_dtype(gs[0].scalar_type());
  const bool wide = acc == at::kDouble;
  GradientTables out;
  out.coef = weights.to(acc).t().contiguous();
  out.dgamma = at::empty({0, 1}, weights.options());
  out.dbeta = at::empty({0, 1}, weights.options());
  out.dw = at::empty({0}, weights.options());
  if (!need_weights) return out;
  at::Tensor sums = at::empty({T, K + 1}, weights.options().dtype(acc));
  if (plan.elements) {
    const at::Tensor partial = target_partials(plan, gs, operands, at::Tensor());
    C10_CUDA_CHECK(launch_fold(wide, wide, pointer(partial), T * (K + 1), plan.partials(),
                               mutable_pointer(sums), stream_of(weights)));
  } else {
    sums.zero_();
  }
  out.dw = sums.narrow(1, 1, K).contiguous().to(weights.scalar_type());
  return out;
}

GradientTables normalised_gradients(const Plan& plan, const std::vector<at::Tensor>& gs,
                                    const std::vector<at::Tensor>& operands, NormArguments& n,
                                    const at::Tensor& weights, const at::Tensor& mean,
                                    const at::Tensor& var, at::IntArrayRef need_xs,
                                    bool need_weights) {
  const int64_t T = weights.size(0), K = n.norms.K, C = plan.C, rows = n.affine_rows;
  const bool wide = plan.dtype == Dtype::kDouble;
  const at::ScalarType acc = wide ? at::kDouble : at::kFloat, given = weights.scalar_type();
  const at::TensorOptions options = weights.options().dtype(acc);
  const cudaStream_t stream = stream_of(weights);
  const at::Tensor means = as_operand(mean, acc, at::MemoryFormat::Contiguous);
  const at::Tensor vars = as_operand(var, acc, at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> read(operands);
  bool reduces = false;  // else no sum is asked for
  for (int64_t k = 0; k < K; ++k) {
    const bool dot = needs_dot(n, k, need_xs[k], need_weights);
    if (!dot) read[k] = at::empty({0}, options);
    reduces = reduces || dot;
  }
  at::Tensor partial;
  if (reduces && plan.elements) partial = target_partials(plan, gs, read, centre_rows(plan, means));
  // a, b and c of launch_gradients for each target.
  const at::Tensor tables = at::empty({T, 3, K, plan.period}, options),
                   dgamma = at::empty({T, rows, C}, options),
                   dbeta = at::empty({T, rows, C}, options), dw = at::empty({T, K}, options),
                   dw_parts = at::empty({T, K, C}, options.dtype(at::kDouble));
  const int64_t step = K * plan.period * static_cast<int64_t>(accumulator_size(plan.dtype));
  for (int64_t t = 0; t < T; ++t) {
    char* const a = row_of(tables, t);
    const NormGradients args{partial.defined() ? row_of(partial, t) : nullptr,
                             pointer(means),
                             pointer(vars),
                             a,
                             a ? a + step : nullptr,
                             a ? a + 2 * step : nullptr,
                             row_of(dgamma, t),
                             row_of(dbeta, t),
                             reinterpret_cast<double*>(row_of(dw_parts, t))};
    C10_CUDA_CHECK(launch_norm_gradients(plan, norms_of(n, weights, t), args, stream));
  }
  GradientTables out;
  out.coef = tables.select(1, 0).transpose(0, 1).contiguous();
  out.own = tables.select(1, 1).sum(0);
  out.bias = tables.select(1, 2).sum(0);
  out.dgamma = dgamma.sum(0).to(given);
  out.dbeta = dbeta.sum(0).to(given);
  out.dw = at::empty({0}, weights.options());
  if (!need_weights) return out;
  C10_CUDA_CHECK(launch_fold(wide, true, pointer(dw_parts), T * K, C, mutable_pointer(dw), stream));
  out.dw = dw.to(given);
  return out;
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> multi_target_sum(
    at::TensorList xs, const at::Tensor& weights, at::IntArrayRef kinds, at::ArrayRef<double> eps,
    at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
    at::TensorList running_means, at::TensorList running_vars) {
  const char* op = "multi_target_sum";
  check_inputs(op, xs, weights);
  check_target_weights(op, weights, xs.size(), xs[0]);
  const bool plain = all_plain(kinds);
  check_channels(op, xs[0].sizes(), plain);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const int64_t T = weights.size(0), K = weights.size(1), C = plain ? 1 : xs[0].size(1);
  const at::ScalarType dtype = result_dtype(xs), given = weights.scalar_type();
  const at::MemoryFormat format = memory_format(xs[0]);
  const at::Tensor w = weights.contiguous();
  NormArguments n = make_target_norms(op, C, w, kinds, eps, affine, gammas, betas);
  add_running_statistics(op, C, n, running_means, running_vars);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  std::vector<at::Tensor> ys;
  for (int64_t t = 0; t < T; ++t)
    ys.push_back(at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format));
  std::vector<const void*> walked = pointers(operands);
  for (const at::Tensor& y : ys) walked.push_back(pointer(y));
  const Plan plan = plain ? plan_flat(xs[0].numel(), dtype, walked)
                          : plan_channels(xs[0].sizes(), dtype, format, walked);
  Sums args{};
  args.I = static_cast<int>(K);
  args.J = static_cast<int>(T);
  for (int64_t k = 0; k < K; ++k) args.xs[k] = pointer(operands[k]);
  for (int64_t t = 0; t < T; ++t) args.ys[t] = mutable_pointer(ys[t]);
  const at::Tensor used = w.to(accumulate_dtype(dtype));
  TargetTables tables;
  tables.coef = used;
  if (plain) {
    tables.mean = at::empty({0}, weights.options());
    tables.var = at::empty({0}, weights.options());
  } else {
    tables = normalised_tables(plan, operands, n, w);
  }
  args.weights = pointer(used);
  args.coef = pointer(tables.coef);
  args.bias = plain ? nullptr : pointer(tables.bias);
  C10_CUDA_CHECK(launch_sums(plan, args, stream_of(w)));
  return {ys, tables.mean.to(given), tables.var.to(given)};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor> multi_target_sum_backward(
    at::TensorList grads, at::TensorList xs, const at::Tensor& weights, const at::Tensor& mean,
    const at::Tensor& var, at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
    at::TensorList gammas, at::TensorList betas, at::IntArrayRef need_xs, bool need_weights) {
  const char* op = "multi_target_sum_backward";
  check_target_gradients(op, grads, xs, weights, need_xs);
  const at::Tensor& first = grads[0];
  const bool plain = all_plain(kinds);
  check_channels(op, first.sizes(), plain);
  const c10::cuda::CUDAGuard guard(first.device());
  const int64_t K = weights.size(1), G = grads.size(), C = plain ? 1 : first.size(1);
  const at::Tensor w = weights.contiguous();
  NormArguments n = make_target_norms(op, C, w, kinds, eps, affine, gammas, betas);
  if (!plain) check_statistics(op, C, n, mean, var);
  const at::ScalarType dtype = first.scalar_type();
  const at::MemoryFormat format = saved_format(xs, first);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format),
                                gs = as_operands(grads, dtype, format);
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(first.sizes(), first.options(), format));
  const std::vector<void*> to = gradient_pointers(need_xs, dxs);
  std::vector<const void*> walked = pointers(operands);
  for (const at::Tensor& g : gs) walked.push_back(pointer(g));
  walked.insert(walked.end(), to.begin(), to.end());
  const Plan plan = plain ? plan_flat(first.numel(), dtype, walked)
                          : plan_channels(first.sizes(), dtype, format, walked);
  const GradientTables tables =
      plain ? plain_gradients(plan, gs, operands, w, need_weights)
            : normalised_gradients(plan, gs, operands, n, w, mean, var, need_xs, need_weights);
  const at::Tensor used = w.to(accumulate_dtype(dtype)).t().contiguous();
  Sums args{};
  args.I = static_cast<int>(G);
  args.J = static_cast<int>(K);
  for (int64_t g = 0; g < G; ++g) args.xs[g] = pointer(gs[g]);
  for (int64_t k = 0; k < K; ++k) {
    args.ys[k] = to[k];
    if (n.norms.kinds[k] == kBatch) args.zs[k] = pointer(operands[k]);
  }
  args.weights = pointer(used);
  args.coef = pointer(tables.coef);
  args.own = plain ? nullptr : pointer(tables.own);
  args.bias = plain ? nullptr : pointer(tables.bias);
  C10_CUDA_CHECK(launch_sums(plan, args, stream_of(w)));
  return {dxs, tables.dw, tables.dgamma, tables.dbeta};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("multi_target_sum", &fastnas::cuda::multi_target_sum);
  m.impl("multi_target_sum_backward", &fastnas::cuda::multi_target_sum_backward);
}
