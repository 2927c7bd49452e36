// SPDX-License-Identifier: Apache-2.0
// Products over the channels of packed planes, a part of planes.inc.h. Sums of a block of pixels and vectors stay in
// registers; where channels fill vectors, one channel of a pixel is broadcast from memory.

// Lane l of the result is lane l / C * C + c of v: one channel for every image in the vector.
template <int C, int c, typename V, size_t... I>
inline V spread(V v, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (I / C * C + c)...);
#else
  using M = decltype(v < v);
  return __builtin_shuffle(v, M{(I / C * C + c)...});
#endif
}

// G vectors of channels by U pixels, whose sums stay in registers.
template <typename A, int G, int U>
inline void multiply_block(const A* x, int64_t x_group, const A* w, int64_t C, A* out,
                           int64_t out_group, int64_t step) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  typename Ln::V sum[G][U] = {};
  for (int64_t c = 0; c < C; c += L, x += x_group)
    for (int l = 0; l < L; ++l, w += L) {
      typename Ln::V weight[G];
      for (int q = 0; q < G; ++q) weight[q] = Ln::load(w + q * C * L);
      for (int u = 0; u < U; ++u) {
        const typename Ln::V v = broadcast<A>(x[u * L + l]);
        for (int q = 0; q < G; ++q) sum[q][u] += weight[q] * v;
      }
    }
  for (int q = 0; q < G; ++q)
    for (int u = 0; u < U; ++u) Ln::store(out + q * out_group + u * step, sum[q][u]);
}

// A pixel of several images in one vector.
template <typename A, int C, size_t... c>
inline typename Lane<A>::V multiply_within(const A* x, const A* w, std::index_sequence<c...>) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  const typename Ln::V v = Ln::load(x);
  typename Ln::V sum{};
  ((sum += Ln::load(w + c * L) * spread<C, c>(v, std::make_index_sequence<L>{})), ...);
  return sum;
}

// Calls f with C, a divisor of the lanes L of a vector.
template <int L, int kC = 1, typename F>
inline void with_channels(int64_t C, F&& f) {
  if constexpr (kC < L) {
    if (C == kC) return f(std::integral_constant<int, kC>{});
    with_channels<L, 2 * kC>(C, f);
  }
}

template <typename A, int C>
void multiply_narrow(const A* x, int64_t x_row, const A* w, A* out, int64_t out_row, int64_t step,
                     int64_t rows, int64_t n) {
  constexpr int L = Lane<A>::kLanes;
  for (int64_t r = 0; r < rows; ++r, x += x_row, out += out_row)
    for (int64_t i = 0; i < n; ++i)
      Lane<A>::store(out + i * step,
                     multiply_within<A, C>(x + i * L, w, std::make_index_sequence<C>{}));
}

template <typename A, int G>
void multiply_wide(const A* x, int64_t x_group, int64_t x_row, const A* w, int64_t C, A* out,
                   int64_t out_group, int64_t out_row, int64_t step, int64_t rows, int64_t n) {
  constexpr int L = Lane<A>::kLanes;
  constexpr int kMost = FASTNAS_VECTOR_BYTES == 64 ? 8 : 8 / G;  // what registers hold
  for (int64_t r = 0; r < rows; ++r, x += x_row, out += out_row) {
    const A* from = x;
    A* to = out;
    in_blocks(n, [&](auto width) {
      constexpr int U = decltype(width)::value, kPart = U < kMost ? U : kMost;
      for (int u = 0; u < U; u += kPart, from += kPart * L, to += kPart * step)
        multiply_block<A, G, kPart>(from, x_group, w, C, to, out_group, step);
    });
  }
}

template <typename A>
void multiply(const A* x, int64_t x_group, int64_t x_row, const A* w, int64_t C, int64_t outputs,
              A* out, int64_t out_group, int64_t out_row, int64_t step, int64_t rows, int64_t n) {
  constexpr int L = Lane<A>::kLanes;
  const auto narrow = [&](auto channels) {
    multiply_narrow<A, decltype(channels)::value>(x, x_row, w, out, out_row, step, rows, n);
  };
  if (C < L) return with_channels<L>(C, narrow);
  int64_t q = 0;
  for (; q + 2 <= outputs / L; q += 2)
    multiply_wide<A, 2>(x, x_group, x_row, w + q * C * L, C, out + q * out_group, out_group,
                        out_row, step, rows, n);
  if (q < outputs / L)
    multiply_wide<A, 1>(x, x_group, x_row, w + q * C * L, C, out + q * out_group, out_group,
                        out_row, step, rows, n);
}

template <typename A, int C, size_t... c>
void outer_narrow(const A* g, const A* x, A* sums, int64_t n, std::index_sequence<c...>) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  typename Ln::V sum[C];
  ((sum[c] = Ln::load(sums + c * L)), ...);
  for (int64_t i = 0; i < n * L; i += L) {
    const typename Ln::V gv = Ln::load(g + i), v = Ln::load(x + i);
    ((sum[c] += gv * spread<C, c>(v, std::make_index_sequence<L>{})), ...);
  }
  ((Ln::store(sums + c * L, sum[c])), ...);
}

template <typename A>
void outer(const A* g, int64_t g_group, int64_t outputs, const A* x, int64_t x_group, int64_t C,
           A* sums, int64_t n) {
  using Ln = Lane<A>;
  constexpr int L = Ln::kLanes;
  const auto narrow = [&](auto channels) {
    constexpr int kC = decltype(channels)::value;
    outer_narrow<A, kC>(g, x, sums, n, std::make_index_sequence<kC>{});
  };
  if (C < L) return with_channels<L>(C, narrow);
  for (int64_t q = 0; q < outputs / L; ++q, g += g_group)
    for (int64_t c = 0; c < C; c += L, sums += L * L) {
      const A* from = x + c / L * x_group;
      typename Ln::V sum[L];
      for (int l = 0; l < L; ++l) sum[l] = Ln::load(sums + l * L);
      for (int64_t i = 0; i < n * L; i += L) {
        const typename Ln::V gv = Ln::load(g + i);
        for (int l = 0; l < L; ++l) sum[l] += gv * broadcast<A>(from[i + l]);
      }
      for (int l = 0; l < L; ++l) Ln::store(sums + l * L, sum[l]);
    }
}
