// SPDX-License-Identifier: Apache-2.0
// A thread a channel of a norm: a few numbers, all of whose cost is the launch.
#include "update_running_statistics.h"
#include "vec.cuh"

namespace fastnas::cuda {

namespace {

// As PyTorch's BatchNorm, in double: by a difference, an infinity would become NaN in the next step.
template <typename A>
__device__ inline void move(void* running, int64_t at, double value, double momentum) {
  A* to = static_cast<A*>(running) + at;
  *to = static_cast<A>(momentum * value + (1 - momentum) * static_cast<double>(*to));
}

// grid: x chunks of channels, y norms.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    running_statistics_kernel(const __grid_constant__ RunningStatistics args) {
  const int k = static_cast<int>(blockIdx.y);
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c == 0 && k < args.counted) ++*args.counters[k];
  if (c >= args.C || args.unbiased == 0) return;
  const int64_t from = args.row[k] * args.C + c;
  const double mean = static_cast<const A*>(args.mean)[from];
  const double var = static_cast<const A*>(args.var)[from];
  move<A>(args.means[k], c * args.mean_step[k], mean, args.momentum[k]);
  move<A>(args.vars[k], c * args.var_step[k], var * args.unbiased, args.momentum[k]);
}

}  // namespace

cudaError_t launch_running_statistics(const RunningStatistics& args, cudaStream_t stream) {
  if (args.K == 0) return cudaSuccess;
  const int64_t chunks = ceil_div(args.C > 0 ? args.C : 1, kThreads);
  if (!fits_grid(chunks)) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(args.K));
  const auto kernel = args.dtype == Dtype::kDouble ? running_statistics_kernel<double>
                                                   : running_statistics_kernel<float>;
  FASTNAS_LAUNCH(kernel, grid, kThreads, stream, args);
  return cudaGetLastError();
}

}  // namespace fastnas::cuda
