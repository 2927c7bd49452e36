// SPDX-License-Identifier: Apache-2.0
// y_j = bias_j + sum_i coef_ji x_i for all targets j: the sums of the forward, and the gradients of the operands, for
// which targets and operands change places. Moves (I + J) * sizeof(T) bytes an element: what is read again for the next
// kSumSlice targets comes from the cache. Operands dense, planes or columns (plan.h).
#include "multi_target_sum.h"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kBatch = 4;  // operands whose vectors a thread loads before it uses the first
template <int V>
constexpr int kUnrollOf = V == 8 ? 1 : 2;  // vectors of an operand that a thread has in flight

// The sums of targets first .. first + kSumSlice - 1 at the places of a tile.
template <typename T, int V, bool kColumns, int U>
struct Slice {
  using A = acc_type<T>;
  const Plan& plan;
  const Sums& args;
  int first;
  A sum[kSumSlice][U][V];

  __device__ bool wanted(int j) const { return first + j < args.J && args.ys[first + j]; }

  __device__ bool uses(int j, int i) const {
    return wanted(j) && static_cast<const A*>(args.weights)[(first + j) * args.I + i] != 0;
  }

  __device__ void begin(const Place (&at)[U]) {
#pragma unroll
    for (int j = 0; j < kSumSlice; ++j) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[j][u][v] = 0;
        if (args.bias && wanted(j))
          load_entries<V, kColumns>(sum[j][u], static_cast<const A*>(args.bias) +
                                                   (first + j) * plan.period + at[u].entry);
      }
    }
  }

  // Adds `row` of a table times x to target j.
  __device__ void add(int j, const A* row, const Operand<T, V> (&x)[U], const Place (&at)[U]) {
    A a[V];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u == 0 || !kColumns)
        load_entries<V, kColumns>(a, row + at[u].entry);  // columns: all u share it
#pragma unroll
      for (int v = 0; v < V; ++v) sum[j][u][v] += a[v] * x[u].acc(v);
    }
  }

  __device__ void add_operands(int from, const Place (&at)[U]) {
    Operand<T, V> x[kBatch][U];
    bool used[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      used[b] = false;
      if (from + b >= args.I) continue;
#pragma unroll
      for (int j = 0; j < kSumSlice; ++j) used[b] = used[b] || uses(j, from + b);
      if (!used[b]) continue;
#pragma unroll
      for (int u = 0; u < U; ++u)
        x[b][u] = load<T, V>(static_cast<const T*>(args.xs[from + b]) + at[u].at);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!used[b]) continue;
#pragma unroll
      for (int j = 0; j < kSumSlice; ++j)
        if (uses(j, from + b))
          add(j,
              static_cast<const A*>(args.coef) +
                  (int64_t{first + j} * args.I + from + b) * plan.period,
              x[b], at);
    }
  }

  __device__ void end(const Place (&at)[U], const bool (&valid)[U]) {
#pragma unroll
    for (int j = 0; j < kSumSlice; ++j) {
      if (!wanted(j)) continue;
      if (const T* z = static_cast<const T*>(args.zs[first + j])) {
        Operand<T, V> x[U];
#pragma unroll
        for (int u = 0; u < U; ++u) x[u] = load<T, V>(z + at[u].at);
        add(j, static_cast<const A*>(args.own) + (first + j) * plan.period, x, at);
      }
      T* y = static_cast<T*>(args.ys[first + j]);
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (valid[u]) store<T, V>(y + at[u].at, sum[j][u]);
    }
  }
};

template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Sums args,
                int64_t tiles) {
  constexpr int U = kUnrollOf<V>;
  for_each_tile<V, kColumns, U>(plan, tiles, 1, [&](const Place(&at)[U], const bool(&valid)[U]) {
    for (int first = 0; first < args.J; first += kSumSlice) {
      Slice<T, V, kColumns, U> slice{plan, args, first, {}};
      slice.begin(at);
      for (int i = 0; i < args.I; i += kBatch) slice.add_operands(i, at);
      slice.end(at, valid);
    }
  });
}

}  // namespace

cudaError_t launch_sums(const Plan& plan, const Sums& args, cudaStream_t stream) {
  bool wanted = false;
  for (int j = 0; j < args.J; ++j) wanted = wanted || args.ys[j];
  if (plan.elements == 0 || !wanted) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    constexpr int kWide = decltype(vector)::value;
    const auto kernel = sums_kernel<typename decltype(type)::type, kWide, kColumns>;
    const int64_t tiles = tiles_of<kColumns, kUnrollOf<kWide>>(plan);
    FASTNAS_LAUNCH(kernel, grid_for(tiles), plan.threads(), stream, plan, args, tiles);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
