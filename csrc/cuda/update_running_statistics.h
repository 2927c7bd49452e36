// SPDX-License-Identifier: Apache-2.0
// What a training step leaves in BatchNorms: running statistics and counters of many of them, in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

// Of K norms that are all different. Running statistics are of the dtype of mean and var: float, or double.
struct RunningStatistics {
  Dtype dtype;
  int K, counted;
  int64_t C;
  const void *mean, *var;  // [rows][C], the variances biased
  double unbiased;  // what they are multiplied by; 0: there was no value, and counters move alone
  int row[kMaxOperands];
  double momentum[kMaxOperands];
  void *means[kMaxOperands], *vars[kMaxOperands];
  int64_t mean_step[kMaxOperands], var_step[kMaxOperands];  // elements from one channel to the next
  int64_t* counters[kMaxOperands];                          // `counted` of them
};
cudaError_t launch_running_statistics(const RunningStatistics& args, cudaStream_t stream);

}  // namespace fastnas::cuda
