// SPDX-License-Identifier: Apache-2.0
// PC-DARTS' mixed op after its candidates, channels innermost: a thread makes the k neighbouring channels of a pixel
// that one mixed channel begins, so sectors of the output are written whole and the gradient's are read once.
// Moves (K + 2k - 1) * sizeof(T) bytes a mixed element forward, (K + K' + 2k - 1) * sizeof(T) backward for K' operands
// that are normalised by their batch; a pooled bypass reads its source four times over.
#include "bypass.cuh"

namespace fastnas::cuda {

namespace {

constexpr int kUnroll = 2;  // elements of an operand that a thread has in flight
constexpr int kBatch = 4;   // operands, likewise

struct Pixel {
  int64_t n, h, w;
  int64_t r;  // mixed channel
};

// Element i of a mixed operand (N, oh, ow, c).
__device__ inline Pixel pixel_of(const Bypass& b, int64_t i) {
  const int64_t p = b.by_c.quotient(i), row = b.by_ow.quotient(p), n = b.by_oh.quotient(row);
  return {n, row - n * b.oh, p - row * b.ow, i - p * b.c};
}

// kGroups: k at compile time, with k neighbours moved as a vector, or 0.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Combine args,
                   const __grid_constant__ Bypass bypass, const T* rest) {
  using A = acc_type<T>;
  const A* coef = static_cast<const A*>(args.coef);
  const A* bias = static_cast<const A*>(args.bias);
  const int64_t k = kGroups ? kGroups : bypass.k, tile = int64_t{kUnroll} * kThreads;
  for (int64_t start = blockIdx.x * tile + threadIdx.x; start < plan.elements;
       start += gridDim.x * tile) {
    int64_t at[kUnroll];
    Pixel pixel[kUnroll];
    A sum[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      at[u] = start + u * kThreads < plan.elements ? start + u * kThreads : start;
      pixel[u] = pixel_of(bypass, at[u]);
      sum[u] = bias[pixel[u].r];
    }
    for (int first = 0; first < args.K; first += kBatch) {
      T x[kBatch][kUnroll];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= args.K) break;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          x[j][u] = static_cast<const T*>(args.xs[first + j])[at[u]];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= args.K) break;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          sum[u] += coef[(first + j) * plan.period + pixel[u].r] * to_acc(x[j][u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Pixel& o = pixel[u];
      T* y = static_cast<T*>(args.y) +
             at[u] * k;  // a place that repeats another writes the same once more
      if constexpr (kGroups > 0) {
        Vec<T, kGroups> out;
        out.v[0] = from_acc<T>(sum[u]);
#pragma unroll
        for (int q = 1; q < kGroups; ++q)
          out.v[q] = bypassed(bypass, rest, o.n, (q - 1) * bypass.c + o.r, o.h, o.w);
        *reinterpret_cast<Vec<T, kGroups>*>(y) = out;
      } else {
        y[0] = from_acc<T>(sum[u]);
        for (int64_t q = 1; q < k; ++q)
          y[q] = bypassed(bypass, rest, o.n, (q - 1) * bypass.c + o.r, o.h, o.w);
      }
    }
  }
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads)
    columns_backward_kernel(const __grid_constant__ Plan plan,
                            const __grid_constant__ Gradients args,
                            const __grid_constant__ Bypass bypass, const T* rest, T* drest) {
  using A = acc_type<T>;
  const A* a = static_cast<const A*>(args.a);
  const A* b = static_cast<const A*>(args.b);
  const A* c = static_cast<const A*>(args.c);
  const int64_t k = kGroups ? kGroups : bypass.k, step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < plan.elements; at += step) {
    const Pixel o = pixel_of(bypass, at);
    const T* source = static_cast<const T*>(args.g) + at * k;
    Vec<T, kGroups ? kGroups : 1> group;
    if constexpr (kGroups > 0)
      group = *reinterpret_cast<const Vec<T, kGroups>*>(source);
    else
      group.v[0] = source[0];
    const A g = to_acc(group.v[0]);
    for (int first = 0; first < args.K; first += kBatch) {
      // All loads of a batch before its first store: the compiler may not move a load over a store.
      T x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= args.K) break;
        if (args.xs[first + j] && args.dxs[first + j])
          x[j] = static_cast<const T*>(args.xs[first + j])[at];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= args.K) break;
        T* dx = static_cast<T*>(args.dxs[first + j]);
        if (!dx) continue;
        const int64_t entry = (first + j) * plan.period + o.r;
        A out = a[entry] * g;
        if (args.xs[first + j]) out += b[entry] * to_acc(x[j]) + c[entry];
        dx[at] = from_acc<T>(out);
      }
    }
#pragma unroll
    for (int64_t q = 1; q < (kGroups ? kGroups : k); ++q) {
      const T value = kGroups ? group.v[kGroups ? q : 0] : source[q];
      spread(bypass, rest, drest, value, o.n, (q - 1) * bypass.c + o.r, o.h, o.w);
    }
  }
}

// Elements of planes, V of them where planes are copied as they are.
template <typename T, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    planes_kernel(const __grid_constant__ Bypass b, Divider by_row, int64_t total, const T* rest,
                  const T* from, T* to) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t plane = by_row.quotient(i), within = (i - plane * by_row.d) * V;
    const int64_t n = b.by_channels.quotient(plane), j = plane - n * b.channels();
    const int64_t group = b.by_c.quotient(j), target = (j - group * b.c) * b.k + group + 1;
    const int64_t outside =
        (n * b.k * b.c + target) * b.oh * b.ow + within;  // in the output or its gradient
    if constexpr (V > 1) {
      const int64_t inside = offset(kBackward ? b.drest : b.rest, n, j, 0, 0) + within;
      *reinterpret_cast<Operand<T, V>*>(to + (kBackward ? inside : outside)) =
          load<T, V>(from + (kBackward ? outside : inside));
    } else {
      const int64_t h = b.by_ow.quotient(within), w = within - h * b.ow;
      if constexpr (kBackward)
        spread(b, rest, to, from[outside], n, j, h, w);
      else
        to[outside] = bypassed(b, from, n, j, h, w);
    }
  }
}

// Whether k neighbours may be moved as one vector.
bool groups_aligned(const void* p, int64_t k, size_t size) {
  return reinterpret_cast<uintptr_t>(p) % (static_cast<size_t>(k) * size) == 0;
}

// Calls f with k as a constant where it is a common one and g or y allows vectors of that many, else with 0.
template <typename T, typename F>
cudaError_t with_groups(int64_t k, const void* shuffled, F&& f) {
  const bool fits = groups_aligned(shuffled, k, sizeof(T)) && k * sizeof(T) <= 16;
  if constexpr (sizeof(T) <= 4) {
    if (fits && k == 4) return f(Int<4>{});
  }
  return fits && k == 2 ? f(Int<2>{}) : f(Int<0>{});
}

// Whether planes on the inner side may be copied in vectors of 16 bytes.
bool copies(const Bypass& b, const Strides& s, const void* inner, const void* outer, int64_t wide) {
  return !b.pooled() && s.w == 1 && s.h == b.W && b.H * b.W % wide == 0 && s.n % wide == 0 &&
         s.c % wide == 0 && aligned(inner) && aligned(outer);
}

template <typename T, bool kBackward>
cudaError_t launch_planes(const Bypass& b, const T* rest, const T* from, T* to,
                          cudaStream_t stream) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const int64_t planes = b.N * b.channels(), size = b.oh * b.ow;
  if (planes * size == 0) return cudaSuccess;
  const bool wide =
      kBackward ? copies(b, b.drest, to, from, kWide) : copies(b, b.rest, from, to, kWide);
  const int64_t row = wide ? size / kWide : size, total = planes * row;
  const auto kernel = wide ? planes_kernel<T, kWide, kBackward> : planes_kernel<T, 1, kBackward>;
  FASTNAS_LAUNCH(kernel, grid_for(ceil_div(total, kThreads)), kThreads, stream, b,
                 Divider(row, total), total, rest, from, to);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_partial_columns(const Plan& plan, const Combine& args, const Bypass& bypass,
                                   const void* rest, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_type(plan.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return with_groups<T>(bypass.k, args.y, [&](auto groups) {
      const auto kernel = columns_kernel<T, decltype(groups)::value>;
      const unsigned grid = grid_for(ceil_div(plan.elements, int64_t{kUnroll} * kThreads));
      FASTNAS_LAUNCH(kernel, grid, kThreads, stream, plan, args, bypass,
                     static_cast<const T*>(rest));
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_partial_columns_backward(const Plan& plan, const Gradients& args,
                                            const Bypass& bypass, const void* rest, void* drest,
                                            cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  return with_type(plan.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return with_groups<T>(bypass.k, args.g, [&](auto groups) {
      const auto kernel = columns_backward_kernel<T, decltype(groups)::value>;
      FASTNAS_LAUNCH(kernel, grid_for(ceil_div(plan.elements, kThreads)), kThreads, stream, plan,
                     args, bypass, static_cast<const T*>(rest), static_cast<T*>(drest));
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_bypass(Dtype dtype, const Bypass& bypass, const void* rest, void* y,
                          cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(rest);
    return launch_planes<T, false>(bypass, from, from, static_cast<T*>(y), stream);
  });
}

cudaError_t launch_bypass_backward(Dtype dtype, const Bypass& bypass, const void* grad,
                                   const void* rest, void* drest, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_planes<T, true>(bypass, static_cast<const T*>(rest), static_cast<const T*>(grad),
                                  static_cast<T*>(drest), stream);
  });
}

}  // namespace fastnas::cuda
