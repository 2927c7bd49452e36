// SPDX-License-Identifier: Apache-2.0
// Bodies of range.h for one instruction set. Memory-bound by design: every operand is read once. A few operands at a
// time are read through a chunk that what they are added to or multiplied by stays in the first-level cache for: dozens
// of streams side by side are more than a processor fetches ahead of.

constexpr int kRows = 4;
constexpr int64_t kChunkElements = 1024;

// Elements ahead of those at hand that lines are asked for where a processor does not think of it by itself, or not in
// time: the next page, more streams than it follows, and what is to be written.
constexpr int64_t kAhead = 1024;

template <typename T>
inline void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Whole tables of L that a chunk has, of those that n elements have.
inline int64_t chunk_of(int64_t n, int64_t L) {
  const int64_t most = kChunkElements / L > 1 ? kChunkElements / L : 1, whole = n / L;
  return (most < whole ? most : whole) * L;
}

// to = from + sum of G operands over R tables of L; from repeats itself if it is a table.
template <typename T, int G, int R, typename From, typename To>
inline void combine_rows(const T* const* xs, int64_t at, const From* from, int64_t from_row, To* to,
                         const acc_type<T>* coef, int64_t L, const T* const* next) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = from ? Lane<From>::load(from + v + r * from_row) : V{};
    for (int k = 0; k < G; ++k) {
      const V a = A::load(coef + k * L + v);
      const T* x = xs[k] + at + v;
      for (int r = 0; r < R; ++r) fetch(next[k] + at + v + r * L);
      for (int r = 0; r < R; ++r) sum[r] += a * Ln::load(x + r * L);
    }
    for (int r = 0; r < R; ++r) fetch(to + v + r * L + kAhead);
    for (int r = 0; r < R; ++r) Lane<To>::store(to + v + r * L, sum[r]);
  }
}

template <typename T, int G, typename From, typename To>
inline void combine_chunk(const T* const* xs, int64_t at, int64_t n, const From* from,
                          int64_t from_row, To* to, const acc_type<T>* coef, int64_t L,
                          const T* const* next) {
  int64_t i = 0;
  for (; n - i >= kRows * L; i += kRows * L, from += from ? kRows * from_row : 0)
    combine_rows<T, G, kRows>(xs, at + i, from, from_row, to + i, coef, L, next);
  for (; n - i >= L; i += L, from += from ? from_row : 0)
    combine_rows<T, G, 1>(xs, at + i, from, from_row, to + i, coef, L, next);
}

// The last operands of a chunk, at most kRows, whose sum goes to y.
template <typename T, typename From>
inline void combine_last(int64_t K, const T* const* xs, int64_t at, int64_t n, const From* from,
                         int64_t from_row, T* y, const acc_type<T>* coef, int64_t L,
                         const T* const* next) {
  if (K == 1) return combine_chunk<T, 1>(xs, at, n, from, from_row, y, coef, L, next);
  if (K == 2) return combine_chunk<T, 2>(xs, at, n, from, from_row, y, coef, L, next);
  if (K == 3) return combine_chunk<T, 3>(xs, at, n, from, from_row, y, coef, L, next);
  combine_chunk<T, 4>(xs, at, n, from, from_row, y, coef, L, next);
}

template <typename T>
void combine(const T* const* xs, int64_t K, T* y, int64_t n, const acc_type<T>* coef,
             const acc_type<T>* bias, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  int64_t at = 0;
  // Longer tables than a chunk leave no room for sums on the way: all operands at once.
  const int64_t group = L <= kChunkElements ? kRows : K;
  while (n - at >= L) {
    const int64_t m = chunk_of(n - at, L);
    const T* ahead[kRows];  // operands that come after those being read
    const auto next = [&](int64_t k) {
      for (int64_t i = 0; i < kRows; ++i)
        ahead[i] = k + kRows + i < K ? xs[k + kRows + i] : xs[i < K ? i : 0] + m;
      return ahead;
    };
    if (group < K) {
      alignas(64) acc_type<T> sums[kChunkElements];
      combine_chunk<T, kRows>(xs, at, m, bias, 0, sums, coef, L, next(0));
      int64_t k = kRows;
      for (; K - k > kRows; k += kRows)
        combine_chunk<T, kRows>(xs + k, at, m, sums, L, sums, coef + k * L, L, next(k));
      combine_last(K - k, xs + k, at, m, sums, L, y + at, coef + k * L, L, next(k));
    } else if (K <= kRows) {
      combine_last(K, xs, at, m, bias, 0, y + at, coef, L, next(0));
    } else {
      for (int64_t v = 0; v < m; v += Ln::kLanes) {
        typename Ln::V sum{};
        if (bias) sum = A::load(bias + v);
        for (int64_t k = 0; k < K; ++k) sum += A::load(coef + k * L + v) * Ln::load(xs[k] + at + v);
        Ln::store(y + at + v, sum);
      }
    }
    at += m;
  }
  for (int64_t v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    typename Ln::V sum{};
    if (bias) sum = A::load(bias + v);
    for (int64_t k = 0; k < K; ++k) sum += A::load(coef + k * L + v) * load_first(xs[k] + at, m);
    store_first(y + at, sum, m);
  }
}

template <typename T, int R>
inline void sum_rows(const T* x, acc_type<T>* sums, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    typename Ln::V s = Ln::load(x + v);
    for (int r = 1; r < R; ++r) s += Ln::load(x + v + r * L);
    A::store(sums + v, A::load(sums + v) + s);
  }
}

template <typename T, int R>
inline void dot_rows(const T* g, const T* x, const T* next, const acc_type<T>* centre,
                     acc_type<T>* dots, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    for (int r = 0; r < R; ++r) fetch(next + v + r * L);
    const V m = centre ? A::load(centre + v) : V{};
    V d = Ln::load(g + v) * (Ln::load(x + v) - m);
    for (int r = 1; r < R; ++r) d += Ln::load(g + v + r * L) * (Ln::load(x + v + r * L) - m);
    A::store(dots + v, A::load(dots + v) + d);
  }
}

template <typename T>
void reduce(const T* g, const T* const* xs, int64_t K, int64_t n, const acc_type<T>* centre,
            acc_type<T>* sums, acc_type<T>* dots, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  int64_t at = 0;
  while (n - at >= L) {
    const int64_t end = at + chunk_of(n - at, L);
    const auto next = [&](int64_t k) {
      if (k + 1 < K && xs[k + 1]) return xs[k + 1];
      return xs[k] ? xs[k] + (end - at) : g;
    };
    for (int64_t k = sums ? -1 : 0; k < K; ++k) {
      if (k >= 0 && !xs[k]) continue;
      const auto rows = [&](auto count, int64_t i) {
        constexpr int R = decltype(count)::value;
        if (k < 0) return sum_rows<T, R>(g + i, sums, L);
        dot_rows<T, R>(g + i, xs[k] + i, next(k) + i, centre ? centre + k * L : nullptr,
                       dots + k * L, L);
      };
      int64_t i = at;
      for (; end - i >= kRows * L; i += kRows * L) rows(std::integral_constant<int, kRows>{}, i);
      for (; end - i >= L; i += L) rows(std::integral_constant<int, 1>{}, i);
    }
    at = end;
  }
  for (int64_t v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    const V gv = load_first(g + at, m);  // zero past the end, so those lanes add nothing
    if (sums) A::store(sums + v, A::load(sums + v) + gv);
    for (int64_t k = 0; k < K; ++k) {
      if (!xs[k]) continue;
      const V mean = centre ? A::load(centre + k * L + v) : V{};
      A::store(dots + k * L + v,
               A::load(dots + k * L + v) + gv * (load_first(xs[k] + at, m) - mean));
    }
  }
}

// x may be null: dx = a g.
template <typename T, int R>
inline void gradient_rows(const T* g, const T* x, const T* next, T* dx, const acc_type<T>* a,
                          const acc_type<T>* b, const acc_type<T>* c, const acc_type<T>* centre,
                          int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    const V av = A::load(a + v);
    for (int r = 0; r < R; ++r) fetch(dx + v + r * L + kAhead);
    if (x) {
      for (int r = 0; r < R; ++r) fetch(next + v + r * L);
      const V bv = A::load(b + v), cv = A::load(c + v), m = A::load(centre + v);
      for (int r = 0; r < R; ++r)
        Ln::store(dx + v + r * L,
                  av * Ln::load(g + v + r * L) + (bv * (Ln::load(x + v + r * L) - m) + cv));
    } else {
      for (int r = 0; r < R; ++r) Ln::store(dx + v + r * L, av * Ln::load(g + v + r * L));
    }
  }
}

template <typename T>
void gradients(const T* g, const T* const* xs, T* const* dxs, int64_t K, int64_t n,
               const acc_type<T>* a, const acc_type<T>* b, const acc_type<T>* c,
               const acc_type<T>* centre, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  int64_t at = 0;
  while (n - at >= L) {
    const int64_t end = at + chunk_of(n - at, L);
    const auto next = [&](int64_t k) {
      if (k + 1 < K && xs[k + 1]) return xs[k + 1];
      return xs[k] ? xs[k] + (end - at) : g;
    };
    for (int64_t k = 0; k < K; ++k) {
      if (!dxs[k]) continue;
      const auto rows = [&](auto count, int64_t i) {
        constexpr int R = decltype(count)::value;
        gradient_rows<T, R>(g + i, xs[k] ? xs[k] + i : nullptr, next(k) + i, dxs[k] + i, a + k * L,
                            b + k * L, c + k * L, centre + k * L, L);
      };
      int64_t i = at;
      for (; end - i >= kRows * L; i += kRows * L) rows(std::integral_constant<int, kRows>{}, i);
      for (; end - i >= L; i += L) rows(std::integral_constant<int, 1>{}, i);
    }
    at = end;
  }
  for (int64_t v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    const V gv = load_first(g + at, m);
    for (int64_t k = 0; k < K; ++k) {
      if (!dxs[k]) continue;
      V out = A::load(a + k * L + v) * gv;
      if (xs[k]) {
        const V x = load_first(xs[k] + at, m) - A::load(centre + k * L + v);
        out += A::load(b + k * L + v) * x + A::load(c + k * L + v);
      }
      store_first(dxs[k] + at, out, m);
    }
  }
}

template <typename T>
void sums(const T* x, int64_t n, acc_type<T>* sums, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  int64_t at = 0;
  for (; n - at >= kRows * L; at += kRows * L) sum_rows<T, kRows>(x + at, sums, L);
  for (; n - at >= L; at += L) sum_rows<T, 1>(x + at, sums, L);
  for (int64_t v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes)
    A::store(sums + v,
             A::load(sums + v) + load_first(x + at, n - at < Ln::kLanes ? n - at : Ln::kLanes));
}

template <typename T, int R>
inline void deviation_rows(const T* x, const acc_type<T>* centre, acc_type<T>* first,
                           acc_type<T>* second, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    const typename Ln::V m = A::load(centre + v);
    typename Ln::V s{}, q{};
    for (int r = 0; r < R; ++r) fetch(x + v + r * L + kAhead);
    for (int r = 0; r < R; ++r) {
      const typename Ln::V d = Ln::load(x + v + r * L) - m;
      s += d;
      q += d * d;
    }
    A::store(first + v, A::load(first + v) + s);
    A::store(second + v, A::load(second + v) + q);
  }
}

template <typename T>
void deviations(const T* x, int64_t n, const acc_type<T>* centre, acc_type<T>* first,
                acc_type<T>* second, int64_t L) {
  int64_t at = 0;
  for (; n - at >= kRows * L; at += kRows * L)
    deviation_rows<T, kRows>(x + at, centre, first, second, L);
  for (; n - at >= L; at += L) deviation_rows<T, 1>(x + at, centre, first, second, L);
  // One by one: lanes past the end would count as deviations of -centre.
  for (int64_t v = 0; at < n; ++at, ++v) {
    const acc_type<T> d = to_acc(x[at]) - centre[v];
    first[v] += d;
    second[v] += d * d;
  }
}

#include "targets.inc.h"

template <typename T>
constexpr RangeKernels<T> kRangeKernels = {
    Lane<T>::kLanes, combine<T>,    reduce<T>,          gradients<T>,
    sums<T>,         deviations<T>, combine_targets<T>, reduce_targets<T>,
};
