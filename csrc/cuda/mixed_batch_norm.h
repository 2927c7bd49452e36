// SPDX-License-Identifier: Apache-2.0
// The hosts' side of BatchNorm and weighted sum: what mixed_batch_norm and partial_channel_mix share.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "../source_norm.h"
#include "host.h"
#include "norm.h"

namespace fastnas::cuda {

// The arguments of the norms as kernels take them, and the tensors they point into.
struct NormArguments {
  Norms norms;
  int64_t affine_rows;
  at::Tensor like;  // on their device
  std::vector<at::Tensor> kept;
};

// Norms whose weights are 1. K inputs on the device of `like`.
NormArguments make_norms(const char* op, int64_t C, int64_t K, const at::Tensor& like,
                         at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                         at::TensorList gammas, at::TensorList betas);

NormArguments make_norms(const char* op, int64_t C, const at::Tensor& weights,
                         at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine,
                         at::TensorList gammas, at::TensorList betas);

// The norm of one source. mean, var: running statistics, or those that a forward has found.
NormArguments make_source_norms(const char* op, const at::Tensor& x, const SourceNorm& norm,
                                const OptionalTensor& mean, const OptionalTensor& var);

// The same norms by the statistics of a forward, dense [K][C].
NormArguments by_statistics(const NormArguments& n, const at::Tensor& mean, const at::Tensor& var);

void add_running_statistics(const char* op, int64_t C, NormArguments& n, at::TensorList means,
                            at::TensorList vars);

// Those of a backward: [K][C].
void check_statistics(const char* op, int64_t C, const NormArguments& n, const at::Tensor& mean,
                      const at::Tensor& var);

// The plan of the statistics of K operands, each of which has blocks of its own: what a block's threads have summed up
// is merged in a tree that costs as much as reading a dozen vectors, so blocks are no more than fill a GPU twice.
Plan statistics_plan(const Plan& plan, int64_t K);

// Starts the statistics of the operands that are normalised by them and puts their parts into a tensor. Of that plan.
Statistics batch_parts(const Plan& plan, const std::vector<at::Tensor>& operands,
                       const NormArguments& n, at::Tensor& parts);

// Means and variances that are used, in the accumulator's dtype, and the tables of the sum: coef [K][period], then bias;
// apart, a bias for each operand.
struct Coefficients {
  at::Tensor mean, var, table;
};
Coefficients mix_coefficients(const Plan& plan, const std::vector<at::Tensor>& operands,
                              const NormArguments& n, bool apart = false);

// Where entry `entries` of a table is; null if it is empty.
void* at_row(const at::Tensor& table, int64_t entries);

// The sum that those stand for, to the slot y.
Combine combine_arguments(const Plan& plan, const Coefficients& f,
                          const std::vector<at::Tensor>& operands, void* y, int64_t step);

struct MixGradients {
  at::Tensor dw, dgamma, dbeta;
  at::Tensor tables;  // a, b and c of launch_gradients, [K][period] each
};

// Whether the backward needs sum g (x_k - mean_k).
bool needs_dot(const NormArguments& n, int64_t k, bool need_x, bool need_weights);

// Means [K][C] as a table [K][period] that vector loads may read.
at::Tensor centre_rows(const Plan& plan, const at::Tensor& means);

// All of the backward but the gradients of the operands, for which it leaves the tables. g is the slot of the output's
// gradient. Operands without elements were not kept by the forward because nothing needs them.
MixGradients mix_backward(const Plan& plan, const void* g, int64_t step,
                          const std::vector<at::Tensor>& operands, const NormArguments& n,
                          const at::Tensor& weights, const at::Tensor& mean, const at::Tensor& var,
                          at::IntArrayRef need_xs, bool need_weights);

// The arguments of launch_gradients for what mix_backward left.
Gradients gradient_arguments(const Plan& plan, const MixGradients& tables, const void* g,
                             int64_t step, const std::vector<at::Tensor>& operands,
                             const NormArguments& n, const std::vector<void*>& dxs);

}  // namespace fastnas::cuda
