// SPDX-License-Identifier: Apache-2.0
// One element of the bypass, forward and backward.
#pragma once
#include "partial_channel_mix.h"
#include "vec.cuh"

namespace fastnas::cuda {

__device__ inline int64_t offset(const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

// Which of a 2x2 window max_pool2d picks: the first largest, or the last NaN. Its row is the result / 2.
template <typename T>
__device__ inline int largest(const T* window, const Strides& s) {
  int best = 0;
  acc_type<T> top = to_acc(window[0]);
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    const acc_type<T> v = to_acc(window[i / 2 * s.h + i % 2 * s.w]);
    if (v > top || v != v) {
      top = v;
      best = i;
    }
  }
  return best;
}

// What goes to pixel (h, w) of the output from channel j of rest.
template <typename T>
__device__ inline T bypassed(const Bypass& b, const T* rest, int64_t n, int64_t j, int64_t h,
                             int64_t w) {
  if (!b.pooled()) return rest[offset(b.rest, n, j, h, w)];
  const T* window = rest + offset(b.rest, n, j, 2 * h, 2 * w);
  const int i = largest(window, b.rest);
  return window[i / 2 * b.rest.h + i % 2 * b.rest.w];
}

// The gradient g of that pixel, and zeros for the other elements of drest that are this pixel's to write: the rest of
// its window, and what an odd size leaves beyond the last windows.
template <typename T>
__device__ inline void spread(const Bypass& b, const T* rest, T* drest, T g, int64_t n, int64_t j,
                              int64_t h, int64_t w) {
  if (!b.pooled()) {
    drest[offset(b.drest, n, j, h, w)] = g;
    return;
  }
  const int best = largest(rest + offset(b.rest, n, j, 2 * h, 2 * w), b.rest);
  const int rows = static_cast<int>(h == b.oh - 1 ? b.H - 2 * h : 2),
            columns = static_cast<int>(w == b.ow - 1 ? b.W - 2 * w : 2);
  T* window = drest + offset(b.drest, n, j, 2 * h, 2 * w);
  for (int y = 0; y < rows; ++y)
    for (int x = 0; x < columns; ++x) {
      const bool here = y < 2 && x < 2 && y * 2 + x == best;
      window[y * b.drest.h + x * b.drest.w] = here ? g : from_acc<T>(0);
    }
}

}  // namespace fastnas::cuda
