// SPDX-License-Identifier: Apache-2.0
// Parts of sum g and sum g (x_k - centre_k) of every channel for several g: all dot products of the gradients of some
// targets with the operands they share. For each slice of targets moves (targets + K) * sizeof(T) bytes an element for
// as many operands as a slice has. Operands dense, planes or columns (plan.h).
#include "multi_target_sum.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

// Operands and targets of a block: as many as leave their sums in registers, one for each channel of a vector.
template <bool kColumns>
constexpr int kOperandsOf = kColumns ? 4 : 8;
template <typename T, int V, bool kColumns>
constexpr int kTargetsOf = sizeof(T) == 8 || (kColumns && V == 8) ? 2 : 4;

// grid: x parts of every channel (planes) or of every chunk of lanes (columns), y slices of operands, z of targets.
template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    target_dots_kernel(const __grid_constant__ Plan plan, const __grid_constant__ TargetDots args) {
  using A = acc_type<T>;
  constexpr int kWidth = kColumns ? V : 1, kOperands = kOperandsOf<kColumns>,
                kTargets = kTargetsOf<T, V, kColumns>,
                kBatch = !kColumns && V < 8 ? 4
                         : V == 4           ? 1
                                            : 2;
  const int first_operand = static_cast<int>(blockIdx.y) * kOperands;
  const int first_target = static_cast<int>(blockIdx.z) * kTargets;
  const Share share = share_of<kColumns>(plan);
  const A* centre = static_cast<const A*>(args.centre);

  A plane_centre[kOperands];
#pragma unroll
  for (int j = 0; j < kOperands; ++j) {
    const int k = first_operand + j;
    plane_centre[j] =
        !kColumns && centre && k < args.K ? centre[k * plan.period + share.side] : A{0};
  }
  A acc[kTargets][(kOperands + 1) * kWidth];
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
#pragma unroll
    for (int i = 0; i < (kOperands + 1) * kWidth; ++i) acc[t][i] = 0;
  }
  for_each_of_share<V, kColumns>(plan, share, 1, [&](const Place& at) {
    Operand<T, V> g[kTargets];
#pragma unroll
    for (int t = 0; t < kTargets; ++t) {
      if (first_target + t >= args.G) continue;
      g[t] = load<T, V>(static_cast<const T*>(args.gs[first_target + t]) + at.at);
#pragma unroll
      for (int i = 0; i < V; ++i) acc[t][i % kWidth] += g[t].acc(i);
    }
#pragma unroll
    for (int first = 0; first < kOperands; first += kBatch) {
      Operand<T, V> x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = first_operand + first + b;
        if (k < args.K && args.xs[k]) x[b] = load<T, V>(static_cast<const T*>(args.xs[k]) + at.at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int j = first + b, k = first_operand + j;
        if (k >= args.K || !args.xs[k]) continue;
        A m[V];
#pragma unroll
        for (int i = 0; i < V; ++i) m[i] = plane_centre[j];
        if (kColumns && centre) load_entries<V, kColumns>(m, centre + k * plan.period + at.entry);
#pragma unroll
        for (int t = 0; t < kTargets; ++t) {
          if (first_target + t >= args.G) continue;
#pragma unroll
          for (int i = 0; i < V; ++i)
            acc[t][(1 + j) * kWidth + i % kWidth] += g[t].acc(i) * (x[b].acc(i) - m[i]);
        }
      }
    }
  });

  A* partial = static_cast<A*>(args.partial);
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
    if (first_target + t >= args.G) continue;  // the whole block
    sum_over_rows(acc[t], share.row, share.rows, kColumns ? plan.lanes : 1);
    if (share.row != 0 || !share.works) continue;
    const int64_t above = int64_t{first_target + t} * (args.K + 1);
#pragma unroll
    for (int j = 0; j <= kOperands; ++j) {
      if (j == 0 ? blockIdx.y != 0 : first_operand + j > args.K) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int64_t entry = kColumns ? share.lane * V + i : share.side;
        const int64_t sum = above + (j == 0 ? 0 : first_operand + j);
        partial[(sum * plan.period + entry) * plan.parts + share.part] = acc[t][j * kWidth + i];
      }
    }
  }
}

}  // namespace

cudaError_t launch_target_dots(const Plan& plan, const TargetDots& args, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    constexpr int kWide = decltype(vector)::value;
    using T = typename decltype(type)::type;
    const auto kernel = target_dots_kernel<T, kWide, kColumns>;
    const int64_t blocks = plan.parts * (kColumns ? plan.chunks : plan.C);
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(ceil_div(args.K, kOperandsOf<kColumns>)),
                    static_cast<unsigned>(ceil_div(args.G, kTargetsOf<T, kWide, kColumns>)));
    FASTNAS_LAUNCH(kernel, grid, plan.threads(), stream, plan, args);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
