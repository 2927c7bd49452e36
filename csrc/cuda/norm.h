// SPDX-License-Identifier: Apache-2.0
// The per-channel arithmetic between the passes of mixed_batch_norm and partial_channel_mix, on the device: from
// statistics to the coefficients of the sum, and from reduced sums to those of the gradients. The formulas are at the
// head of ../cpu/mixed_batch_norm.h.
#pragma once
#include "mix.h"

namespace fastnas::cuda {

enum NormKind : unsigned char { kPlain = 0, kBatch = 1, kRunning = 2 };

// A vector of C values in a dtype of its own; null stands for a constant.
struct Values {
  const void* data;
  Dtype dtype;
};

// Passed by value: 64 of these are within the 4 KB that every GPU takes as kernel arguments.
struct Norms {
  int K;
  Values weights;  // K of them; null: ones
  unsigned char kinds[kMaxOperands];
  signed char affine_row[kMaxOperands];  // of k in the affine gradients, -1 if it has none
  double eps[kMaxOperands];
  // gamma and beta where affine (else null), means and variances where running.
  const void *gamma[kMaxOperands], *beta[kMaxOperands], *mean[kMaxOperands], *var[kMaxOperands];
  unsigned char gamma_dtype[kMaxOperands], beta_dtype[kMaxOperands], mean_dtype[kMaxOperands],
      var_dtype[kMaxOperands];
};

// Merges the parts of the statistics into mean and biased variance, [K][C] (0 and 1 for plain operands), and makes the
// tables of launch_combine: coef [K][period] and bias [period], or, apart, [K][period]: each operand's own.
struct Normalise {
  const double *count, *part_mean, *m2;  // as launch_statistics leaves them
  void *mean, *var;
  void *coef, *bias;
  bool apart = false;
};
cudaError_t launch_normalise(const Plan& plan, const Norms& norms, const Normalise& args,
                             cudaStream_t stream);

// Folds the parts of launch_dots (null: nothing was reduced, all sums are 0) and makes the tables of launch_gradients,
// [K][period] each; dgamma and dbeta [affine rows][C]; dw [K][C] in double, to be summed over the channels (null: not
// wanted). Apart, every operand has a gradient g_k of its own.
struct NormGradients {
  const void* partial;
  const void *mean, *var;  // [K][C]
  void *a, *b, *c;
  void *dgamma, *dbeta;
  double* dw;
  // 0: partial is [K + 1][period][parts of the plan]. Else apart, [K][2][C][parts]: parts of sum g_k and of
  // sum g_k (x_k - mean_k).
  int64_t parts = 0;
};
cudaError_t launch_norm_gradients(const Plan& plan, const Norms& norms, const NormGradients& args,
                                  cudaStream_t stream);

}  // namespace fastnas::cuda
