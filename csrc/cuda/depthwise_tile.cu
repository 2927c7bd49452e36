// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions in tiles. Forward: x is read about once, every output written once. Input gradient: each
// gradient read about once, with zeros between its pixels where the stride is 2. What a tap multiplies comes from shared
// memory, about 0.6 loads for a multiply-add.
#include "depthwise_tile.cuh"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

// grid: x tiles of a chunk of channels, y sources.
template <typename T, int S>
__global__ void __launch_bounds__(kThreads, S == 1 ? 3 : 2)
    tiled_convolutions_kernel(const __grid_constant__ Convolutions c,
                              const __grid_constant__ Tile t, Strides from, Strides own,
                              const __grid_constant__ Outputs to) {
  using A = acc_type<T>;
  FASTNAS_SHARED(A, tile, kTileBytes / sizeof(A));
  FASTNAS_SHARED(A, weights, kTileWeights);
  const int64_t index = t.by_chunks.quotient(blockIdx.x);
  const Corner corner = corner_of(t, index, blockIdx.x - index * t.chunks);
  const int H = static_cast<int>(c.H), W = static_cast<int>(c.W);
  const int source = static_cast<int>(blockIdx.y);
  const Range range(c, source);
  // What the convolutions of the source reach around it.
  const int pad = c.sources == 1 ? t.pad : c.dilation[source] * (c.side[source] / 2);
  const int rows = (t.height() - 1) * S + 1 + 2 * pad, columns = (t.width() - 1) * S + 1 + 2 * pad;
  bring(c, t, from, corner,
        {corner.y * S - pad, corner.x * S - pad, rows, columns, 0, H, W, source},
        static_cast<const T*>(c.xs[source]), tile);
  const Strip s = strip_of(t);
  const int64_t image = corner.image + s.image;
  const int channel = corner.channel + s.lane;
  const int y = corner.y + s.y, left = corner.x + s.x;
  const bool valid = s.valid && image < c.N && channel < c.C && left < c.ow;
  const int64_t out = own.at(image, channel, y, left);
  const int row = t.pitch << t.log_lanes, pixel = t.lanes();
  for (int i = range.first; i < range.last; ++i) {
    if (i > range.first) __syncthreads();  // the weights before have been read
    bring_weights<A>(c, t, corner, i, weights);
    __syncthreads();
    if (!valid) continue;
    const int d = c.dilation[i], inner = pad - d * (c.side[i] / 2);
    const int at = (s.image * rows + s.y * S + inner) * row + (s.x * S + inner) * pixel + s.lane;
    A sum[kStrip] = {};
    with_kernel(c.side[i], d, [&](auto k, auto known) {
      add_taps<decltype(k)::value, S, decltype(known)::value, false>(tile, at, row, pixel, weights,
                                                                     s.lane, sum);
    });
    T* ys = static_cast<T*>(to.ys[i]) + out;
#pragma unroll
    for (int o = 0; o < kStrip; ++o)
      if (y + o < c.oh) ys[o * own.row] = from_acc<T>(sum[o]);
  }
}

// The same grid.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    tiled_input_gradients_kernel(const __grid_constant__ Convolutions c,
                                 const __grid_constant__ Tile t, Strides from, Strides to,
                                 const __grid_constant__ OutputGradients gs,
                                 const __grid_constant__ InputGradients dxs, InputSums sums) {
  using A = acc_type<T>;
  FASTNAS_SHARED(A, tile, kTileBytes / sizeof(A));
  FASTNAS_SHARED(A, weights, kTileWeights);
  const int64_t index = t.by_chunks.quotient(blockIdx.x);
  const Corner corner = corner_of(t, index, blockIdx.x - index * t.chunks);
  const Strip s = strip_of(t);
  const int64_t image = corner.image + s.image;
  const int channel = corner.channel + s.lane;
  const bool valid = s.valid && image < c.N && channel < c.C && corner.x + s.x < c.W;
  const int row = t.pitch << t.log_lanes, pixel = t.lanes();
  const int source_of = static_cast<int>(blockIdx.y);
  const Range range(c, source_of);
  A sum[kStrip] = {};
  for (int i = range.first; i < range.last; ++i) {
    const T* g = static_cast<const T*>(gs.gs[i]);
    if (!g) continue;
    const int d = c.dilation[i], pad = d * (c.side[i] / 2);
    const int rows = t.height() + 2 * pad, columns = t.width() + 2 * pad;
    __syncthreads();  // the one before has been read
    bring(c, t, from, corner,
          {corner.y - pad, corner.x - pad, rows, columns, c.stride - 1, static_cast<int>(c.oh),
           static_cast<int>(c.ow), -1},
          g, tile);
    bring_weights<A>(c, t, corner, i, weights);
    __syncthreads();
    if (!valid) continue;
    const int at = (s.image * rows + s.y) * row + s.x * pixel + s.lane;
    with_kernel(c.side[i], d, [&](auto k, auto known) {
      add_taps<decltype(k)::value, 1, decltype(known)::value, true>(tile, at, row, pixel, weights,
                                                                    s.lane, sum);
    });
  }
  A total[2] = {};  // of dx and of dx (x - mean)
  if (valid) {
    const int y = corner.y + s.y;
    const int64_t first = to.at(image, channel, y, corner.x + s.x);
    const Scaling<A> scaling(c, true, source_of, channel);
    const A mean =
        sums.partial ? static_cast<const A*>(sums.mean)[source_of * c.C + channel] : A(0);
    const bool reads = c.relu || sums.partial;
    const T* x = static_cast<const T*>(c.xs[source_of]);
    T* dx = static_cast<T*>(dxs.dxs[source_of]);
    A source
        [kStrip];  // all loads before the first store: the compiler may not move one over the other
#pragma unroll
    for (int o = 0; o < kStrip; ++o)
      source[o] = reads && y + o < c.H ? to_acc(x[first + o * to.row]) : A(0);
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      if (y + o >= c.H) break;
      if (c.relu && scaling.of(source[o]) <= 0) sum[o] = 0;
      total[0] += sum[o];
      total[1] += sum[o] * (source[o] - mean);
      dx[first + o * to.row] = from_acc<T>(sum[o]);
    }
  }
  if (!sums.partial) return;
  const int thread = static_cast<int>(threadIdx.x);
  sum_over_rows(total, thread >> t.log_lanes, kThreads >> t.log_lanes, t.lanes());
  const int64_t first = corner.channel + thread;
  if (thread >= t.lanes() || first >= c.C) return;
  A* partial = static_cast<A*>(sums.partial) + (2 * source_of * c.C + first) * sums.parts + index;
  partial[0] = total[0];
  partial[c.C * sums.parts] = total[1];
}

}  // namespace

cudaError_t launch_tiled_convolutions(const Convolutions& c, const Tile& tile, const Outputs& to,
                                      cudaStream_t stream) {
  const int64_t blocks = tile.tiles() * tile.chunks;
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const Strides from = strides_of(c, c.H, c.W), own = strides_of(c, c.oh, c.ow);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(c.sources));
  return with_type(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel =
        c.stride == 1 ? tiled_convolutions_kernel<T, 1> : tiled_convolutions_kernel<T, 2>;
    FASTNAS_LAUNCH(kernel, grid, kThreads, stream, c, tile, from, own, to);
    return cudaGetLastError();
  });
}

cudaError_t launch_tiled_input_gradients(const Convolutions& c, const Tile& tile,
                                         const OutputGradients& from, const InputGradients& to,
                                         const InputSums& sums, cudaStream_t stream) {
  const int64_t blocks = tile.tiles() * tile.chunks;
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const Strides outputs = strides_of(c, c.oh, c.ow), own = strides_of(c, c.H, c.W);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(c.sources));
  return with_type(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = tiled_input_gradients_kernel<T>;
    FASTNAS_LAUNCH(kernel, grid, kThreads, stream, c, tile, outputs, own, from, to, sums);
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
