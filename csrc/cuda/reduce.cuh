// SPDX-License-Identifier: Apache-2.0
// Reductions in a fixed order: trees over the threads of a block, no atomics. Two runs give the same bits.
#pragma once
#include "vec.cuh"

namespace fastnas::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Words of a block's tree that are in shared memory at once (kThreads / 2 of each).
template <int W>
constexpr int kTreeWords = W < 24        ? W
                           : W % 18 == 0 ? 18
                                         : 20;

// Adds v[] of the threads row * lanes + lane over the rows, for each lane; row 0 gets the sums. A block of at most
// kThreads threads, a multiple of 32; threads with row >= rows take part with nothing to add.
template <int W, typename A>
__device__ inline void sum_over_rows(A (&v)[W], int row, int rows, int lanes) {
  constexpr int kGroup = kTreeWords<W>;
  constexpr int kHalf = kThreads / 2;
  static_assert(W % kGroup == 0, "whole groups");
  FASTNAS_SHARED(A, shared, kGroup * kHalf);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int group = 0; group < W; group += kGroup) {
    int left = rows, stride = 1;
    while (2 * stride < left) stride *= 2;
    for (; left > 1 && 2 * stride * lanes > 32; left = stride, stride /= 2) {
      if (row >= stride && row < left) {
#pragma unroll
        for (int w = 0; w < kGroup; ++w) shared[w * kHalf + thread - stride * lanes] = v[group + w];
      }
      __syncthreads();
      if (row < stride && row + stride < left) {
#pragma unroll
        for (int w = 0; w < kGroup; ++w) v[group + w] += shared[w * kHalf + thread];
      }
      __syncthreads();
    }
    if (thread >= 32) continue;
    // What is left sits in one warp.
    for (; left > 1; left = stride, stride /= 2) {
#pragma unroll
      for (int w = 0; w < kGroup; ++w) {
        const A other = __shfl_down_sync(kFullWarp, v[group + w], stride * lanes);
        if (row + stride < left) v[group + w] += other;
      }
    }
  }
}

// Number, mean and summed squared deviations of some values.
template <typename A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  // Chan, Golub and LeVeque 1983: no difference of large sums.
  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const A total = count + other.count, delta = other.mean - mean, share = other.count / total;
    m2 += other.m2 + delta * delta * count * share;
    mean += delta * share;
    count = total;
  }
};

// The same tree for moments: V of them a thread, one count.
template <int V, typename A>
__device__ inline void merge_over_rows(Moments<A> (&v)[V], int row, int rows, int lanes) {
  constexpr int kHalf = kThreads / 2;
  FASTNAS_SHARED(A, counts, V * kHalf);
  FASTNAS_SHARED(A, means, V * kHalf);
  FASTNAS_SHARED(A, m2s, V * kHalf);
  const int thread = static_cast<int>(threadIdx.x);
  int left = rows, stride = 1;
  while (2 * stride < left) stride *= 2;
  for (; left > 1 && 2 * stride * lanes > 32; left = stride, stride /= 2) {
    if (row >= stride && row < left) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int to = i * kHalf + thread - stride * lanes;
        counts[to] = v[i].count;
        means[to] = v[i].mean;
        m2s[to] = v[i].m2;
      }
    }
    __syncthreads();
    if (row < stride && row + stride < left) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int from = i * kHalf + thread;
        v[i].merge({counts[from], means[from], m2s[from]});
      }
    }
    __syncthreads();
  }
  if (thread >= 32) return;
  for (; left > 1; left = stride, stride /= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Moments<A> other;
      other.count = __shfl_down_sync(kFullWarp, v[i].count, stride * lanes);
      other.mean = __shfl_down_sync(kFullWarp, v[i].mean, stride * lanes);
      other.m2 = __shfl_down_sync(kFullWarp, v[i].m2, stride * lanes);
      if (row + stride < left) v[i].merge(other);
    }
  }
}

// Sums over the 32 lanes of a warp; every lane gets the result.
__device__ inline double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

__device__ inline Moments<double> warp_merge(Moments<double> v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    Moments<double> other;
    other.count = __shfl_down_sync(kFullWarp, v.count, offset);
    other.mean = __shfl_down_sync(kFullWarp, v.mean, offset);
    other.m2 = __shfl_down_sync(kFullWarp, v.m2, offset);
    v.merge(other);  // lanes near the end merge what does not matter; lane 0 is right
  }
  return v;
}

}  // namespace fastnas::cuda
