// SPDX-License-Identifier: Apache-2.0
// y_i = conv(relu(x), w_i), depthwise: (1 + G) * sizeof(T) bytes an element for G convolutions, k k multiply-adds for
// each. dx: (G + 2) * sizeof(T) bytes; weights: 2 sizeof(T) bytes for each row of taps.
#include <algorithm>

#include "depthwise_tile.h"
#include "mix.h"
#include "reduce.cuh"

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

// f(Int<k>) for the k that the kernels serve.
template <typename F>
__device__ inline void with_side(int side, F&& f) {
  if (side == 1) f(Int<1>{});
  if (side == 3) f(Int<3>{});
  if (side == 5) f(Int<5>{});
  if (side == 7) f(Int<7>{});
}

// What a tap multiplies of a source: BatchNorm and ReLU come before, where there are such.
template <int V, bool kColumns, typename A>
struct Source {
  A scale[V], shift[V];
  bool normed, relu;

  __device__ Source(const Convolutions& c, int64_t channel) : normed(c.scale), relu(c.relu) {
    if (!normed) return;
    load_entries<V, kColumns>(scale, static_cast<const A*>(c.scale) + channel);
    load_entries<V, kColumns>(shift, static_cast<const A*>(c.shift) + channel);
  }
  __device__ A of(A x, int v) const {
    if (normed) x = scale[v] * x + shift[v];
    return relu && x <= 0 ? A(0) : x;  // NaN stays
  }
};

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
