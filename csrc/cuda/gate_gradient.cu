// SPDX-License-Identifier: Apache-2.0
// dalpha_i = p_i (G_i - sum_j p_j G_j): one block folds the partial dot products, a warp a candidate, and applies the
// closed form. The pass over the tensors is launch_dots: (1 + K) * sizeof(T) bytes an element.
#include "gate_gradient.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

template <typename A, typename P>
__global__ void __launch_bounds__(kThreads)
    gates_kernel(const __grid_constant__ GateRows gates, const A* partial, int64_t count,
                 const P* p, P* dalpha) {
  FASTNAS_SHARED(double, weighted, kMaxOperands);  // p_j G_j
  FASTNAS_SHARED(double, dots, kMaxOperands);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int k = thread / 32; k < gates.K; k += kThreads / 32) {
    double sum = 0;
    if (gates.rows[k] >= 0) {
      const A* row = partial + gates.rows[k] * count;
      for (int64_t i = lane; i < count; i += 32) sum += static_cast<double>(row[i]);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      dots[k] = sum;
      weighted[k] = static_cast<double>(to_acc(p[k])) * sum;
    }
  }
  __syncthreads();
  if (thread >= gates.K) return;
  double mean = 0;
  for (int j = 0; j < gates.K; ++j) mean += weighted[j];
  const double g = static_cast<double>(to_acc(p[thread])) * (dots[thread] - mean);
  dalpha[thread] = from_acc<P>(static_cast<acc_type<P>>(g));
}

}  // namespace

cudaError_t launch_gates(Dtype accumulator, const GateRows& gates, const void* partial,
                         int64_t count, Dtype probs, const void* p, void* dalpha,
                         cudaStream_t stream) {
  if (gates.K == 0) return cudaSuccess;
  return with_type(probs, [&](auto type) {
    using P = typename decltype(type)::type;
    const P* from = static_cast<const P*>(p);
    P* to = static_cast<P*>(dalpha);
    if (accumulator == Dtype::kDouble) {
      const auto kernel = gates_kernel<double, P>;
      FASTNAS_LAUNCH(kernel, 1, kThreads, stream, gates, static_cast<const double*>(partial), count,
                     from, to);
    } else {
      const auto kernel = gates_kernel<float, P>;
      FASTNAS_LAUNCH(kernel, 1, kThreads, stream, gates, static_cast<const float*>(partial), count,
                     from, to);
    }
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
