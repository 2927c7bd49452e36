// SPDX-License-Identifier: Apache-2.0
// PC-DARTS' channel shuffle of pixels that are kept in two parts: with z the c mixed channels and then the (k - 1) c
// others, shuffled channel r k + q is z[q c + r]. The first c shuffled channels go to one tensor, the others to another.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastnas {

// Pixels of c and of (k - 1) c values, `mixed_pitch` and `rest_pitch` values from one to the next.
template <typename T>
struct Parts {
  T* mixed;
  T* rest;
  int64_t mixed_pitch, rest_pitch;
};

// Calls f(k, c) with those that loops know when they are compiled, or with zeros.
template <typename F>
void with_sizes(int64_t k, int64_t c, F&& f) {
  const auto with_channels = [&](auto groups) {
    if (c == 4) return f(groups, std::integral_constant<int, 4>{});
    if (c == 8) return f(groups, std::integral_constant<int, 8>{});
    if (c == 16) return f(groups, std::integral_constant<int, 16>{});
    f(groups, std::integral_constant<int, 0>{});
  };
  if (k == 4) return with_channels(std::integral_constant<int, 4>{});
  if (k == 2) return with_channels(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
}

template <typename T>
void shuffle(int64_t k, int64_t c, int64_t pixels, Parts<const T> from, Parts<T> to) {
  with_sizes(k, c, [&](auto groups, auto channels) {
    constexpr int64_t K = groups, C = channels;
    const T *mixed = from.mixed, *rest = from.rest;
    T *to_mixed = to.mixed, *to_rest = to.rest;
    for (int64_t p = 0; p < pixels; ++p) {
      if constexpr (C != 0) {
        T row[K * C];
        for (int64_t r = 0; r < C; ++r) {
          row[r * K] = mixed[r];
          for (int64_t q = 1; q < K; ++q) row[r * K + q] = rest[(q - 1) * C + r];
        }
        std::memcpy(static_cast<void*>(to_mixed), row, C * sizeof(T));
        std::memcpy(static_cast<void*>(to_rest), row + C, (K - 1) * C * sizeof(T));
      } else {
        for (int64_t r = 0, o = 0; r < c; ++r)
          for (int64_t q = 0; q < k; ++q, ++o)
            (o < c ? to_mixed[o] : to_rest[o - c]) = q ? rest[(q - 1) * c + r] : mixed[r];
      }
      mixed += from.mixed_pitch;
      rest += from.rest_pitch;
      to_mixed += to.mixed_pitch;
      to_rest += to.rest_pitch;
    }
  });
}

// The inverse.
template <typename T>
void unshuffle(int64_t k, int64_t c, int64_t pixels, Parts<const T> from, Parts<T> to) {
  with_sizes(k, c, [&](auto groups, auto channels) {
    constexpr int64_t K = groups, C = channels;
    const T *mixed = from.mixed, *rest = from.rest;
    T *to_mixed = to.mixed, *to_rest = to.rest;
    for (int64_t p = 0; p < pixels; ++p) {
      if constexpr (C != 0) {
        T row[K * C];
        std::memcpy(static_cast<void*>(row), mixed, C * sizeof(T));
        std::memcpy(static_cast<void*>(row + C), rest, (K - 1) * C * sizeof(T));
        for (int64_t r = 0; r < C; ++r) {
          to_mixed[r] = row[r * K];
          for (int64_t q = 1; q < K; ++q) to_rest[(q - 1) * C + r] = row[r * K + q];
        }
      } else {
        for (int64_t r = 0, o = 0; r < c; ++r)
          for (int64_t q = 0; q < k; ++q, ++o)
            (q ? to_rest[(q - 1) * c + r] : to_mixed[r]) = o < c ? mixed[o] : rest[o - c];
      }
      mixed += from.mixed_pitch;
      rest += from.rest_pitch;
      to_mixed += to.mixed_pitch;
      to_rest += to.rest_pitch;
    }
  });
}

}  // namespace fastnas
