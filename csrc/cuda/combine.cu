// SPDX-License-Identifier: Apache-2.0
// y = bias + sum_k coef_k x_k per channel: the weighted sum, BatchNorms folded into its coefficients.
// Moves (K + 1) * sizeof(T) bytes an element. Operands dense, planes or columns (plan.h); y dense or a slot.
#include "mix.h"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kUnroll = 2;  // vectors of an operand that a thread has in flight
constexpr int kBatch = 4;   // operands, likewise: 8 loads wait for memory at once

template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Combine args,
                   int64_t tiles) {
  using A = acc_type<T>;
  const A* coef = static_cast<const A*>(args.coef);
  const A* bias = static_cast<const A*>(args.bias);
  T* y = static_cast<T*>(args.y);
  for_each_tile<V, kColumns, kUnroll>(
      plan, tiles, args.step, [&](const Place(&at)[kUnroll], const bool(&valid)[kUnroll]) {
        A sum[kUnroll][V];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[u][v] = 0;
          if (bias) load_entries<V, kColumns>(sum[u], bias + at[u].entry);
        }
        for (int first = 0; first < args.K; first += kBatch) {
          Operand<T, V> x[kBatch][kUnroll];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (first + j >= args.K) break;
            const T* p = static_cast<const T*>(args.xs[first + j]);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) x[j][u] = load<T, V>(p + at[u].at);
          }
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (first + j >= args.K) break;
            const A* row = coef + (first + j) * plan.period;
            A a[V];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              if (u == 0 || !kColumns)
                load_entries<V, kColumns>(a, row + at[u].entry);  // columns: all u share it
#pragma unroll
              for (int v = 0; v < V; ++v) sum[u][v] += a[v] * x[j][u].acc(v);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (valid[u]) store_strided<T, V>(y + at[u].slot, sum[u], kColumns ? args.step : 1);
      });
}

}  // namespace

cudaError_t launch_combine(const Plan& plan, const Combine& args, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const auto kernel =
        combine_kernel<typename decltype(type)::type, decltype(vector)::value, kColumns>;
    const int64_t tiles = tiles_of<kColumns, kUnroll>(plan);
    FASTNAS_LAUNCH(kernel, grid_for(tiles), plan.threads(), stream, plan, args, tiles);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
