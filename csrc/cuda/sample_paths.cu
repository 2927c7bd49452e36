// SPDX-License-Identifier: Apache-2.0
// The active candidate of every edge, or a pair of them, and their probabilities: a warp an edge, a lane two candidates.
// The draw itself is philox.h's, bit for bit that of the CPU. Moves K logits in and four numbers out an edge.
#include "reduce.cuh"
#include "sample_paths.h"

namespace fastnas::cuda {

namespace {

constexpr int kPerLane = kMaxOperands / 32;

__device__ inline double warp_max(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, v, offset);
    if (other > v) v = other;
  }
  return v;
}

// Entry k of an array spread over a warp; k is the same in all lanes.
template <typename V>
__device__ inline V entry(const V (&spread)[kPerLane], int64_t k) {
  V out{};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const V here = __shfl_sync(kFullWarp, spread[i], static_cast<int>(k % 32));
    if (k / 32 == i) out = here;
  }
  return out;
}

// The logits of an edge over the lanes of its warp: candidate i * 32 + lane; -inf beyond the last.
struct Row {
  double logit[kPerLane];
  int64_t count;
};

template <typename T>
__device__ inline Row load_row(const PathEdges& edges, int64_t e, int lane) {
  Row row;
  const int64_t count = edges.counts ? edges.counts[e] : edges.K;
  row.count = count < 0 ? 0 : count > edges.K ? edges.K : count;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    row.logit[i] =
        k < row.count
            ? static_cast<double>(to_acc(static_cast<const T*>(edges.logits)[e * edges.K + k]))
            : -INFINITY;
  }
  return row;
}

// p[i]: softmax of an edge's live candidates, or of its pair where one is inactive; 0 for the others.
__device__ inline void path_softmax(const Row& row, const Path& path, int lane,
                                    double (&p)[kPerLane]) {
  double top = -INFINITY, sum = 0;
  bool kept[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    const double logit = row.logit[i];
    kept[i] = path.inactive < 0 ? k < row.count && logit == logit  // NaN marks a dead candidate
                                : k == path.active || k == path.inactive;
    if (kept[i] && logit > top) top = logit;
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    p[i] = kept[i] ? exp(below_top(row.logit[i], top)) : 0.0;
    sum += p[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) p[i] /= sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) paths_kernel(const __grid_constant__ SamplePaths args) {
  const int64_t e = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (e >= args.edges.E) return;  // the whole warp
  const Row row = load_row<T>(args.edges, e, lane);
  double top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (row.logit[i] > top) top = row.logit[i];
  top = warp_max(top);
  int64_t mass[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) mass[i] = path_mass(row.logit[i], top);
  // Every lane makes the same draw, so that the masses can stay where they are.
  const Path path = choose_path([&](int64_t k) { return entry(mass, k); }, row.count, args.seed,
                                args.step, static_cast<uint32_t>(e), args.two);
  double p[kPerLane];
  path_softmax(row, path, lane, p);
  const double first = entry(p, path.active < 0 ? 0 : path.active);
  const double second = entry(p, path.inactive < 0 ? 0 : path.inactive);
  if (lane != 0) return;
  args.active[e] = path.active;
  args.inactive[e] = path.inactive;
  T* probs = static_cast<T*>(args.probs) + 2 * e;
  probs[0] = from_acc<T>(static_cast<acc_type<T>>(path.active < 0 ? 0.0 : first));
  probs[1] = from_acc<T>(static_cast<acc_type<T>>(path.inactive < 0 ? 0.0 : second));
}

// dlogit_k = p_k (d_k - sum_j p_j d_j), where d is the gradient of the active and of the inactive one's probability.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    path_gradient_kernel(const __grid_constant__ PathGradient args) {
  const int64_t e = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (e >= args.edges.E) return;  // the whole warp
  const Row row = load_row<T>(args.edges, e, lane);
  const Path path{args.active[e], args.inactive[e]};
  double p[kPerLane];
  path_softmax(row, path, lane, p);
  const T* grad = static_cast<const T*>(args.grad) + 2 * e;
  double d[kPerLane], mean = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    d[i] = k == path.active     ? static_cast<double>(to_acc(grad[0]))
           : k == path.inactive ? static_cast<double>(to_acc(grad[1]))
                                : 0.0;
    mean += p[i] * d[i];
  }
  mean = warp_sum(mean);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    const double value = path.active < 0 || k >= row.count ? 0.0 : p[i] * (d[i] - mean);
    if (k < args.edges.K)
      static_cast<T*>(args.dlogits)[e * args.edges.K + k] =
          from_acc<T>(static_cast<acc_type<T>>(value));
  }
}

template <typename Kernel, typename Args>
cudaError_t launch_edges(Kernel kernel, const Args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.edges.E * 32, kThreads);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  FASTNAS_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, stream, args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sample_paths(Dtype dtype, const SamplePaths& args, cudaStream_t stream) {
  if (args.edges.E == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return launch_edges(paths_kernel<typename decltype(type)::type>, args, stream);
  });
}

cudaError_t launch_path_gradient(Dtype dtype, const PathGradient& args, cudaStream_t stream) {
  if (args.edges.E == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    return launch_edges(path_gradient_kernel<typename decltype(type)::type>, args, stream);
  });
}

}  // namespace fastnas::cuda
