// SPDX-License-Identifier: Apache-2.0
// Gradients of the weights of depthwise convolutions: 2 sizeof(T) bytes for each row of taps. Parts of them in tiles
// (depthwise_weights.cu) where one fits, else as below; they are folded here.
#include "depthwise_taps.cuh"
#include "depthwise_tile.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

// A block sums one row of taps of one convolution over one part of the pixels: of one channel in planes, of `lanes`
// channels side by side in columns.
struct Part {
  int64_t channel, first, last;  // pixels, counted over the batch
  int row, rows, lanes;
  bool valid;
};

template <bool kColumns>
__device__ inline Part part_of(const Convolutions& c, const WeightPlan& plan) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, beside = block / plan.parts, part = block - beside * plan.parts;
  const int64_t pixels = c.N * c.oh * c.ow, first = part * plan.share;
  const int64_t last = first + plan.share < pixels ? first + plan.share : pixels;
  if constexpr (kColumns) {
    const int row = thread / plan.lanes;
    const int64_t channel = beside * plan.lanes + thread - row * plan.lanes;
    return {channel, first, last, row, plan.rows, plan.lanes, row < plan.rows && channel < c.C};
  }
  return {beside, first, last, thread, kThreads, 1, true};
}

template <typename T, int K, bool kColumns>
__device__ inline void sum_row_of_taps(const Convolutions& c, const WeightPlan& plan,
                                       const Divider& by_ow, const Divider& by_oh, int i, int line,
                                       const T* g, const T* x, acc_type<T>* partial) {
  using A = acc_type<T>;
  const Part p = part_of<kColumns>(c, plan);
  const int d = c.dilation[i], pad = d * (K / 2);
  const int64_t step = kColumns ? c.C : 1;
  A sum[K] = {};
  if (p.valid) {
    const Source<1, kColumns, A> rule(c, p.channel);
    for (int64_t pixel = p.first + p.row; pixel < p.last; pixel += p.rows) {
      const int64_t row = by_ow.quotient(pixel), n = by_oh.quotient(row);
      const int y = static_cast<int>(row - n * c.oh) * c.stride + line * d - pad;
      const int left = static_cast<int>(pixel - row * c.ow) * c.stride - pad;
      if (y < 0 || y >= c.H) continue;
      const int64_t before = kColumns ? n : n * c.C + p.channel;
      const T* own = g + (kColumns ? p.channel : 0) + before * c.oh * c.ow * step;
      const T* source = x + (kColumns ? p.channel : 0) + (before * c.H + y) * c.W * step;
      const A gradient = to_acc(own[(pixel - n * c.oh * c.ow) * step]);
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int at = left + j * d;
        if (at >= 0 && at < c.W) sum[j] += gradient * rule.of(to_acc(source[at * step]), 0);
      }
    }
  }
  sum_over_rows(sum, p.row, p.rows, p.lanes);
  if (p.row != 0 || !p.valid) return;
  const int64_t first = c.first[i] * c.C + p.channel * (K * K) + line * K;
#pragma unroll
  for (int j = 0; j < K; ++j) partial[(first + j) * plan.parts + blockIdx.x % plan.parts] = sum[j];
}

template <typename T, bool kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradients_kernel(const __grid_constant__ Convolutions c,
                            const __grid_constant__ WeightPlan plan, Divider by_ow, Divider by_oh,
                            const __grid_constant__ OutputGradients from, const T* x,
                            const __grid_constant__ WeightGradients to) {
  int i = 0, line = static_cast<int>(blockIdx.y);
  while (line >= c.side[i]) line -= c.side[i++];
  const T* g = static_cast<const T*>(from.gs[i]);
  if (!g || !to.need[i]) return;
  with_side(c.side[i], [&](auto side) {
    sum_row_of_taps<T, decltype(side)::value, kColumns>(c, plan, by_ow, by_oh, i, line, g, x,
                                                        static_cast<acc_type<T>*>(to.partial));
  });
}

// A warp adds up the parts of one tap of one channel.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    fold_weights_kernel(const __grid_constant__ Convolutions c, int64_t parts, const A* partial,
                        const __grid_constant__ FoldedGradients to) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t at = int64_t{blockIdx.x} * (kThreads / 32) + thread / 32;
  if (at >= c.taps() * c.C) return;
  int i = 0;
  while (at >= c.first[i + 1] * c.C) ++i;
  if (!to.dws[i]) return;
  double sum = 0;
  for (int64_t part = lane; part < parts; part += 32)
    sum += static_cast<double>(partial[at * parts + part]);
  sum = warp_sum(sum);
  if (lane == 0) write(to.dws[i], c.weight_dtype[i], at - c.first[i] * c.C, sum);
}

}  // namespace

WeightPlan plan_weights(const Convolutions& c) {
  WeightPlan p{};
  if (const Tile tile = plan_tile(c, c.oh, c.ow, c.stride); tile.fits) {
    if (c.outputs() == 0) return p;
    const int64_t filling = ceil_div(kWeightBlocks, tile.chunks * c.count);
    const int64_t shallow = ceil_div(tile.tiles() * kStrip, kReduceDepth);
    p.share = ceil_div(tile.tiles(), filling > shallow ? filling : shallow);
    p.parts = ceil_div(tile.tiles(), p.share);
    return p;
  }
  const int64_t channels = c.C > 0 ? c.C : 1, pixels = c.N * c.oh * c.ow;
  p.chunks = static_cast<int>(ceil_div(channels, kThreads));
  p.lanes = static_cast<int>(ceil_div(channels, p.chunks));
  p.rows = kThreads / p.lanes;
  int64_t lines = 0;
  for (int i = 0; i < c.count; ++i) lines += c.side[i];
  const int64_t pass = c.columns ? p.rows : kThreads, passes = ceil_div(pixels, pass);
  const int64_t beside = lines * (c.columns ? p.chunks : channels);
  const int64_t filling = ceil_div(kReduceBlocks, beside), shallow = ceil_div(passes, kReduceDepth);
  const int64_t parts = filling > shallow ? filling : shallow;
  if (passes == 0) return p;
  p.share = ceil_div(passes, parts < passes ? parts : passes) * pass;
  p.parts = ceil_div(pixels, p.share);
  return p;
}

cudaError_t launch_weight_gradients(const Convolutions& c, const WeightPlan& plan,
                                    const OutputGradients& from, const WeightGradients& to,
                                    cudaStream_t stream) {
  if (c.outputs() == 0) return cudaSuccess;
  if (const Tile tile = plan_tile(c, c.oh, c.ow, c.stride); tile.fits)
    return launch_tiled_weight_gradients(c, tile, plan.parts, plan.share, from, to, stream);
  if (c.sources != 1) return cudaErrorInvalidValue;
  unsigned lines = 0;
  for (int i = 0; i < c.count; ++i) lines += static_cast<unsigned>(c.side[i]);
  const int64_t pixels = c.N * c.oh * c.ow, beside = c.columns ? plan.chunks : c.C;
  if (!fits_grid(beside * plan.parts)) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(beside * plan.parts), lines);
  const Divider by_ow(c.ow, pixels), by_oh(c.oh, pixels);
  return with_type(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel =
        c.columns ? weight_gradients_kernel<T, true> : weight_gradients_kernel<T, false>;
    FASTNAS_LAUNCH(kernel, grid, kThreads, stream, c, plan, by_ow, by_oh, from,
                   static_cast<const T*>(c.xs[0]), to);
    return cudaGetLastError();
  });
}

cudaError_t launch_fold_weights(const Convolutions& c, const WeightPlan& plan, const void* partial,
                                const FoldedGradients& to, cudaStream_t stream) {
  const int64_t blocks = ceil_div(c.taps() * c.C, kThreads / 32);
  if (blocks == 0) return cudaSuccess;
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const unsigned grid = static_cast<unsigned>(blocks);
  if (c.dtype == Dtype::kDouble) {
    FASTNAS_LAUNCH(fold_weights_kernel<double>, grid, kThreads, stream, c, plan.parts,
                   static_cast<const double*>(partial), to);
  } else {
    FASTNAS_LAUNCH(fold_weights_kernel<float>, grid, kThreads, stream, c, plan.parts,
                   static_cast<const float*>(partial), to);
  }
  return cudaGetLastError();
}

}  // namespace fastnas::cuda
