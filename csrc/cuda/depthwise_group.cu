// SPDX-License-Identifier: Apache-2.0
// y_i = conv(relu(x), w_i), depthwise: (1 + G) * sizeof(T) bytes an element for G convolutions, k k multiply-adds for
// each. dx: (G + 2) * sizeof(T) bytes. In tiles (depthwise_tile.cu) where one fits, else as below.
#include <algorithm>

#include "depthwise_taps.cuh"
#include "depthwise_tile.h"

namespace fastnas::cuda {

namespace {

// Kernels below are bounded to one block a multiprocessor: left to itself, ptxas spills to fit four.

// How a thread finds its element (n, c, y, x), or vector of them, in a tensor of height x width pixels.
struct Walk {
  int64_t vectors, height, width;
  Divider by_width, by_height, by_channels;  // in columns: vectors of channels
};

Walk make_walk(const Convolutions& c, int64_t height, int64_t width, int vector) {
  const int64_t elements = c.N * c.C * height * width;
  const auto divider = [&](int64_t d) { return Divider(d > 0 ? d : 1, elements); };
  return {elements / vector, height,          width,
          divider(width),    divider(height), divider(c.columns ? c.C / vector : c.C)};
}

// Positions in an image fit 32 bits (check_depthwise), and so do those that a tap reaches around it.
struct Element {
  int64_t plane;  // in columns: image
  int64_t channel;
  int y, x;
};

template <int V, bool kColumns>
__device__ inline Element element_of(const Walk& w, int64_t vector) {
  int64_t pixel = vector, channel = 0;
  if constexpr (kColumns) {
    pixel = w.by_channels.quotient(vector);
    channel = (vector - pixel * w.by_channels.d) * V;
  }
  const int64_t row = w.by_width.quotient(pixel), plane = w.by_height.quotient(row);
  if constexpr (!kColumns) channel = plane - w.by_channels.quotient(plane) * w.by_channels.d;
  return {plane, channel, static_cast<int>(row - plane * w.height),
          static_cast<int>(pixel - row * w.width)};
}

// One convolution at one place, forward: the taps of output (y, x) in x; or backward: those of input (y, x) in the
// gradient of an output, at every stride-th of them.
template <typename T, int K, int V, bool kColumns, bool kBackward>
__device__ inline void add_taps(const Convolutions& c, int i, const T* source, int64_t height,
                                int64_t width, const Element& at, acc_type<T> (&sum)[V]) {
  using A = acc_type<T>;
  const int d = c.dilation[i], pad = d * (K / 2), shift = c.stride - 1;
  const int64_t step = kColumns ? c.C : 1;
  const A* w = static_cast<const A*>(c.table) + c.first[i] * c.C + at.channel;
  const Source<V, kColumns, A> before(c, at.channel);
  source += at.plane * height * width * step + (kColumns ? at.channel : 0);
  const int top = kBackward ? at.y + pad : (at.y << shift) - pad;
  const int left = kBackward ? at.x + pad : (at.x << shift) - pad;
  for (int row = 0; row < K; ++row) {
    int y = kBackward ? top - row * d : top + row * d;
    if (y < 0 || (kBackward && (y & shift))) continue;
    if constexpr (kBackward) y >>= shift;
    if (y >= height) continue;
    const T* line = source + y * width * step;
#pragma unroll
    for (int column = 0; column < K; ++column) {
      int x = kBackward ? left - column * d : left + column * d;
      if (x < 0 || (kBackward && (x & shift))) continue;
      if constexpr (kBackward) x >>= shift;
      if (x >= width) continue;
      const Operand<T, V> value = load<T, V>(line + x * step);
      A weight[V];
      load_entries<V, kColumns>(weight, w + (row * K + column) * c.C);
#pragma unroll
      for (int v = 0; v < V; ++v)
        sum[v] += (kBackward ? value.acc(v) : before.of(value.acc(v), v)) * weight[v];
    }
  }
}

template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    convolutions_kernel(const __grid_constant__ Convolutions c, const __grid_constant__ Walk walk,
                        const T* x, const __grid_constant__ Outputs to) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < walk.vectors; at += step) {
    const Element element = element_of<V, kColumns>(walk, at);
    for (int i = 0; i < c.count; ++i) {
      acc_type<T> sum[V] = {};
      with_side(c.side[i], [&](auto side) {
        add_taps<T, decltype(side)::value, V, kColumns, false>(c, i, x, c.H, c.W, element, sum);
      });
      store<T, V>(static_cast<T*>(to.ys[i]) + at * V, sum);
    }
  }
}

template <typename T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    input_gradient_kernel(const __grid_constant__ Convolutions c, const __grid_constant__ Walk walk,
                          const __grid_constant__ OutputGradients from, const T* x, T* dx) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < walk.vectors; at += step) {
    const Element element = element_of<V, kColumns>(walk, at);
    acc_type<T> sum[V] = {};
    for (int i = 0; i < c.count; ++i) {
      const T* g = static_cast<const T*>(from.gs[i]);
      if (!g) continue;
      with_side(c.side[i], [&](auto side) {
        add_taps<T, decltype(side)::value, V, kColumns, true>(c, i, g, c.oh, c.ow, element, sum);
      });
    }
    if (c.relu) {
      const Operand<T, V> source = load<T, V>(x + at * V);
      const Source<V, kColumns, acc_type<T>> before(c, element.channel);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (before.of(source.acc(v), v) <= 0) sum[v] = 0;
    }
    store<T, V>(dx + at * V, sum);
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads, 1)
    weight_table_kernel(const __grid_constant__ Convolutions c, A* table) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= c.taps() * c.C) return;
  const int64_t tap = at / c.C, channel = at - tap * c.C;
  int i = 0;
  while (tap >= c.first[i + 1]) ++i;
  const int64_t size = c.first[i + 1] - c.first[i];
  table[at] =
      static_cast<A>(read(c.weights[i], c.weight_dtype[i], channel * size + tap - c.first[i]));
}

// f(type, V, columns): vectors of 16 bytes where channels are innermost and every tensor that is read or written by
// them allows it; null ones do not count.
template <typename F>
cudaError_t with_layout(const Convolutions& c, const void* const* others,
                        std::initializer_list<const void*> more, F&& f) {
  bool vectors = std::all_of(more.begin(), more.end(), aligned);
  for (int i = 0; i < c.count; ++i) vectors = vectors && aligned(others[i]);
  return with_type(c.dtype, [&](auto type) {
    constexpr int kWide = 16 / static_cast<int>(sizeof(typename decltype(type)::type));
    if (!c.columns) return f(type, Int<1>{}, Int<0>{});
    return vectors && c.C % kWide == 0 ? f(type, Int<kWide>{}, Int<1>{})
                                       : f(type, Int<1>{}, Int<1>{});
  });
}

}  // namespace

bool needs_table(const Convolutions& c) {
  return !plan_tile(c, c.oh, c.ow, c.stride).fits || !plan_tile(c, c.H, c.W, 1).fits;
}

cudaError_t launch_weight_table(const Convolutions& c, void* table, cudaStream_t stream) {
  const int64_t total = c.taps() * c.C;
  if (total == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(total, kThreads);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const unsigned grid = static_cast<unsigned>(blocks);
  if (c.dtype == Dtype::kDouble) {
    FASTNAS_LAUNCH(weight_table_kernel<double>, grid, kThreads, stream, c,
                   static_cast<double*>(table));
  } else {
    FASTNAS_LAUNCH(weight_table_kernel<float>, grid, kThreads, stream, c,
                   static_cast<float*>(table));
  }
  return cudaGetLastError();
}

cudaError_t launch_convolutions(const Convolutions& c, const Outputs& to, cudaStream_t stream) {
  if (c.outputs() == 0) return cudaSuccess;
  const Tile tile = plan_tile(c, c.oh, c.ow, c.stride);
  if (tile.fits) return launch_tiled_convolutions(c, tile, to, stream);
  if (c.sources != 1) return cudaErrorInvalidValue;
  const void* x = c.xs[0];
  return with_layout(c, to.ys, {x}, [&](auto type, auto vector, auto columns) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(vector)::value;
    const auto kernel = convolutions_kernel<T, V, decltype(columns)::value != 0>;
    const Walk walk = make_walk(c, c.oh, c.ow, V);
    FASTNAS_LAUNCH(kernel, grid_for(ceil_div(walk.vectors, kThreads)), kThreads, stream, c, walk,
                   static_cast<const T*>(x), to);
    return cudaGetLastError();
  });
}

int64_t input_sum_parts(const Convolutions& c) {
  const Tile tile = plan_tile(c, c.H, c.W, 1);
  return tile.fits && c.inputs() ? tile.tiles() : 0;
}

cudaError_t launch_input_gradients(const Convolutions& c, const OutputGradients& from,
                                   const InputGradients& to, const InputSums& sums,
                                   cudaStream_t stream) {
  if (c.inputs() == 0) return cudaSuccess;
  const Tile tile = plan_tile(c, c.H, c.W, 1);
  if (tile.fits) return launch_tiled_input_gradients(c, tile, from, to, sums, stream);
  if (c.sources != 1 || sums.partial) return cudaErrorInvalidValue;
  const void* x = c.xs[0];
  void* dx = to.dxs[0];
  return with_layout(
      c, from.gs, {dx, c.relu ? x : nullptr}, [&](auto type, auto vector, auto columns) {
        using T = typename decltype(type)::type;
        constexpr int V = decltype(vector)::value;
        const auto kernel = input_gradient_kernel<T, V, decltype(columns)::value != 0>;
        const Walk walk = make_walk(c, c.H, c.W, V);
        FASTNAS_LAUNCH(kernel, grid_for(ceil_div(walk.vectors, kThreads)), kThreads, stream, c,
                       walk, from, static_cast<const T*>(x), static_cast<T*>(dx));
        return cudaGetLastError();
      });
}

}  // namespace fastnas::cuda
