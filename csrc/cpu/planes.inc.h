// SPDX-License-Identifier: Apache-2.0
// Bodies of planes.h for one instruction set. Bound by multiply-adds: every operand of one is an aligned load from the
// first-level cache, and blocks of pixels (or of taps) keep their sums in registers.

// Calls block(width) for widths of 8, 4, 2 and 1 that make up n.
template <typename F>
inline void in_blocks(int64_t n, F&& block) {
  for (; n >= 8; n -= 8) block(std::integral_constant<int, 8>{});
  if (n & 4) block(std::integral_constant<int, 4>{});
  if (n & 2) block(std::integral_constant<int, 2>{});
  if (n & 1) block(std::integral_constant<int, 1>{});
}

// --- convolutions

template <typename A, int S, int U>
inline void convolve_block(const A* x, const int64_t* offsets, const A* w, int64_t taps, A* out,
                           int64_t step, bool add) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  typename Ln::V sum[U];
  for (int u = 0; u < U; ++u) sum[u] = add ? Ln::load(out + u * step) : typename Ln::V{};
  for (int64_t t = 0; t < taps; ++t) {
    const typename Ln::V weight = Ln::load(w + t * L);
    const A* p = x + offsets[t];
    for (int u = 0; u < U; ++u) sum[u] += weight * Ln::load(p + u * S * L);
  }
  for (int u = 0; u < U; ++u) Ln::store(out + u * step, sum[u]);
}

template <typename A, int S>
void convolve(const A* x, int64_t x_row, const int64_t* offsets, const A* w, int64_t taps, A* out,
              int64_t out_row, int64_t step, int64_t rows, int64_t n, bool add) {
  constexpr int L = Lane<A>::kLanes;
  for (int64_t r = 0; r < rows; ++r, x += x_row, out += out_row) {
    const A* from = x;
    A* to = out;
    in_blocks(n, [&](auto width) {
      constexpr int U = decltype(width)::value;
      convolve_block<A, S, U>(from, offsets, w, taps, to, step, add);
      from += U * S * L;
      to += U * step;
    });
  }
}

template <typename A, int S, int U>
inline void correlate_block(const A* g, int64_t g_row, const A* x, int64_t x_row,
                            const int64_t* offsets, A* sums, int64_t rows, int64_t n) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  typename Ln::V sum[U];
  for (int u = 0; u < U; ++u) sum[u] = Ln::load(sums + u * L);
  for (int64_t r = 0; r < rows; ++r, g += g_row, x += x_row) {
    const A* p[U];
    for (int u = 0; u < U; ++u) p[u] = x + offsets[u];
    for (int64_t i = 0; i < n * L; i += L) {
      const typename Ln::V gv = Ln::load(g + i);
      for (int u = 0; u < U; ++u) sum[u] += gv * Ln::load(p[u] + i * S);
    }
  }
  for (int u = 0; u < U; ++u) Ln::store(sums + u * L, sum[u]);
}

template <typename A, int S>
void correlate(const A* g, int64_t g_row, const A* x, int64_t x_row, const int64_t* offsets,
               int64_t taps, A* sums, int64_t rows, int64_t n) {
  constexpr int L = Lane<A>::kLanes;
  const auto block = [&](auto width) {
    constexpr int U = decltype(width)::value;
    correlate_block<A, S, U>(g, g_row, x, x_row, offsets, sums, rows, n);
    offsets += U;
    sums += U * L;
    taps -= U;
  };
  while (taps >= 9) block(std::integral_constant<int, 9>{});
  if (taps >= 8) block(std::integral_constant<int, 8>{});
  if (taps >= 4) block(std::integral_constant<int, 4>{});
  if (taps >= 2) block(std::integral_constant<int, 2>{});
  if (taps >= 1) block(std::integral_constant<int, 1>{});
}

template <typename A>
void normalise(A* x, int64_t x_row, int64_t rows, int64_t n, const A* scale, const A* shift) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  const V a = Ln::load(scale), b = Ln::load(shift);
  for (int64_t r = 0; r < rows; ++r, x += x_row)
    for (int64_t i = 0; i < n * Ln::kLanes; i += Ln::kLanes) {
      const V v = a * Ln::load(x + i) + b;
      Ln::store(x + i, v <= V{} ? V{} : v);  // NaN stays
    }
}

template <typename A>
void mask(A* dx, const A* x, int64_t x_row, int64_t rows, int64_t n) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  for (int64_t r = 0; r < rows; ++r, x += x_row)
    for (int64_t i = 0; i < n; ++i, dx += Ln::kLanes) {
      const V v = Ln::load(dx);
      Ln::store(dx, Ln::load(x + i * Ln::kLanes) <= V{} ? V{} : v);
    }
}

// --- transposition: L vectors of one plane each <-> L pixels

template <int H, typename V, size_t... I>
inline void exchange(V& a, V& b, std::index_sequence<I...>) {
  constexpr int L = sizeof...(I);
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, ((I & H) ? L + I - H : I)...);
  b = __builtin_shufflevector(a, b, ((I & H) ? L + I : I + H)...);
#else
  using M = decltype(a < b);
  const V low = __builtin_shuffle(a, b, M{((I & H) ? L + I - H : I)...});
  b = __builtin_shuffle(a, b, M{((I & H) ? L + I : I + H)...});
#endif
  a = low;
}

template <typename A, int H = Lane<A>::kLanes / 2>
inline void transpose(typename Lane<A>::V (&v)[Lane<A>::kLanes]) {
  constexpr int L = Lane<A>::kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & H)) exchange<H>(v[i], v[i + H], std::make_index_sequence<L>{});
  if constexpr (H > 1) transpose<A, H / 2>(v);
}

template <typename V>
inline V rectified(V v, bool relu) {
  return relu ? (v <= V{} ? V{} : v) : v;  // NaN stays
}

// --- planes

template <typename T, bool kWhole>
inline void load_tile(const T* x, int64_t plane_size, int64_t count, int64_t n,
                      typename Lane<T>::V (&v)[Lane<T>::kLanes]) {
#pragma GCC unroll 16
  for (int l = 0; l < Lane<T>::kLanes; ++l) {
    if constexpr (kWhole)
      v[l] = Lane<T>::load(x + l * plane_size);
    else
      v[l] = l < count ? load_first(x + l * plane_size, n) : typename Lane<T>::V{};
  }
  transpose<acc_type<T>>(v);
}

template <typename T>
void pack_planes(const Planes& s, const T* x, int64_t plane, int64_t row0, int64_t rows,
                 acc_type<T>* to, int64_t pitch, bool relu) {
  using A = Lane<acc_type<T>>;
  constexpr int L = A::kLanes;
  const int64_t size = s.H * s.W, total = rows * s.W;
  const int64_t count = s.planes - plane < L ? s.planes - plane : L;
  const int64_t gap = (pitch - s.W) * L;
  x += plane * size + row0 * s.W;
  int64_t column = 0;
  for (int64_t i = 0; i < total; i += L) {
    typename A::V v[L];
    const int64_t n = total - i < L ? total - i : L;
    if (n == L && count == L) {
      load_tile<T, true>(x + i, size, count, n, v);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) {
        A::store(to, rectified(v[k], relu));
        to += L;
        if (++column == s.W) {
          column = 0;
          to += gap;
        }
      }
    } else {
      load_tile<T, false>(x + i, size, count, n, v);
      for (int64_t k = 0; k < n; ++k) {
        A::store(to, rectified(v[k], relu));
        to += L;
        if (++column == s.W) {
          column = 0;
          to += gap;
        }
      }
    }
  }
}

template <typename T>
void unpack_planes(const Planes& s, const acc_type<T>* from, int64_t plane, int64_t row0,
                   int64_t rows, T* y) {
  using A = Lane<acc_type<T>>;
  constexpr int L = A::kLanes;
  const int64_t size = s.H * s.W, total = rows * s.W;
  const int64_t count = s.planes - plane < L ? s.planes - plane : L;
  y += plane * size + row0 * s.W;
  for (int64_t i = 0; i < total; i += L) {
    typename A::V v[L];
    const int64_t n = total - i < L ? total - i : L;
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) v[k] = k < n ? A::load(from + (i + k) * L) : typename A::V{};
    transpose<acc_type<T>>(v);
    if (n == L && count == L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) Lane<T>::store(y + l * size + i, v[l]);
    } else {
      for (int64_t l = 0; l < count; ++l) store_first(y + l * size + i, v[l], n);
    }
  }
}

// --- columns: lanes come and go in pieces of P neighbouring channels

template <typename T, int P>
void pack_columns(const Planes& s, const T* x, int64_t plane, int64_t row0, int64_t rows,
                  acc_type<T>* to, int64_t pitch, bool relu, T* scratch) {
  using A = Lane<acc_type<T>>;
  constexpr int L = A::kLanes;
  const int64_t count = s.planes - plane < L ? s.planes - plane : L;
  if (count < L) __builtin_memset(static_cast<void*>(scratch), 0, s.W * L * sizeof(T));
  for (int64_t r = 0; r < rows; ++r, to += pitch * L) {
    const T* row = scratch;
    int64_t step = L;
    if constexpr (P == L) {
      const int64_t n = plane / s.C;
      row = x + (n * s.H + row0 + r) * s.W * s.C + plane - n * s.C;
      step = s.C;
    } else {
      for (int64_t l = 0; l < count; l += P) {
        const int64_t n = (plane + l) / s.C, c = plane + l - n * s.C;
        const T* p = x + (n * s.H + row0 + r) * s.W * s.C + c;
        for (int64_t i = 0; i < s.W; ++i)
          __builtin_memcpy(scratch + i * L + l, p + i * s.C, P * sizeof(T));
      }
    }
    for (int64_t i = 0; i < s.W; ++i)
      A::store(to + i * L, rectified(Lane<T>::load(row + i * step), relu));
  }
}

template <typename T, int P>
void unpack_columns(const Planes& s, const acc_type<T>* from, int64_t plane, int64_t row0,
                    int64_t rows, T* y, T* scratch) {
  using A = Lane<acc_type<T>>;
  constexpr int L = A::kLanes;
  const int64_t pixels = rows * s.W;
  const int64_t count = s.planes - plane < L ? s.planes - plane : L;
  if constexpr (P == L) {
    const int64_t n = plane / s.C;
    y += (n * s.H + row0) * s.W * s.C + plane - n * s.C;
    for (int64_t i = 0; i < pixels; ++i) Lane<T>::store(y + i * s.C, A::load(from + i * L));
  } else {
    for (int64_t i = 0; i < pixels; ++i) Lane<T>::store(scratch + i * L, A::load(from + i * L));
    for (int64_t l = 0; l < count; l += P) {
      const int64_t n = (plane + l) / s.C, c = plane + l - n * s.C;
      T* p = y + (n * s.H + row0) * s.W * s.C + c;
      for (int64_t i = 0; i < pixels; ++i)
        __builtin_memcpy(static_cast<void*>(p + i * s.C), scratch + i * L + l, P * sizeof(T));
    }
  }
}

template <typename T>
void pack(const Planes& s, const T* x, int64_t plane, int64_t row0, int64_t rows, acc_type<T>* to,
          int64_t pitch, bool relu, T* scratch) {
  constexpr int L = Lane<T>::kLanes;
  if (!s.columns) return pack_planes(s, x, plane, row0, rows, to, pitch, relu);
  const auto run = [&](auto kernel) { kernel(s, x, plane, row0, rows, to, pitch, relu, scratch); };
  if (s.C % L == 0) return run(pack_columns<T, L>);
  if (L > 8 && s.C % 8 == 0) return run(pack_columns<T, 8>);
  if (L > 4 && s.C % 4 == 0) return run(pack_columns<T, 4>);
  run(pack_columns<T, 1>);
}

// n pixels of g and y that are `step` elements apart.
template <typename T>
inline void carry(const T* g, const T* y, int64_t step, int64_t n, acc_type<T>* to,
                  const acc_type<T>* carried) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  constexpr int L = A::kLanes;
  const typename A::V a = A::load(carried), b = A::load(carried + L);
  const typename A::V centre = A::load(carried + 2 * L), c = A::load(carried + 3 * L);
  for (int64_t i = 0; i < n; ++i, g += step, y += step, to += L)
    A::store(to, a * Ln::load(g) + (b * (Ln::load(y) - centre) + c));
}

template <typename T>
void pack_carried(const Planes& s, const T* g, const T* y, int64_t plane, int64_t row0,
                  int64_t rows, acc_type<T>* to, const acc_type<T>* carried, acc_type<T>* buffer,
                  T* scratch) {
  using A = acc_type<T>;
  constexpr int L = Lane<T>::kLanes;
  if (s.columns && s.C % L == 0) {  // a pixel is a vector in memory
    const int64_t n = plane / s.C, from = (n * s.H + row0) * s.W * s.C + plane - n * s.C;
    return carry<T>(g + from, y + from, s.C, rows * s.W, to, carried);
  }
  pack<T>(s, g, plane, row0, rows, to, s.W, false, scratch);
  pack<T>(s, y, plane, row0, rows, buffer, s.W, false, scratch);
  carry<A>(to, buffer, L, rows * s.W, to, carried);
}

template <typename T>
void unpack(const Planes& s, const acc_type<T>* from, int64_t plane, int64_t row0, int64_t rows,
            T* y, T* scratch) {
  constexpr int L = Lane<T>::kLanes;
  if (!s.columns) return unpack_planes(s, from, plane, row0, rows, y);
  const auto run = [&](auto kernel) { kernel(s, from, plane, row0, rows, y, scratch); };
  if (s.C % L == 0) return run(unpack_columns<T, L>);
  if (L > 8 && s.C % 8 == 0) return run(unpack_columns<T, 8>);
  if (L > 4 && s.C % 4 == 0) return run(unpack_columns<T, 4>);
  run(unpack_columns<T, 1>);
}

#include "products.inc.h"

template <typename T>
constexpr PlaneKernels<T> kPlaneKernels = {
    Lane<T>::kLanes,
    pack<T>,
    pack_carried<T>,
    unpack<T>,
    {convolve<acc_type<T>, 1>, convolve<acc_type<T>, 2>},
    {correlate<acc_type<T>, 1>, correlate<acc_type<T>, 2>},
    normalise<acc_type<T>>,
    multiply<acc_type<T>>,
    outer<acc_type<T>>,
    mask<acc_type<T>>,
};
