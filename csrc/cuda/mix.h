// SPDX-License-Identifier: Apache-2.0
// The passes over memory that all mixing ops are made of. Tables of coefficients have plan.period entries a row, in
// the accumulator type (double for double, else float); pointers to operands are to the plan's dtype.
//
// `step` is that of a slot: where the operands' channels sit in a larger tensor. Channel c is channel c * step of a
// tensor with C * step channels; 1 means a tensor of the operands' own shape.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

// y = bias + sum_k coef_k x_k, channel by channel. bias may be null. Reads K + 1 tensors' worth of memory.
struct Combine {
  const void* xs[kMaxOperands];
  int K;
  const void* coef;  // [K][period]
  const void* bias;  // [period]
  void* y;
  int64_t step;
};
cudaError_t launch_combine(const Plan& plan, const Combine& args, cudaStream_t stream);

// Number, mean and summed squared deviations of every part of every channel of K operands, null ones left alone.
// Reads K.
struct Statistics {
  const void* xs[kMaxOperands];
  int K;
  double *count, *mean, *m2;  // [K][period][parts] each
};
cudaError_t launch_statistics(const Plan& plan, const Statistics& args, cudaStream_t stream);

// Parts of sum g and of sum g (x_k - centre_k), 0 for null x_k. Reads K + 1, and g again for every kDotSlice operands.
constexpr int kDotSlice = 8;
struct Dots {
  const void* g;
  int64_t step;
  const void* xs[kMaxOperands];
  int K;
  const void* centre;  // [K][period], or null for zeros
  void* partial;       // [K + 1][period][parts], sum g first
};
cudaError_t launch_dots(const Plan& plan, const Dots& args, cudaStream_t stream);

// Both at once where the gradients do not wait for the sums: parts of sum g x_k as launch_dots leaves them (that of sum g
// is not written), and dx_k = a_k g. Planes, g dense, at most kDotSlice operands; x_k or dx_k may be null.
struct SumGradients {
  const void* g;
  const void* xs[kDotSlice];
  void* dxs[kDotSlice];
  int K;
  const void* a;  // [K][period]
  void* partial;  // [K + 1][period][parts]
};
cudaError_t launch_sum_gradients(const Plan& plan, const SumGradients& args, cudaStream_t stream);

// dx_k = a_k g + b_k x_k + c_k where x_k is given, a_k g where it is null; nothing where dx_k is null. Reads K + 1 and
// writes K.
struct Gradients {
  const void* g;
  int64_t step;
  const void* xs[kMaxOperands];
  void* dxs[kMaxOperands];
  int K;
  const void *a, *b, *c;  // [K][period]
};
cudaError_t launch_gradients(const Plan& plan, const Gradients& args, cudaStream_t stream);

// The same for operands with gradients of their own: dx_k = a_k g_k + b_k x_k + c_k, all dense. Reads 2 K and writes K.
struct ApartGradients {
  const void* gs[kMaxOperands];
  const void* xs[kMaxOperands];
  void* dxs[kMaxOperands];
  int K;
  const void *a, *b, *c;  // [K][period]
};
cudaError_t launch_apart_gradients(const Plan& plan, const ApartGradients& args,
                                   cudaStream_t stream);

// out[k] = the sum of partial[k][0 .. count), both in the accumulator type (partial in double if `wide`), taken in
// double.
cudaError_t launch_fold(bool double_out, bool double_in, const void* partial, int64_t K,
                        int64_t count, void* out, cudaStream_t stream);

// rows[k][i] = values[k][i % C], i < period.
cudaError_t launch_repeat(const Plan& plan, const void* values, int64_t K, void* rows,
                          cudaStream_t stream);

}  // namespace fastnas::cuda
