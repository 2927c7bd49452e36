// SPDX-License-Identifier: Apache-2.0
// The backward of a weighted sum in one pass: parts of sum g x_k, and dx_k = a_k g. Moves (1 + K + wanted dx_k) * sizeof(T)
// bytes an element. Operands dense planes (plan.h).
#include "mix.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

// grid: x parts of every channel.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    sum_gradients_kernel(const __grid_constant__ Plan plan,
                         const __grid_constant__ SumGradients args) {
  using A = acc_type<T>;
  const Share share = share_of<false>(plan);
  A a[kDotSlice], sum[kDotSlice] = {};
#pragma unroll
  for (int k = 0; k < kDotSlice; ++k)
    a[k] = k < args.K ? static_cast<const A*>(args.a)[k * plan.period + share.side] : A(0);
  for_each_of_share<V, false>(plan, share, 1, [&](const Place& at) {
    const Operand<T, V> g = load<T, V>(static_cast<const T*>(args.g) + at.at);
    // All loads before the first store: the compiler may not move a load over a store.
    Operand<T, V> x[kDotSlice];
#pragma unroll
    for (int k = 0; k < kDotSlice; ++k)
      if (k < args.K && args.xs[k]) x[k] = load<T, V>(static_cast<const T*>(args.xs[k]) + at.at);
#pragma unroll
    for (int k = 0; k < kDotSlice; ++k) {
      if (k >= args.K) break;
      if (args.xs[k]) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[k] += g.acc(v) * x[k].acc(v);
      }
      if (!args.dxs[k]) continue;
      A dx[V];
#pragma unroll
      for (int v = 0; v < V; ++v) dx[v] = a[k] * g.acc(v);
      store<T, V>(static_cast<T*>(args.dxs[k]) + at.at, dx);
    }
  });
  sum_over_rows(sum, share.row, share.rows, 1);
  if (share.row != 0) return;
  A* partial = static_cast<A*>(args.partial);
#pragma unroll
  for (int k = 0; k < kDotSlice; ++k)
    if (k < args.K)
      partial[((k + 1) * plan.period + share.side) * plan.parts + share.part] = sum[k];
}

}  // namespace

cudaError_t launch_sum_gradients(const Plan& plan, const SumGradients& args, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  if (plan.columns || args.K > kDotSlice) return cudaErrorInvalidValue;
  const int64_t blocks = plan.parts * plan.C;
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  return with_type(plan.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    const auto kernel =
        plan.vector == 1 ? sum_gradients_kernel<T, 1> : sum_gradients_kernel<T, kWide>;
    FASTNAS_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, stream, plan, args);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
