// SPDX-License-Identifier: Apache-2.0
// The channels of PC-DARTS' mixed op that no candidate sees: copied, or pooled 2x2, into their shuffled places.
// Bypassed channel j = (q - 1) c + r of rest is channel r k + q of the output, q = 1 .. k - 1, r = 0 .. c - 1.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "mix.h"

namespace fastnas {

struct Bypass {
  int64_t N, c, k;         // batch, processed channels, groups
  int64_t H, W;            // of rest
  int64_t oh, ow;          // of the output: H x W, or half of each, rounded down
  int64_t sn, sc, sh, sw;  // strides of rest in elements

  bool pooled() const { return oh != H || ow != W; }
  int64_t channels() const { return (k - 1) * c; }
  int64_t target(int64_t j) const { return j % c * k + j / c + 1; }
};

// Which of a 2x2 window max_pool2d picks: the first largest, or the last NaN. Its row is the result / 2.
template <typename T>
inline int64_t largest(const T* p, int64_t sh, int64_t sw) {
  const acc_type<T> v[4] = {to_acc(p[0]), to_acc(p[sw]), to_acc(p[sh]), to_acc(p[sh + sw])};
  if (__builtin_expect((v[0] != v[0]) | (v[1] != v[1]) | (v[2] != v[2]) | (v[3] != v[3]), 0)) {
    int64_t last = 3;
    while (v[last] == v[last]) --last;
    return last;
  }
  // No branches: which of four values wins cannot be predicted.
  const acc_type<T> above = v[1] > v[0] ? v[1] : v[0], below = v[3] > v[2] ? v[3] : v[2];
  const int64_t right = v[1] > v[0], right_below = v[3] > v[2], lower = below > above;
  return 2 * lower + (lower & right_below) + ((1 - lower) & right);
}

template <typename T>
inline T pool(const Bypass& b, const T* p) {
  const int64_t i = largest(p, b.sh, b.sw);
  return p[i / 2 * b.sh + i % 2 * b.sw];
}

template <typename T, typename F>
void for_each_plane(const Bypass& b, F&& f) {
  const int64_t planes = b.N * b.channels();
  const int64_t grain = std::max<int64_t>(2 * kTaskElements / std::max<int64_t>(b.H * b.W, 1), 1);
  parallel_tasks(planes, grain, [&](Tasks::Worker& worker) {
    for (int64_t i; worker.next(i);) f(i / b.channels(), i % b.channels());
  });
}

// out (N, k c, oh, ow) contiguous.
template <typename T>
void bypass_planes(const Bypass& b, const T* rest, T* out) {
  for_each_plane<T>(b, [&](int64_t n, int64_t j) {
    const T* x = rest + n * b.sn + j * b.sc;
    T* y = out + (n * b.k * b.c + b.target(j)) * b.oh * b.ow;
    for (int64_t h = 0; h < b.oh; ++h, y += b.ow) {
      if (b.pooled()) {
        const T* row = x + 2 * h * b.sh;
        for (int64_t w = 0; w < b.ow; ++w) y[w] = pool(b, row + 2 * w * b.sw);
      } else if (b.sw == 1) {
        std::memcpy(static_cast<void*>(y), x + h * b.sh, b.ow * sizeof(T));
      } else {
        for (int64_t w = 0; w < b.ow; ++w) y[w] = x[h * b.sh + w * b.sw];
      }
    }
  });
}

// Calls f(pooled, groups, distance) with what the loops over the channels of a pixel know when they are compiled: whether
// windows are pooled, k (0: any), and how far apart the channels of rest are (0: any).
template <typename F>
void with_bypass(const Bypass& b, bool dense, F&& f) {
  const auto with_groups = [&](auto pooled, auto distance) {
    if (b.k == 4) return f(pooled, std::integral_constant<int, 4>{}, distance);
    if (b.k == 2) return f(pooled, std::integral_constant<int, 2>{}, distance);
    f(pooled, std::integral_constant<int, 0>{}, distance);
  };
  const auto with_distance = [&](auto pooled) {
    if (dense) return with_groups(pooled, std::integral_constant<int, 1>{});
    with_groups(pooled, std::integral_constant<int, 0>{});
  };
  if (b.pooled()) return with_distance(std::true_type{});
  with_distance(std::false_type{});
}

// Output pixels [first, last), counted over the batch; out (N, oh, ow, k c) dense, channels innermost.
template <typename T>
void bypass_columns(const Bypass& b, const T* rest, T* out, int64_t first, int64_t last) {
  with_bypass(b, b.sc == 1, [&](auto pooled, auto groups, auto distance) {
    const int64_t k = groups ? groups : b.k, c = b.c, sc = distance ? distance : b.sc;
    const int64_t step = pooled ? 2 : 1;
    int64_t n = first / (b.oh * b.ow), h = first / b.ow % b.oh, w = first % b.ow;
    T* __restrict y = out + first * k * c;
    for (int64_t p = first; p < last; ++p) {
      const T* x = rest + n * b.sn + step * (h * b.sh + w * b.sw);
      for (int64_t r = 0; r < c; ++r, x += sc, y += k)
        for (int64_t q = 1; q < k; ++q) {
          const T* from = x + (q - 1) * c * sc;
          if constexpr (pooled)
            y[q] = pool(b, from);
          else
            y[q] = *from;
        }
      if (++w < b.ow) continue;
      w = 0;
      if (++h < b.oh) continue;
      h = 0;
      ++n;
    }
  });
}

// drest (N, (k - 1) c, H, W) contiguous from grad (N, k c, oh, ow) contiguous; rest is read only to pool.
template <typename T>
void bypass_planes_backward(const Bypass& b, const T* grad, const T* rest, T* drest) {
  for_each_plane<T>(b, [&](int64_t n, int64_t j) {
    const T* g = grad + (n * b.k * b.c + b.target(j)) * b.oh * b.ow;
    T* d = drest + (n * b.channels() + j) * b.H * b.W;
    if (!b.pooled()) {
      std::memcpy(static_cast<void*>(d), g, b.H * b.W * sizeof(T));
      return;
    }
    std::memset(static_cast<void*>(d), 0, b.H * b.W * sizeof(T));
    const T* x = rest + n * b.sn + j * b.sc;
    for (int64_t h = 0; h < b.oh; ++h)
      for (int64_t w = 0; w < b.ow; ++w) {
        const int64_t i = largest(x + 2 * h * b.sh + 2 * w * b.sw, b.sh, b.sw);
        d[(2 * h + i / 2) * b.W + 2 * w + i % 2] = g[h * b.ow + w];
      }
  });
}

// The same for grad (N, oh, ow, k c) and drest (N, H, W, (k - 1) c), channels innermost.
template <typename T>
void bypass_columns_backward(const Bypass& b, const T* grad, const T* rest, T* drest) {
  const int64_t C = b.k * b.c, R = b.channels();
  const int64_t grain = std::max<int64_t>(2 * kTaskElements / std::max<int64_t>(b.W * C, 1), 1);
  // A unit is a pair of rows of rest: no two write the same pixel.
  const int64_t step = b.pooled() ? 2 : 1, units = (b.H + step - 1) / step;
  parallel_tasks(b.N * units, grain, [&](Tasks::Worker& worker) {
    for (int64_t u; worker.next(u);) {
      const int64_t n = u / units, h = u % units, rows = std::min(step, b.H - h * step);
      T* d = drest + (n * b.H + h * step) * b.W * R;
      if (b.pooled()) std::memset(static_cast<void*>(d), 0, rows * b.W * R * sizeof(T));
      if (h >= b.oh) continue;
      const T* g = grad + (n * b.oh + h) * b.ow * C;
      const T* x = b.pooled() ? rest + n * b.sn + 2 * h * b.sh : nullptr;
      with_bypass(b, b.sc == 1, [&](auto pooled, auto groups, auto distance) {
        const int64_t k = groups ? groups : b.k, c = b.c, sc = distance ? distance : b.sc;
        for (int64_t w = 0; w < b.ow; ++w)
          for (int64_t r = 0; r < c; ++r, g += k)
            for (int64_t q = 1; q < k; ++q) {
              const int64_t j = (q - 1) * c + r;
              if constexpr (pooled) {
                const int64_t i = largest(x + 2 * w * b.sw + j * sc, b.sh, b.sw);
                d[(i / 2 * b.W + 2 * w + i % 2) * R + j] = g[q];
              } else {
                d[w * R + j] = g[q];
              }
            }
      });
    }
  });
}

}  // namespace fastnas
