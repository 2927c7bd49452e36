// SPDX-License-Identifier: Apache-2.0
// dw = sum over pixels of g x^T, for matrices of at most 64 x 64: the gradients of pointwise convolutions' weights. A
// block brings tiles of pixels of x and g into shared memory, channel by channel; a thread has four rows and four columns
// of the matrix at every so many pixels. Reads (inputs + outputs) * sizeof(T) bytes a pixel.
#include "products.h"
#include "reduce.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kTileBytes = 24 << 10;  // of shared memory, beside the tree of the sums
constexpr int kMostLogQuads = 8;

template <typename A>
constexpr int kTileQuads = kTileBytes / static_cast<int>(4 * sizeof(A));

// Rows of channels in the tile: those of x, then those of g, each filled up to four for every thread with zeros.
struct Shape {
  int across,
      down;  // threads side by side: each has columns x, x + across, ... and rows y, y + down, ...

  FASTNAS_HOST_DEVICE Shape(const ProductSums& p)
      : across((p.inputs + 3) / 4), down((p.outputs + 3) / 4) {}
  FASTNAS_HOST_DEVICE int lanes() const { return across * down; }
  FASTNAS_HOST_DEVICE int channels() const { return 4 * (across + down); }
};

// Of the tile: a row of it, and four pixels there.
struct Cell {
  int row, quad;
};

constexpr int kAtOnce = 4;  // cells that a thread loads before it stores the first

// Values of a channel at four pixels in a row; 0 beyond the last.
template <typename T, bool kColumns, bool kVectors>
__device__ inline Vec<acc_type<T>, 4> load_quad(const T* from, int channel, int channels, int64_t S,
                                                int64_t pixel, int64_t pixels,
                                                const Divider& by_image) {
  using A = acc_type<T>;
  Vec<A, 4> out;
  if constexpr (kVectors) {  // planes whose pixels come in fours
    Operand<T, 4> loaded = {};
    if (pixel < pixels)
      loaded =
          load<T, 4>(from + by_image.quotient(pixel) * (channels - 1) * S + channel * S + pixel);
#pragma unroll
    for (int j = 0; j < 4; ++j) out.v[j] = loaded.acc(j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t at = pixel + j;
      out.v[j] = 0;
      if (at >= pixels) continue;
      if constexpr (kColumns) {
        out.v[j] = to_acc(from[at * channels + channel]);
      } else {
        out.v[j] = to_acc(from[by_image.quotient(at) * (channels - 1) * S + channel * S + at]);
      }
    }
  }
  return out;
}

// grid: x parts, y products.
template <typename T, bool kColumns, bool kVectors>
__global__ void __launch_bounds__(kThreads, sizeof(acc_type<T>) == 8 ? 1 : 2)
    product_sums_kernel(const __grid_constant__ ProductSums p, Divider by_image,
                        acc_type<T>* partial) {
  using A = acc_type<T>;
  FASTNAS_SHARED(Vec_4<A>, tile, kTileQuads<A>);
  const Shape shape(p);
  const int i = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int quads = 1 << p.log_quads, pitch = quads + 1;  // odd: neighbouring channels, other banks
  const int lanes = shape.lanes(), slices = kThreads / lanes, slice = thread / lanes;
  const int lane = thread - slice * lanes, down = lane / shape.across;
  const int across = lane - down * shape.across;
  const int64_t first = blockIdx.x * p.share * quads,
                end = first + p.share * quads;  // in quads
  const T* x = static_cast<const T*>(p.xs[i]);
  const T* g = static_cast<const T*>(p.gs[i]);
  // Neighbouring threads read neighbouring addresses.
  const auto cell_of = [&](int e) {
    return kColumns ? Cell{e % shape.channels(), e / shape.channels()}
                    : Cell{e >> p.log_quads, e & (quads - 1)};
  };
  A sum[16] = {};
  for (int64_t begin = first; begin < end && begin * 4 < p.pixels(); begin += quads) {
    __syncthreads();  // the tile before has been read
    const int total = shape.channels() << p.log_quads;
    for (int e = thread; e < total; e += kAtOnce * kThreads) {
      Vec<A, 4> four[kAtOnce] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const Cell at = cell_of(e + n * kThreads);
        const bool source = at.row < 4 * shape.across;
        const int channel = source ? at.row : at.row - 4 * shape.across;
        const int channels = source ? p.inputs : p.outputs;
        if (e + n * kThreads < total && channel < channels)
          four[n] = load_quad<T, kColumns, kVectors>(source ? x : g, channel, channels, p.S,
                                                     (begin + at.quad) * 4, p.pixels(), by_image);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (e + n * kThreads >= total) break;
        const Cell at = cell_of(e + n * kThreads);
        if (at.row < 4 * shape.across && p.relu) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (four[n].v[j] <= 0) four[n].v[j] = 0;  // NaN stays
        }
        tile[at.row * pitch + at.quad] = four[n];
      }
    }
    __syncthreads();
    if (slice >= slices) continue;
    for (int quad = slice; quad < quads; quad += slices) {
      Vec<A, 4> columns[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[c] = tile[(across + c * shape.across) * pitch + quad];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Vec<A, 4> row = tile[(4 * shape.across + down + r * shape.down) * pitch + quad];
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[r * 4 + c] += row.v[j] * columns[c].v[j];
      }
    }
  }
  sum_over_rows(sum, slice, slices, lanes);
  if (slice != 0) return;
  partial += (i * p.parts + blockIdx.x) * p.matrix();
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int o = down + r * shape.down, column = across + c * shape.across;
      if (o < p.outputs && column < p.inputs) partial[o * p.inputs + column] = sum[r * 4 + c];
    }
}

// grid: x chunks of 32 entries of a matrix, y products. Every row of threads adds up a share of the parts.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    fold_products_kernel(const __grid_constant__ ProductSums p, const A* partial) {
  const int i = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int row = thread / 32, rows = kThreads / 32;
  const int64_t entry = int64_t{blockIdx.x} * 32 + thread % 32;
  double sum[1] = {0};
  if (entry < p.matrix())
    for (int64_t part = row; part < p.parts; part += rows)
      sum[0] += static_cast<double>(partial[(i * p.parts + part) * p.matrix() + entry]);
  sum_over_rows(sum, row, rows, 32);
  if (row == 0 && entry < p.matrix()) write(p.dws[i], p.weight_dtype[i], entry, sum[0]);
}

template <typename T>
cudaError_t launch(const ProductSums& p, bool vectors, void* partial, cudaStream_t stream) {
  using A = acc_type<T>;
  if (!fits_grid(p.parts)) return cudaErrorInvalidConfiguration;
  auto kernel =
      p.columns ? product_sums_kernel<T, true, false> : product_sums_kernel<T, false, false>;
  if constexpr (sizeof(T) <= 4) {
    if (vectors) kernel = product_sums_kernel<T, false, true>;
  }
  const unsigned count = static_cast<unsigned>(p.count);
  FASTNAS_LAUNCH(kernel, dim3(static_cast<unsigned>(p.parts), count), kThreads, stream, p,
                 Divider(p.S, p.pixels()), static_cast<A*>(partial));
  const cudaError_t error = cudaGetLastError();
  if (error) return error;
  const auto fold = fold_products_kernel<A>;
  FASTNAS_LAUNCH(fold, dim3(static_cast<unsigned>(ceil_div(p.matrix(), 32)), count), kThreads,
                 stream, p, static_cast<const A*>(partial));
  return cudaGetLastError();
}

}  // namespace

void plan_sums(ProductSums& p) {
  const Shape shape(p);
  const int room =
      (p.dtype == Dtype::kDouble ? kTileQuads<double> : kTileQuads<float>) / shape.channels();
  p.log_quads = 0;
  while ((2 << p.log_quads) + 1 <= room && p.log_quads < kMostLogQuads) ++p.log_quads;
  const int64_t quads = int64_t{1} << p.log_quads, tiles = ceil_div(p.pixels(), 4 * quads);
  p.share = p.parts = 0;
  if (tiles == 0 || p.count == 0) return;
  // Enough parts to fill a GPU, but no more than read what they leave; and none so large that float counts.
  const int64_t filling = ceil_div(kReduceBlocks, p.count);
  const int64_t most = p.pixels() * (p.inputs + p.outputs) / p.matrix();
  const int64_t slices = kThreads / shape.lanes();
  const int64_t shallow = ceil_div(tiles * 4 * ceil_div(quads, slices), kReduceDepth);
  int64_t parts = filling < most ? filling : most;
  if (parts < shallow) parts = shallow;
  if (parts < 1) parts = 1;
  p.share = ceil_div(tiles, parts < tiles ? parts : tiles);
  p.parts = ceil_div(tiles, p.share);
}

cudaError_t launch_product_sums(const ProductSums& p, void* partial, cudaStream_t stream) {
  if (p.count == 0 || p.parts == 0) return cudaSuccess;
  if (!few_channels(p.inputs, p.outputs)) return cudaErrorInvalidValue;
  bool vectors = !p.columns && p.S % 4 == 0;
  for (int i = 0; i < p.count; ++i) vectors = vectors && aligned(p.xs[i]) && aligned(p.gs[i]);
  return with_type(p.dtype, [&](auto type) {
    return launch<typename decltype(type)::type>(p, vectors, partial, stream);
  });
}

}  // namespace fastnas::cuda
