// SPDX-License-Identifier: Apache-2.0
// Gradients of the weights of depthwise convolutions in tiles: x and each gradient are read about once for each
// convolution. A thread keeps the sums of the taps that it meets in registers; partial sums are folded elsewhere.
#include "depthwise_tile.cuh"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

// Blocks of a multiprocessor that the compiler makes room for. With more, some architectures spill.
template <typename T, int S, int K>
constexpr int kWeightBlocksAtOnce = K > 3 && (S == 2 || sizeof(T) == 8) ? 1 : 2;

// Columns of a kernel whose taps one block sums up, so that they fit its registers.
template <int K>
constexpr int kColumns = K < 7 ? K : 4;

// Of the convolutions with kernels of one size: their numbers, and how their tiles are shared out.
struct Share {
  int count, convolution[kMaxOperands];
  int64_t parts, tiles;
};

// The sums of some columns of one convolution's taps over the tiles of one part, for the channels of one chunk.
template <int K, int S, int D, typename T, typename Shared>
__device__ inline void sum_taps(const Convolutions& c, const Tile& t, const Strides& from,
                                const Strides& own, const Share& share, int i, int first_column,
                                const T* g, Shared& tile, acc_type<T>* partial) {
  using A = acc_type<T>;
  constexpr int kTaps = K * kColumns<K>;
  constexpr int pad = D * (K / 2);
  const int H = static_cast<int>(c.H), W = static_cast<int>(c.W);
  const int rows = (t.height() - 1) * S + 1 + 2 * pad, columns = (t.width() - 1) * S + 1 + 2 * pad;
  const int row = t.pitch << t.log_lanes, pixel = t.lanes();
  const int64_t chunk = blockIdx.x / share.parts, part = blockIdx.x - chunk * share.parts;
  const int64_t begin = part * share.tiles, end = begin + share.tiles;
  const int64_t last = end < t.tiles() ? end : t.tiles();
  const Strip s = strip_of(t);
  const T* x = static_cast<const T*>(c.xs[i]);
  A sum[kTaps] = {};
  for (int64_t index = begin; index < last; ++index) {
    const Corner corner = corner_of(t, index, chunk);
    const int64_t image = corner.image + s.image;
    const int channel = corner.channel + s.lane;
    const int y = corner.y + s.y, left = corner.x + s.x;
    const bool valid = s.valid && image < c.N && channel < c.C && left < c.ow;
    A gradient[kStrip] = {};  // on its way while the tile is brought
    if (valid) {
      const T* gs = g + own.at(image, channel, y, left);
#pragma unroll
      for (int o = 0; o < kStrip; ++o)
        if (y + o < c.oh) gradient[o] = to_acc(gs[o * own.row]);
    }
    __syncthreads();  // the one before has been read
    bring(c, t, from, corner, {corner.y * S - pad, corner.x * S - pad, rows, columns, 0, H, W, i},
          x, tile);
    __syncthreads();
    if (!valid) continue;
    const int at = (s.image * rows + s.y * S) * row + s.x * S * pixel + s.lane;
#pragma unroll
    for (int j = 0; j < kColumns<K>; ++j) {
      const int column_of = first_column + j;
      if (column_of >= K) break;
      asm volatile(
          "" ::
              : "memory");  // else the columns are all loaded first, into too many registers
      const Column<K, S, D, A> column(tile, at + column_of * D * pixel, row);
#pragma unroll
      for (int r = 0; r < K; ++r)
#pragma unroll
        for (int o = 0; o < kStrip; ++o) sum[j * K + r] += gradient[o] * column.of(o, r);
    }
  }
  const int channel = (static_cast<int>(chunk) << t.log_lanes) + s.lane;
  const bool writes = static_cast<int>(threadIdx.x) < t.lanes() && channel < c.C;
#pragma unroll
  for (int j = 0; j < kColumns<K>; ++j) {
    A taps[K];
#pragma unroll
    for (int r = 0; r < K; ++r) taps[r] = sum[j * K + r];
    __syncthreads();
    sum_over_rows(taps, static_cast<int>(threadIdx.x) >> t.log_lanes, kThreads >> t.log_lanes,
                  t.lanes());
    if (!writes || first_column + j >= K) continue;
    const int64_t first = c.first[i] * c.C + int64_t{channel} * (K * K) + first_column + j;
#pragma unroll
    for (int r = 0; r < K; ++r) partial[(first + r * K) * share.parts + part] = taps[r];
  }
}

template <typename T, int S, int K>
__global__ void __launch_bounds__(kThreads, kWeightBlocksAtOnce<T, S, K>)
    tiled_weight_gradients_kernel(const __grid_constant__ Convolutions c,
                                  const __grid_constant__ Tile t, Strides from, Strides own,
                                  const __grid_constant__ Share share,
                                  const __grid_constant__ OutputGradients gs,
                                  acc_type<T>* partial) {
  using A = acc_type<T>;
  FASTNAS_SHARED(A, tile, kTileBytes / sizeof(A));
  const int i = share.convolution[blockIdx.y];
  const T* g = static_cast<const T*>(gs.gs[i]);
  const int first = static_cast<int>(blockIdx.z) * kColumns<K>;
  if constexpr (K == 1) {
    sum_taps<1, S, 1>(c, t, from, own, share, i, first, g, tile, partial);
  } else {
    with_dilation(c.dilation[i], [&](auto d) {
      sum_taps<K, S, decltype(d)::value>(c, t, from, own, share, i, first, g, tile, partial);
    });
  }
}

template <typename T, int K>
cudaError_t sum_kernels(const Convolutions& c, const Tile& tile, Share share,
                        const OutputGradients& from, const WeightGradients& to,
                        cudaStream_t stream) {
  share.count = 0;
  for (int i = 0; i < c.count; ++i)
    if (c.side[i] == K && to.need[i] && from.gs[i]) share.convolution[share.count++] = i;
  if (share.count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tile.chunks * share.parts),
                  static_cast<unsigned>(share.count),
                  static_cast<unsigned>(ceil_div(K, kColumns<K>)));
  const auto kernel = c.stride == 1 ? tiled_weight_gradients_kernel<T, 1, K>
                                    : tiled_weight_gradients_kernel<T, 2, K>;
  FASTNAS_LAUNCH(kernel, grid, kThreads, stream, c, tile, strides_of(c, c.H, c.W),
                 strides_of(c, c.oh, c.ow), share, from, static_cast<acc_type<T>*>(to.partial));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_tiled_weight_gradients(const Convolutions& c, const Tile& tile, int64_t parts,
                                          int64_t share, const OutputGradients& from,
                                          const WeightGradients& to, cudaStream_t stream) {
  if (!fits_grid(tile.chunks * parts)) return cudaErrorInvalidConfiguration;
  Share shared{};
  shared.parts = parts;
  shared.tiles = share;
  return with_type(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cudaError_t error = sum_kernels<T, 1>(c, tile, shared, from, to, stream);
    if (!error) error = sum_kernels<T, 3>(c, tile, shared, from, to, stream);
    if (!error) error = sum_kernels<T, 5>(c, tile, shared, from, to, stream);
    if (!error) error = sum_kernels<T, 7>(c, tile, shared, from, to, stream);
    return error;
  });
}

}  // namespace fastnas::cuda
