// SPDX-License-Identifier: Apache-2.0
// Several weighted sums of the same operands in one pass over them, and what their gradients are made of. Tables and
// operands as in mix.h.
#pragma once
#include "mix.h"

namespace fastnas::cuda {

// y_j = bias_j + sum_i coef_ji x_i (+ own_j z_j where z_j is given), channel by channel; nothing where y_j is null.
// Reads I operands and every z, writes J. An operand is left out of the sums where its weight is 0, and not read where
// it is so in all of kSumSlice sums.
constexpr int kSumSlice = 4;
struct Sums {
  const void *xs[kMaxOperands], *zs[kMaxOperands];
  void* ys[kMaxOperands];
  int I, J;
  const void* weights;  // [J][I]
  const void* coef;     // [J][I][period]
  const void* own;      // [J][period]
  const void* bias;     // [J][period], or null
};
cudaError_t launch_sums(const Plan& plan, const Sums& args, cudaStream_t stream);

// For each of G tensors: parts of sum g and of sum g (x_k - centre_k), left alone for null x_k. Reads K operands once
// for every four tensors g (two where the sums of four would not fit into registers), and those again for every four
// operands (eight in planes).
struct TargetDots {
  const void *gs[kMaxOperands], *xs[kMaxOperands];
  int G, K;
  const void* centre;  // [K][period], or null for zeros
  void* partial;       // [G][K + 1][period][parts], sum g first
};
cudaError_t launch_target_dots(const Plan& plan, const TargetDots& args, cudaStream_t stream);

}  // namespace fastnas::cuda
