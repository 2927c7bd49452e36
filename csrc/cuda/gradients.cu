// SPDX-License-Identifier: Apache-2.0
// dx_k = a_k g + b_k x_k + c_k per channel, for every operand that wants a gradient, in one pass over g.
// Moves (1 + given x_k + wanted dx_k) * sizeof(T) bytes an element. Operands dense, planes or columns (plan.h); g dense
// or a slot.
#include "mix.h"
#include "walk.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kUnroll = 2;  // vectors of an operand that a thread has in flight
// Operands, likewise: eight 16-bit elements a vector unfold into too many registers for more.
template <int V>
constexpr int kBatchOf = V == 8 ? 2 : 4;

template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, V == 8 ? 2 : 3)
    gradients_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Gradients args,
                     int64_t tiles) {
  using A = acc_type<T>;
  constexpr int kBatch = kBatchOf<V>;
  const A* a = static_cast<const A*>(args.a);
  const A* b = static_cast<const A*>(args.b);
  const A* c = static_cast<const A*>(args.c);
  for_each_tile<V, kColumns, kUnroll>(
      plan, tiles, args.step, [&](const Place(&at)[kUnroll], const bool(&valid)[kUnroll]) {
        A g[kUnroll][V];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const Operand<T, V> loaded = load_strided<T, V>(
              static_cast<const T*>(args.g) + at[u].slot, kColumns ? args.step : 1);
#pragma unroll
          for (int v = 0; v < V; ++v) g[u][v] = loaded.acc(v);
        }
        for (int first = 0; first < args.K; first += kBatch) {
          // All loads of a batch before its first store: the compiler may not move a load over a store.
          Operand<T, V> loaded[kBatch][kUnroll];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (first + j >= args.K) break;
            const T* x = static_cast<const T*>(args.xs[first + j]);
            if (!x || !args.dxs[first + j]) continue;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) loaded[j][u] = load<T, V>(x + at[u].at);
          }
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (first + j >= args.K) break;
            T* dx = static_cast<T*>(args.dxs[first + j]);
            if (!dx) continue;
            const bool given = args.xs[first + j] != nullptr;
            A ak[V], bk[V], ck[V], out[V];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              const int64_t entry = (first + j) * plan.period + at[u].entry;
              const bool next_entries = u == 0 || !kColumns;  // in columns all u share them
              if (next_entries) load_entries<V, kColumns>(ak, a + entry);
              if (given) {
                if (next_entries) load_entries<V, kColumns>(bk, b + entry);
                if (next_entries) load_entries<V, kColumns>(ck, c + entry);
#pragma unroll
                for (int v = 0; v < V; ++v)
                  out[v] = ak[v] * g[u][v] + (bk[v] * loaded[j][u].acc(v) + ck[v]);
              } else {
#pragma unroll
                for (int v = 0; v < V; ++v) out[v] = ak[v] * g[u][v];
              }
              if (valid[u]) store<T, V>(dx + at[u].at, out);
            }
          }
        }
      });
}

// grid: x tiles in turns, y operands.
template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, V == 8 ? 2 : 3)
    apart_gradients_kernel(const __grid_constant__ Plan plan,
                           const __grid_constant__ ApartGradients args, int64_t tiles) {
  using A = acc_type<T>;
  const int k = static_cast<int>(blockIdx.y);
  const T* g = static_cast<const T*>(args.gs[k]);
  const T* x = static_cast<const T*>(args.xs[k]);
  T* dx = static_cast<T*>(args.dxs[k]);
  if (!dx) return;
  for_each_tile<V, kColumns, kUnroll>(
      plan, tiles, 1, [&](const Place(&at)[kUnroll], const bool(&valid)[kUnroll]) {
        Operand<T, V> gradient[kUnroll], loaded[kUnroll] = {};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          gradient[u] = load<T, V>(g + at[u].at);
          if (x) loaded[u] = load<T, V>(x + at[u].at);
        }
        A a[V], b[V], c[V], out[V];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t entry = k * plan.period + at[u].entry;
          if (u == 0 || !kColumns) {  // in columns all u share them
            load_entries<V, kColumns>(a, static_cast<const A*>(args.a) + entry);
            load_entries<V, kColumns>(b, static_cast<const A*>(args.b) + entry);
            load_entries<V, kColumns>(c, static_cast<const A*>(args.c) + entry);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) {
            out[v] = a[v] * gradient[u].acc(v);
            if (x) out[v] += b[v] * loaded[u].acc(v) + c[v];
          }
          if (valid[u]) store<T, V>(dx + at[u].at, out);
        }
      });
}

}  // namespace

cudaError_t launch_gradients(const Plan& plan, const Gradients& args, cudaStream_t stream) {
  bool wanted = false;
  for (int k = 0; k < args.K; ++k) wanted = wanted || args.dxs[k];
  if (plan.elements == 0 || !wanted) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const auto kernel =
        gradients_kernel<typename decltype(type)::type, decltype(vector)::value, kColumns>;
    const int64_t tiles = tiles_of<kColumns, kUnroll>(plan);
    FASTNAS_LAUNCH(kernel, grid_for(tiles), plan.threads(), stream, plan, args, tiles);
    return cudaGetLastError();
  });
}

cudaError_t launch_apart_gradients(const Plan& plan, const ApartGradients& args,
                                   cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_plan(plan, [&](auto type, auto vector, auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const auto kernel =
        apart_gradients_kernel<typename decltype(type)::type, decltype(vector)::value, kColumns>;
    const int64_t tiles = tiles_of<kColumns, kUnroll>(plan);
    const int64_t across = ceil_div(grid_for(tiles * args.K), args.K);
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(args.K));
    FASTNAS_LAUNCH(kernel, grid, plan.threads(), stream, plan, args, tiles);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
