// SPDX-License-Identifier: Apache-2.0
// y = w x at every pixel, for matrices of at most 64 x 64. A thread has four pixels and some outputs, whose sums stay in
// its registers; matrices are in shared memory. Moves (inputs + outputs) * sizeof(T) bytes a pixel.
#include "products.h"
#include "vec.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kPixels = 4;  // of a thread
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // channels whose values a thread loads before it uses the first
static_assert(kAtOnce == kPixels, "vectors hold as many channels as pixels");

// Four pixels of a thread: neighbours where vectors hold pixels, else 32 apart, so that a warp reads lines.
struct Pixels {
  int64_t x[kPixels], y[kPixels];  // where their first channels are
  bool valid[kPixels];
};

template <bool kColumns, bool kVectors>
__device__ inline Pixels pixels_of(const Products& p, const Divider& by_image, int64_t quad) {
  Pixels out;
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    const int64_t pixel = kVectors && !kColumns ? quad * kPixels + j
                                                : (quad / 32) * (32 * kPixels) + j * 32 + quad % 32;
    out.valid[j] = pixel < p.pixels();
    if constexpr (kColumns) {
      out.x[j] = pixel * p.inputs;
      out.y[j] = pixel * p.outputs;
    } else {
      const int64_t image = out.valid[j] ? by_image.quotient(pixel) : 0;
      out.x[j] = image * (p.inputs - 1) * p.S + pixel;
      out.y[j] = image * (p.outputs - 1) * p.S + pixel;
    }
  }
  return out;
}

// Channels first .. first + kAtOnce of the pixels; 0 where there are none.
template <typename T, bool kColumns, bool kVectors>
__device__ inline void load_channels(const Products& p, const T* x, const Pixels& at, int first,
                                     acc_type<T> (&value)[kAtOnce][kPixels]) {
  if constexpr (kVectors && !kColumns) {
    Operand<T, kPixels> loaded[kAtOnce] = {};
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
      if (at.valid[0] && first + c < p.inputs)
        loaded[c] = load<T, kPixels>(x + at.x[0] + (first + c) * p.S);
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
      for (int j = 0; j < kPixels; ++j) value[c][j] = loaded[c].acc(j);
  } else if constexpr (kVectors) {
    Operand<T, kAtOnce> loaded[kPixels] = {};
#pragma unroll
    for (int j = 0; j < kPixels; ++j)
      if (at.valid[j]) loaded[j] = load<T, kAtOnce>(x + at.x[j] + first);
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
      for (int j = 0; j < kPixels; ++j) value[c][j] = loaded[j].acc(c);
  } else {
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
      for (int j = 0; j < kPixels; ++j)
        value[c][j] = at.valid[j] && first + c < p.inputs
                          ? to_acc(x[at.x[j] + (first + c) * (kColumns ? 1 : p.S)])
                          : acc_type<T>(0);
  }
  if (!p.relu) return;
#pragma unroll
  for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
    for (int j = 0; j < kPixels; ++j)
      if (value[c][j] <= 0) value[c][j] = 0;  // NaN stays
}

// f(at, part) for every vector of outputs first .. first + R of the pixels: `at` is its first element, part(v) the sum that
// belongs to its element v.
template <int R, bool kColumns, bool kVectors, typename A, typename F>
__device__ inline void for_each_vector(const Products& p, const Pixels& at, int first,
                                       A (&sum)[R][kPixels], F&& f) {
#pragma unroll
  for (int r = 0; r < R; r += kVectors && kColumns ? kAtOnce : 1) {
    if (first + r >= p.outputs) break;
#pragma unroll
    for (int j = 0; j < kPixels; j += kVectors && !kColumns ? kPixels : 1) {
      if (!at.valid[j]) continue;
      f(at.y[j] + (first + r) * (kColumns ? 1 : p.S),
        [&](int v) -> A& { return kColumns ? sum[r + v][j] : sum[r][j + v]; });
    }
  }
}

// Outputs first .. first + R of the pixels.
template <typename T, int R, bool kColumns, bool kVectors>
__device__ inline void store_outputs(const Products& p, T* y, const Pixels& at, int first,
                                     acc_type<T> (&sum)[R][kPixels]) {
  constexpr int V = kVectors ? kPixels : 1;
  if (const T* mask = static_cast<const T*>(p.mask))  // all of it before the first store
    for_each_vector<R, kColumns, kVectors>(p, at, first, sum, [&](int64_t from, auto&& part) {
      const Operand<T, V> read = load<T, V>(mask + from);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (read.acc(v) <= 0) part(v) = 0;
    });
  for_each_vector<R, kColumns, kVectors>(p, at, first, sum, [&](int64_t to, auto&& part) {
    acc_type<T> out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = part(v);
    store<T, V>(y + to, out);
  });
}

// grid: x chunks of pixels, y products. The warps of a block have groups of R outputs, side by side, of the same pixels.
template <typename T, int R, bool kColumns, bool kVectors>
__global__ void __launch_bounds__(kThreads, sizeof(acc_type<T>) == 8 ? 1 : 2)
    products_kernel(const __grid_constant__ Products p, Divider by_image) {
  using A = acc_type<T>;
  FASTNAS_SHARED(Vec_4<A>, table, kMostChannels * (kMostChannels / 4 + 1));
  const int i = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  // The pitch is odd, so that threads which write one below the other meet other banks.
  const int groups = (p.outputs + R - 1) / R, fours = groups * (R / 4), pitch = fours | 1;
  const int warp = thread / 32, chunks = kWarps / groups, chunk = warp / groups;
  const int group = warp - chunk * groups;
  const int64_t quad = (int64_t{blockIdx.x} * chunks + chunk) * 32 + thread % 32;
  const Pixels at = pixels_of<kColumns, kVectors>(p, by_image, quad);
  const T* x = static_cast<const T*>(p.xs[i]);
  A value[kAtOnce][kPixels];  // on their way while the table is made
  load_channels<T, kColumns, kVectors>(p, x, at, 0, value);
  for (int e = thread; e < p.inputs * fours; e += kThreads) {
    // Neighbouring threads read neighbouring weights.
    const int c = p.turned ? e / fours : e % p.inputs, four = p.turned ? e % fours : e / p.inputs;
    Vec<A, 4> weights;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int o = four * 4 + v, from = p.turned ? c * p.outputs + o : o * p.inputs + c;
      weights.v[v] = o < p.outputs ? read_as<A>(p.weights[i], p.weight_dtype[i], from) : A(0);
    }
    table[c * pitch + four] = weights;
  }
  __syncthreads();
  if (chunk >= chunks) return;
  A sum[R][kPixels] = {};
  for (int first = 0; first < p.inputs; first += kAtOnce) {
    A next[kAtOnce][kPixels] = {};
    if (first + kAtOnce < p.inputs)
      load_channels<T, kColumns, kVectors>(p, x, at, first + kAtOnce, next);
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      if (first + c >= p.inputs) break;
#pragma unroll
      for (int r = 0; r < R; r += 4) {
        const Vec<A, 4> four = table[(first + c) * pitch + (group * R + r) / 4];
#pragma unroll
        for (int v = 0; v < 4; ++v)
#pragma unroll
          for (int j = 0; j < kPixels; ++j) sum[r + v][j] += four.v[v] * value[c][j];
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
      for (int j = 0; j < kPixels; ++j) value[c][j] = next[c][j];
  }
  store_outputs<T, R, kColumns, kVectors>(p, static_cast<T*>(p.ys[i]), at, group * R, sum);
}

template <typename T, int R, bool kColumns, bool kVectors>
cudaError_t launch(const Products& p, cudaStream_t stream) {
  const int chunks = kWarps / ((p.outputs + R - 1) / R);
  const int64_t blocks = ceil_div(ceil_div(p.pixels(), kPixels), 32 * chunks);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const auto kernel = products_kernel<T, R, kColumns, kVectors>;
  FASTNAS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.count)),
                 kThreads, stream, p, Divider(p.S, p.pixels()));
  return cudaGetLastError();
}

template <typename T, int R>
cudaError_t launch(const Products& p, bool vectors, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    if (vectors)
      return p.columns ? launch<T, R, true, true>(p, stream) : launch<T, R, false, true>(p, stream);
  }
  return p.columns ? launch<T, R, true, false>(p, stream) : launch<T, R, false, false>(p, stream);
}

}  // namespace

cudaError_t launch_products(const Products& p, cudaStream_t stream) {
  if (p.pixels() == 0 || p.count == 0) return cudaSuccess;
  if (!few_channels(p.inputs, p.outputs)) return cudaErrorInvalidValue;
  bool vectors =
      p.columns ? p.inputs % kAtOnce == 0 && p.outputs % kAtOnce == 0 : p.S % kPixels == 0;
  vectors = vectors && aligned(p.mask);
  for (int i = 0; i < p.count; ++i) vectors = vectors && aligned(p.xs[i]) && aligned(p.ys[i]);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return p.outputs <= 4 ? launch<T, 4>(p, vectors, stream) : launch<T, 8>(p, vectors, stream);
  });
}

}  // namespace fastnas::cuda
