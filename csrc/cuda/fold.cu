// SPDX-License-Identifier: Apache-2.0
// Small kernels around the passes: partial sums folded in double, rows of values repeated over a table's period.
#include "mix.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

// One block an output. Every thread adds up a fixed share, then the block's tree does.
template <typename Out, typename In>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const In* partial, int64_t count, Out* out) {
  const In* p = partial + blockIdx.x * count;
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum[0] += static_cast<double>(p[i]);
  sum_over_rows(sum, static_cast<int>(threadIdx.x), kThreads, 1);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(sum[0]);
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    repeat_kernel(const A* values, int64_t channels, int64_t period, int64_t total, A* rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t k = i / period;
  rows[i] = values[k * channels + (i - k * period) % channels];
}

template <typename Out, typename In>
cudaError_t fold(const void* partial, int64_t K, int64_t count, void* out, cudaStream_t stream) {
  if (!fits_grid(K)) return cudaErrorInvalidConfiguration;
  const auto kernel = fold_kernel<Out, In>;
  FASTNAS_LAUNCH(kernel, static_cast<unsigned>(K), kThreads, stream,
                 static_cast<const In*>(partial), count, static_cast<Out*>(out));
  return cudaGetLastError();
}

template <typename A>
cudaError_t repeat(const Plan& plan, const void* values, int64_t K, void* rows,
                   cudaStream_t stream) {
  const auto kernel = repeat_kernel<A>;
  const int64_t total = plan.tables(K), blocks = ceil_div(total, kThreads);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  FASTNAS_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, stream,
                 static_cast<const A*>(values), plan.C, plan.period, total, static_cast<A*>(rows));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fold(bool double_out, bool double_in, const void* partial, int64_t K,
                        int64_t count, void* out, cudaStream_t stream) {
  if (K == 0) return cudaSuccess;
  if (double_out) return fold<double, double>(partial, K, count, out, stream);
  return double_in ? fold<float, double>(partial, K, count, out, stream)
                   : fold<float, float>(partial, K, count, out, stream);
}

cudaError_t launch_repeat(const Plan& plan, const void* values, int64_t K, void* rows,
                          cudaStream_t stream) {
  if (plan.tables(K) == 0) return cudaSuccess;
  if (plan.dtype == Dtype::kDouble) return repeat<double>(plan, values, K, rows, stream);
  return repeat<float>(plan, values, K, rows, stream);
}

}  // namespace fastnas::cuda
