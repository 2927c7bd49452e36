// SPDX-License-Identifier: Apache-2.0
// Weights of the connections of a cell that are exactly zero below a learned threshold, and their gradients: a block a
// node, a warp an edge of it at a time, a lane two candidates. Moves E x K numbers in and out; probabilities are made
// again in every pass, which is cheaper than keeping those of any number of edges.
#include "../sparse.h"
#include "reduce.cuh"
#include "sparse_connections.h"

namespace fastnas::cuda {

namespace {

constexpr int kPerLane = kMaxOperands / 32;
constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ inline double value_at(const void* p, int64_t i) {
  return static_cast<double>(to_acc(static_cast<const T*>(p)[i]));
}

template <typename T>
__device__ inline void put(void* p, int64_t i, double value) {
  static_cast<T*>(p)[i] = from_acc<T>(static_cast<acc_type<T>>(value));
}

// Where this thread is: its lane's candidates of the edges begin, begin + kWarps, ... below end.
struct Place {
  int64_t begin, end;
  int warp, lane;
};

__device__ inline Place place_of(const Connections& cell) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = cell.first[blockIdx.x];
  return {first + warp, cell.first[blockIdx.x + 1], warp, static_cast<int>(threadIdx.x) % 32};
}

// Sum over the warps of a block, in their order; every thread gets it. v is the same in the lanes of a warp.
__device__ inline double sum_of_warps(double v, const Place& at) {
  FASTNAS_SHARED(double, sums, kWarps);
  if (at.lane == 0) sums[at.warp] = v;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  __syncthreads();
  return sum;
}

// Softmax over the live candidates of an edge, 0 for those of -inf and NaN; entry i is candidate i * 32 + lane.
template <typename T>
__device__ inline void edge_softmax(const Connections& cell, int64_t e, int lane,
                                    double (&p)[kPerLane]) {
  double top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    p[i] = k < cell.K ? value_at<T>(cell.alpha, e * cell.K + k) : -INFINITY;
    if (p[i] > top) top = p[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, top, offset);
    if (other > top) top = other;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    p[i] = p[i] > -INFINITY ? exp(below_top(p[i], top) / cell.tau) : 0.0;
    sum += p[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) p[i] = sum > 0 ? p[i] / sum : 0.0;
}

// The largest probability of a node, and which entry of alpha is the first to have it.
struct Best {
  double p = 0;
  int64_t entry = 0;

  __device__ void take(double other, int64_t at) {
    if (other < p || (other == p && at >= entry)) return;
    p = other;
    entry = at;
  }
};

template <typename T>
__device__ inline Best best_of(const Connections& cell, const Place& at) {
  FASTNAS_SHARED(double, largest, kWarps);
  FASTNAS_SHARED(int64_t, entries, kWarps);
  Best best;
  best.entry = at.end * cell.K;  // behind any other
  for (int64_t e = at.begin; e < at.end; e += kWarps) {
    double p[kPerLane];
    edge_softmax<T>(cell, e, at.lane, p);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best.take(p[i], e * cell.K + i * 32 + at.lane);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const double p = __shfl_xor_sync(kFullWarp, best.p, offset);
    best.take(p, __shfl_xor_sync(kFullWarp, best.entry, offset));
  }
  if (at.lane == 0) {
    largest[at.warp] = best.p;
    entries[at.warp] = best.entry;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best.take(largest[w], entries[w]);
  __syncthreads();
  return best;
}

// An edge as this lane sees it: probabilities, ratios to the largest of the node, what is left of them.
struct Edge {
  double p[kPerLane], ratio[kPerLane], q[kPerLane], sum;
};

template <typename T>
__device__ inline Edge load_edge(const Connections& cell, int64_t e, int lane, double top,
                                 double gap) {
  Edge edge;
  edge_softmax<T>(cell, e, lane, edge.p);
  edge.sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    edge.ratio[i] = top > 0 ? edge.p[i] / top : 0.0;
    edge.q[i] = i * 32 + lane < cell.K ? left_over(edge.ratio[i], gap) : 0.0;
    edge.sum += edge.q[i];
  }
  edge.sum = warp_sum(edge.sum);
  return edge;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sparse_kernel(const __grid_constant__ SparseConnections args) {
  const Connections& cell = args.cell;
  const Place at = place_of(cell);
  const double top = best_of<T>(cell, at).p, gap = below_one(value_at<T>(cell.beta, blockIdx.x));
  double all = 0;
  if (cell.node_norm) {
    for (int64_t e = at.begin; e < at.end; e += kWarps)
      all += load_edge<T>(cell, e, at.lane, top, gap).sum;
    all = sum_of_warps(all, at);
  }
  for (int64_t e = at.begin; e < at.end; e += kWarps) {
    const Edge edge = load_edge<T>(cell, e, at.lane, top, gap);
    const double sum = cell.node_norm ? all : edge.sum;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t k = i * 32 + at.lane;
      if (k < cell.K) put<T>(args.weights, e * cell.K + k, sum == 0.0 ? 0.0 : edge.q[i] / sum);
    }
  }
}

// <g, q / sum> of an edge. Divided before it is multiplied: what is alone then has exactly g, and no gradient.
template <typename T>
__device__ inline double edge_dot(const ConnectionGradient& args, const Edge& edge, int64_t e,
                                  int lane, double sum) {
  double dot = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (edge.q[i] != 0.0)
      dot += edge.q[i] / sum * value_at<T>(args.grad, e * args.cell.K + i * 32 + lane);
  return warp_sum(dot);
}

// dL/dq: 1[q > 0] (g - <g, q / s>) / s, where s and the product are the edge's or the node's.
template <typename T>
__device__ inline void left_over_gradient(const ConnectionGradient& args, const Edge& edge,
                                          int64_t e, int lane, double sum, double dot,
                                          double (&dq)[kPerLane]) {
  if (!args.cell.node_norm) {
    sum = edge.sum;
    dot = edge_dot<T>(args, edge, e, lane, sum);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    dq[i] = 0;
    if (edge.q[i] != 0.0)
      dq[i] = (value_at<T>(args.grad, e * args.cell.K + i * 32 + lane) - dot) / sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    connection_gradient_kernel(const __grid_constant__ ConnectionGradient args) {
  const Connections& cell = args.cell;
  const Place at = place_of(cell);
  const Best best = best_of<T>(cell, at);
  const double gap = below_one(value_at<T>(cell.beta, blockIdx.x));
  double sum = 0, dot = 0, dq[kPerLane];
  if (cell.node_norm) {
    for (int64_t e = at.begin; e < at.end; e += kWarps)
      sum += load_edge<T>(cell, e, at.lane, best.p, gap).sum;
    sum = sum_of_warps(sum, at);
    for (int64_t e = at.begin; e < at.end; e += kWarps)
      dot += edge_dot<T>(args, load_edge<T>(cell, e, at.lane, best.p, gap), e, at.lane, sum);
    dot = sum_of_warps(dot, at);
  }
  double total = 0, through_max = 0;
  for (int64_t e = at.begin; e < at.end; e += kWarps) {
    const Edge edge = load_edge<T>(cell, e, at.lane, best.p, gap);
    left_over_gradient<T>(args, edge, e, at.lane, sum, dot, dq);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      total += dq[i];
      through_max += dq[i] * edge.ratio[i];
    }
  }
  total = sum_of_warps(warp_sum(total), at);
  through_max = sum_of_warps(warp_sum(through_max), at);
  if (threadIdx.x == 0) put<T>(args.dbeta, blockIdx.x, below_one_slope(gap) * total);
  for (int64_t e = at.begin; e < at.end; e += kWarps) {
    const Edge edge = load_edge<T>(cell, e, at.lane, best.p, gap);
    left_over_gradient<T>(args, edge, e, at.lane, sum, dot, dq);
    double mean = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (e * cell.K + i * 32 + at.lane == best.entry && !args.detach_max) dq[i] -= through_max;
      dq[i] = best.p > 0 ? dq[i] / best.p : 0.0;  // now dL/dp
      mean += edge.p[i] * dq[i];
    }
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t k = i * 32 + at.lane, entry = e * cell.K + k;
      if (k >= cell.K) continue;
      // Nothing small changes the weights of an edge with logits of +inf.
      const bool finite = value_at<T>(cell.alpha, entry) < INFINITY;
      put<T>(args.dalpha, entry, finite ? edge.p[i] / cell.tau * (dq[i] - mean) : 0.0);
    }
  }
}

template <typename Kernel, typename Args>
cudaError_t launch_nodes(Kernel kernel, const Args& args, cudaStream_t stream) {
  if (!fits_grid(args.cell.nodes)) return cudaErrorInvalidConfiguration;
  FASTNAS_LAUNCH(kernel, static_cast<unsigned>(args.cell.nodes), kThreads, stream, args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sparse_connections(Dtype dtype, const SparseConnections& args,
                                      cudaStream_t stream) {
  if (args.cell.nodes == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return launch_nodes(sparse_kernel<typename decltype(type)::type>, args, stream);
  });
}

cudaError_t launch_connection_gradient(Dtype dtype, const ConnectionGradient& args,
                                       cudaStream_t stream) {
  if (args.cell.nodes == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return launch_nodes(connection_gradient_kernel<typename decltype(type)::type>, args, stream);
  });
}

}  // namespace fastnas::cuda
