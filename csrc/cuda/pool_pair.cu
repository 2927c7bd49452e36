// SPDX-License-Identifier: Apache-2.0
// Forward: 3 sizeof(T) bytes an element. Backward: 4 sizeof(T); every element asks the windows that it is in, at most
// nine, which of their pixels is the maximum, so that nothing is kept for it and nothing added up across threads.
#include "pool_pair.h"
#include "vec.cuh"

namespace fastnas::cuda {

namespace {

// How a thread finds its element in a tensor of height x width pixels, and pixels of the same plane in another.
struct PoolWalk {
  int64_t elements, height, width;
  Divider by_width, by_height, by_channels;  // by_channels in columns alone
};

PoolWalk make_walk(const PoolSizes& s, int64_t height, int64_t width) {
  const int64_t elements = s.N * s.C * height * width;
  const auto divider = [&](int64_t d) { return Divider(d > 0 ? d : 1, elements); };
  return {elements, height, width, divider(width), divider(height), divider(s.columns ? s.C : 1)};
}

struct PoolElement {
  int64_t plane, channel;  // in columns: image and channel; else plane and 0
  int y, x;
};

__device__ inline PoolElement element_of(const PoolWalk& w, int64_t at) {
  const int64_t pixel = w.by_channels.quotient(at), row = w.by_width.quotient(pixel);
  const int64_t plane = w.by_height.quotient(row);
  return {plane, at - pixel * w.by_channels.d, static_cast<int>(row - plane * w.height),
          static_cast<int>(pixel - row * w.width)};
}

// 1 / n for n of 1, 2 and 3. A division is a call of a routine, around which registers would be spilled.
template <typename A>
__device__ inline A inverse(int n) {
  return n == 3 ? A(1) / A(3) : n == 2 ? A(1) / A(2) : A(1);
}

// The pixels of a window that are inside the image.
struct Window {
  int y0, y1, x0, x1;

  template <typename A>
  __device__ A share() const {
    return inverse<A>(y1 - y0) * inverse<A>(x1 - x0);
  }
};

__device__ inline Window window_of(const PoolSizes& s, int row, int column) {
  const int y = row * s.stride, x = column * s.stride;
  return {y > 0 ? y - 1 : 0, y + 2 < s.H ? y + 2 : static_cast<int>(s.H), x > 0 ? x - 1 : 0,
          x + 2 < s.W ? x + 2 : static_cast<int>(s.W)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_pair_kernel(const __grid_constant__ PoolSizes s, const __grid_constant__ PoolWalk walk,
                     const T* x, T* max, T* avg) {
  using A = acc_type<T>;
  const int64_t grid = int64_t{gridDim.x} * kThreads, step = s.columns ? s.C : 1;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < walk.elements; at += grid) {
    const PoolElement e = element_of(walk, at);
    const Window w = window_of(s, e.y, e.x);
    const T* plane = x + e.plane * s.H * s.W * step + e.channel;
    A top = to_acc(plane[(w.y0 * s.W + w.x0) * step]), sum = 0;
    for (int i = w.y0; i < w.y1; ++i)
      for (int j = w.x0; j < w.x1; ++j) {
        const A v = to_acc(plane[(i * s.W + j) * step]);
        if (v > top || v != v) top = v;
        sum += v;
      }
    max[at] = from_acc<T>(top);
    avg[at] = from_acc<T>(sum * w.share<A>());
  }
}

// Whether pixel (y, x) is the maximum of its window: the first of equals, the last NaN.
template <typename T>
__device__ inline bool is_maximum(const Window& w, const T* plane, int64_t line, int64_t step,
                                  int y, int x, acc_type<T> own) {
  using A = acc_type<T>;
  for (int i = w.y0; i < w.y1; ++i)
    for (int j = w.x0; j < w.x1; ++j) {
      if (i == y && j == x) continue;
      const A v = to_acc(plane[i * line + j * step]);
      const bool before = i < y || (i == y && j < x);
      if (v != v) {
        if (!before || own == own) return false;
      } else if (before ? v >= own : v > own) {
        return false;
      }
    }
  return true;
}

// The first of the windows along one side that reach pixel `at`.
__device__ inline int first_window(int at, int stride) {
  return at > 0 ? (at + stride - 2) >> (stride - 1) : 0;
}

// f(window, offset of its output in a plane) for every window that pixel (y, x) is in.
template <typename F>
__device__ inline void each_window(const PoolSizes& s, int y, int x, F&& f) {
  const int64_t step = s.columns ? s.C : 1;
  for (int i = first_window(y, s.stride); i < s.oh && i * s.stride <= y + 1; ++i)
    for (int j = first_window(x, s.stride); j < s.ow && j * s.stride <= x + 1; ++j)
      f(window_of(s, i, j), (i * s.ow + j) * step);
}

// Four blocks a processor: left to itself, the compiler spills registers to fit more.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    pool_pair_gradient_kernel(const __grid_constant__ PoolSizes s,
                              const __grid_constant__ PoolWalk walk, const T* x, const T* g_max,
                              const T* g_avg, T* dx) {
  using A = acc_type<T>;
  const int64_t grid = int64_t{gridDim.x} * kThreads, step = s.columns ? s.C : 1;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < walk.elements; at += grid) {
    const PoolElement e = element_of(walk, at);
    const int64_t output = e.plane * s.oh * s.ow * step + e.channel;
    A sum = 0;
    if (g_max) {
      const T* plane = x + e.plane * s.H * s.W * step + e.channel;
      const A own = to_acc(x[at]);
      each_window(s, e.y, e.x, [&](const Window& w, int64_t offset) {
        if (is_maximum(w, plane, s.W * step, step, e.y, e.x, own))
          sum += to_acc(g_max[output + offset]);
      });
    }
    if (g_avg)
      each_window(s, e.y, e.x, [&](const Window& w, int64_t offset) {
        sum += to_acc(g_avg[output + offset]) * w.share<A>();
      });
    dx[at] = from_acc<T>(sum);
  }
}

}  // namespace

cudaError_t launch_pool_pair(const PoolSizes& sizes, const void* x, void* max, void* avg,
                             cudaStream_t stream) {
  if (sizes.outputs() == 0) return cudaSuccess;
  return with_type(sizes.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = pool_pair_kernel<T>;
    const PoolWalk walk = make_walk(sizes, sizes.oh, sizes.ow);
    FASTNAS_LAUNCH(kernel, grid_for(ceil_div(walk.elements, kThreads)), kThreads, stream, sizes,
                   walk, static_cast<const T*>(x), static_cast<T*>(max), static_cast<T*>(avg));
    return cudaGetLastError();
  });
}

cudaError_t launch_pool_pair_gradient(const PoolSizes& sizes, const void* x, const void* g_max,
                                      const void* g_avg, void* dx, cudaStream_t stream) {
  if (sizes.sources() == 0) return cudaSuccess;
  return with_type(sizes.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = pool_pair_gradient_kernel<T>;
    const PoolWalk walk = make_walk(sizes, sizes.H, sizes.W);
    FASTNAS_LAUNCH(kernel, grid_for(ceil_div(walk.elements, kThreads)), kThreads, stream, sizes,
                   walk, static_cast<const T*>(x), static_cast<const T*>(g_max),
                   static_cast<const T*>(g_avg), static_cast<T*>(dx));
    return cudaGetLastError();
  });
}

}  // namespace fastnas::cuda
