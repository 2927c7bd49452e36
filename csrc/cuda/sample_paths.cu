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

template <typename T>
__global__ void __launch_bounds__(kThreads) paths_kernel(const __grid_constant__ SamplePaths args) {
  const int64_t e = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (e >= args.E) return;  // the whole warp
  int64_t count = args.counts ? args.counts[e] : args.K;
  count = count < 0 ? 0 : count > args.K ? args.K : count;
  double logit[kPerLane], top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    logit[i] = k < count
                   ? static_cast<double>(to_acc(static_cast<const T*>(args.logits)[e * args.K + k]))
                   : -INFINITY;
    if (logit[i] > top) top = logit[i];
  }
  top = warp_max(top);
  int64_t mass[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) mass[i] = path_mass(logit[i], top);
  // Every lane makes the same draw, so that the masses can stay where they are.
  const Path path = choose_path([&](int64_t k) { return entry(mass, k); }, count, args.seed,
                                args.step, static_cast<uint32_t>(e), args.two);

  double kept_top = -INFINITY, sum = 0;
  bool kept[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t k = i * 32 + lane;
    kept[i] = path.inactive < 0 ? k < count && logit[i] == logit[i]  // NaN marks a dead candidate
                                : k == path.active || k == path.inactive;
    if (kept[i] && logit[i] > kept_top) kept_top = logit[i];
  }
  kept_top = warp_max(kept_top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (kept[i]) sum += exp(below_top(logit[i], kept_top));
  sum = warp_sum(sum);
  const double first =
      exp(below_top(entry(logit, path.active < 0 ? 0 : path.active), kept_top)) / sum;
  const double second =
      exp(below_top(entry(logit, path.inactive < 0 ? 0 : path.inactive), kept_top)) / sum;
  if (lane != 0) return;
  args.active[e] = path.active;
  args.inactive[e] = path.inactive;
  T* probs = static_cast<T*>(args.probs) + 2 * e;
  probs[0] = from_acc<T>(static_cast<acc_type<T>>(path.active < 0 ? 0.0 : first));
  probs[1] = from_acc<T>(static_cast<acc_type<T>>(path.inactive < 0 ? 0.0 : second));
}

}  // namespace

cudaError_t launch_sample_paths(Dtype dtype, const SamplePaths& args, cudaStream_t stream) {
  if (args.E == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    const auto kernel = paths_kernel<typename decltype(type)::type>;
    FASTNAS_LAUNCH(kernel, static_cast<unsigned>(ceil_div(args.E * 32, kThreads)), kThreads, stream,
                   args);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
