// SPDX-License-Identifier: Apache-2.0
// Parts of sum g and sum g (x_k - centre_k) of every channel: what the gradients of weights, of BatchNorms and of gates
// are made of. Moves (1 + K) * sizeof(T) bytes an element for K <= kDotSlice.
// Operands dense, planes or columns (plan.h); g dense or a slot.
#include "mix.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

// Operands whose vectors a thread loads before it uses the first; the sums of eight channels each leave room for two.
template <int V>
constexpr int kBatchOf = V == 8 ? 2 : 4;

// grid: x parts of every channel (planes) or of every chunk of lanes (columns), y slices of operands.
template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    dots_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Dots args) {
  using A = acc_type<T>;
  constexpr int kWidth = kColumns ? V : 1, kBatch = kBatchOf<V>;
  const int first_operand = static_cast<int>(blockIdx.y) * kDotSlice;
  const Share share = share_of<kColumns>(plan);
  const A* centre = static_cast<const A*>(args.centre);

  A plane_centre[kDotSlice];
#pragma unroll
  for (int j = 0; j < kDotSlice; ++j) {
    const int k = first_operand + j;
    plane_centre[j] =
        !kColumns && centre && k < args.K ? centre[k * plan.period + share.side] : A{0};
  }

  A acc[(kDotSlice + 1) * kWidth];
#pragma unroll
  for (int i = 0; i < (kDotSlice + 1) * kWidth; ++i) acc[i] = 0;
  const auto add = [&](const Place& at) {
    const Operand<T, V> loaded =
        load_strided<T, V>(static_cast<const T*>(args.g) + at.slot, kColumns ? args.step : 1);
    A g[V];
#pragma unroll
    for (int first_of_batch = 0; first_of_batch < kDotSlice; first_of_batch += kBatch) {
      Operand<T, V> x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = first_operand + first_of_batch + b;
        if (k < args.K && args.xs[k]) x[b] = load<T, V>(static_cast<const T*>(args.xs[k]) + at.at);
      }
      if (first_of_batch == 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          g[i] = loaded.acc(i);
          acc[i % kWidth] += g[i];
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int j = first_of_batch + b, k = first_operand + j;
        if (k >= args.K || !args.xs[k]) continue;
        A m[V];
#pragma unroll
        for (int i = 0; i < V; ++i) m[i] = plane_centre[j];
        if (kColumns && centre) load_entries<V, kColumns>(m, centre + k * plan.period + at.entry);
#pragma unroll
        for (int i = 0; i < V; ++i)
          acc[(1 + j) * kWidth + i % kWidth] += g[i] * (x[b].acc(i) - m[i]);
      }
    }
  };
  for_each_of_share<V, kColumns>(plan, share, args.step, add);

  sum_over_rows(acc, share.row, share.rows, kColumns ? plan.lanes : 1);
  if (share.row != 0 || !share.works) return;
  A* partial = static_cast<A*>(args.partial);
#pragma unroll
  for (int j = 0; j <= kDotSlice; ++j) {
    if (j == 0 ? blockIdx.y != 0 : first_operand + j > args.K) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t entry = kColumns ? share.lane * V + i : share.side,
                    sum = j == 0 ? 0 : first_operand + j;
      partial[(sum * plan.period + entry) * plan.parts + share.part] = acc[j * kWidth + i];
    }
  }
}

}  // namespace

cudaError_t launch_dots(const Plan& plan, const Dots& args, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const auto kernel =
        dots_kernel<typename decltype(type)::type, decltype(vector)::value, kColumns>;
    const int64_t blocks = plan.parts * (kColumns ? plan.chunks : plan.C);
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    const unsigned slices = static_cast<unsigned>(args.K > 0 ? ceil_div(args.K, kDotSlice) : 1);
    FASTNAS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), slices), plan.threads(), stream,
                   plan, args);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
