// SPDX-License-Identifier: Apache-2.0
#include "update_running_statistics.h"

#include <torch/library.h>

#include <algorithm>

#include "../running_statistics.h"
#include "host.h"

namespace fastnas::cuda {

void update_running_statistics(at::TensorList running_means, at::TensorList running_vars,
                               at::TensorList counters, const at::Tensor& mean,
                               const at::Tensor& var, at::IntArrayRef rows,
                               at::ArrayRef<double> momenta, int64_t count) {
  const char* op = "update_running_statistics";
  check_running_statistics(op, running_means, running_vars, counters, mean, var, rows, momenta,
                           count);
  TORCH_CHECK_VALUE(
      rows.size() <= static_cast<size_t>(kMaxOperands) && counters.size() <= rows.size(), op,
      ": expected at most ", kMaxOperands, " rows and a counter for each, but ", "got ",
      rows.size(), " and ", counters.size());
  const c10::cuda::CUDAGuard guard(mean.device());
  const at::Tensor means = mean.contiguous(), vars = var.contiguous();
  RunningStatistics args{};
  args.dtype = dtype_of(mean.scalar_type());
  args.K = static_cast<int>(rows.size());
  args.counted = static_cast<int>(counters.size());
  args.C = mean.size(1);
  args.mean = pointer(means);
  args.var = pointer(vars);
  args.unbiased = count ? unbiased(count) : 0;
  for (int k = 0; k < args.counted; ++k) {
    args.counters[k] = counters[k].mutable_data_ptr<int64_t>();
    written(counters[k]);
  }
  for (int k = 0; k < args.K; ++k) {
    args.row[k] = static_cast<int>(rows[k]);
    args.momentum[k] = momenta[k];
    args.means[k] = mutable_pointer(running_means[k]);
    args.vars[k] = mutable_pointer(running_vars[k]);
    args.mean_step[k] = running_means[k].stride(0);
    args.var_step[k] = running_vars[k].stride(0);
    if (count == 0) continue;
    written(running_means[k]);
    written(running_vars[k]);
  }
  C10_CUDA_CHECK(launch_running_statistics(args, stream_of(mean)));
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("update_running_statistics", &fastnas::cuda::update_running_statistics);
}
