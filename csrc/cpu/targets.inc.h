// SPDX-License-Identifier: Apache-2.0
// Several sums of the same operands, a part of range.inc.h. The sums of a group of targets stay in registers over the
// operands, so that a vector of an operand is loaded once for all of them.

// Tables whose sums for a group of targets fill the registers.
constexpr int kTargetRows = FASTNAS_VECTOR_BYTES == 64 ? 4 : 2;

// Calls f(first, count) for groups of targets, count known when it is compiled.
template <typename F>
inline void in_groups(int64_t targets, F&& f) {
  int64_t t = 0;
  for (; targets - t >= kTargetGroup; t += kTargetGroup)
    f(t, std::integral_constant<int, kTargetGroup>{});
  if (targets - t == 3) f(t, std::integral_constant<int, 3>{});
  if (targets - t == 2) f(t, std::integral_constant<int, 2>{});
  if (targets - t == 1) f(t, std::integral_constant<int, 1>{});
}

// R tables of L for the G targets from `first` on.
template <typename T, int G, int R>
inline void target_rows(const TargetSums<T>& s, int64_t first, int64_t at, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  const uint8_t* users = s.users + first / kTargetGroup * s.K;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    V sum[G][R];
    for (int u = 0; u < G; ++u)
      for (int r = 0; r < R; ++r) sum[u][r] = A::load(s.bias + (first + u) * L + v);
    const acc_type<T>* coef = s.coef + first * s.K * L + v;
    for (int64_t k = 0; k < s.K; ++k, coef += L) {
      if (!users[k]) continue;
      V x[R];
      for (int r = 0; r < R; ++r) x[r] = Ln::load(s.xs[k] + at + v + r * L);
      for (int r = 0; r < R; ++r) fetch(s.xs[k] + at + v + r * L + kAhead);
      for (int u = 0; u < G; ++u)
        if (users[k] >> u & 1)
          for (int r = 0; r < R; ++r) sum[u][r] += A::load(coef + u * s.K * L) * x[r];
    }
    for (int u = 0; u < G; ++u) {
      if (const T* x = s.own[first + u]) {
        const V a = A::load(s.own_coef + (first + u) * L + v);
        for (int r = 0; r < R; ++r) sum[u][r] += a * Ln::load(x + at + v + r * L);
      }
      for (int r = 0; r < R; ++r) Ln::store(s.ys[first + u] + at + v + r * L, sum[u][r]);
      for (int r = 0; r < R; ++r) fetch(s.ys[first + u] + at + v + r * L + kAhead);
    }
  }
}

template <typename T>
void combine_targets(const TargetSums<T>& s, int64_t begin, int64_t n, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  const int64_t end = begin + n, whole = begin + n / L * L;
  in_groups(s.targets, [&](int64_t first, auto count) {
    constexpr int G = decltype(count)::value;
    int64_t at = begin;
    for (; whole - at >= kTargetRows * L; at += kTargetRows * L)
      target_rows<T, G, kTargetRows>(s, first, at, L);
    for (; at < whole; at += L) target_rows<T, G, 1>(s, first, at, L);
  });
  for (int64_t at = whole, v = 0; at < end; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = end - at < Ln::kLanes ? end - at : Ln::kLanes;
    for (int64_t t = 0; t < s.targets; ++t) {
      const uint8_t* users = s.users + t / kTargetGroup * s.K;
      typename Ln::V sum = A::load(s.bias + t * L + v);
      for (int64_t k = 0; k < s.K; ++k)
        if (users[k] >> t % kTargetGroup & 1)
          sum += A::load(s.coef + (t * s.K + k) * L + v) * load_first(s.xs[k] + at, m);
      if (s.own[t]) sum += A::load(s.own_coef + t * L + v) * load_first(s.own[t] + at, m);
      store_first(s.ys[t] + at, sum, m);
    }
  }
}

// R tables of L: the dots of G gradients with one operand, row apart.
template <typename T, int G, int R>
inline void target_dots(const T* const* gs, int64_t at, const T* x, const acc_type<T>* centre,
                        acc_type<T>* dots, int64_t row, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    const V m = A::load(centre + v);
    V d[R];
    for (int r = 0; r < R; ++r) d[r] = Ln::load(x + at + v + r * L) - m;
    for (int u = 0; u < G; ++u) {
      V dot = Ln::load(gs[u] + at + v) * d[0];
      for (int r = 1; r < R; ++r) dot += Ln::load(gs[u] + at + v + r * L) * d[r];
      A::store(dots + u * row + v, A::load(dots + u * row + v) + dot);
    }
  }
}

template <typename T>
void reduce_targets(const T* const* gs, int64_t targets, const T* const* xs, int64_t K,
                    int64_t begin, int64_t n, const acc_type<T>* centre, acc_type<T>* acc,
                    int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  const int64_t end = begin + n, whole = begin + n / L * L, row = (K + 1) * L;
  const auto in_rows = [&](auto&& f) {
    int64_t at = begin;
    for (; whole - at >= kRows * L; at += kRows * L) f(at, std::integral_constant<int, kRows>{});
    for (; at < whole; at += L) f(at, std::integral_constant<int, 1>{});
  };
  for (int64_t t = 0; t < targets; ++t)
    in_rows([&](int64_t at, auto rows) {
      sum_rows<T, decltype(rows)::value>(gs[t] + at, acc + t * row, L);
    });
  for (int64_t k = 0; k < K; ++k) {
    if (!xs[k]) continue;
    in_groups(targets, [&](int64_t first, auto count) {
      in_rows([&](int64_t at, auto rows) {
        target_dots<T, decltype(count)::value, decltype(rows)::value>(
            gs + first, at, xs[k], centre + k * L, acc + first * row + (k + 1) * L, row, L);
      });
    });
  }
  for (int64_t at = whole, v = 0; at < end; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = end - at < Ln::kLanes ? end - at : Ln::kLanes;
    for (int64_t t = 0; t < targets; ++t) {
      acc_type<T>* sum = acc + t * row + v;
      const typename Ln::V g = load_first(gs[t] + at, m);  // zero past the end
      A::store(sum, A::load(sum) + g);
      for (int64_t k = 0; k < K; ++k) {
        if (!xs[k]) continue;
        acc_type<T>* dots = sum + (k + 1) * L;
        A::store(dots,
                 A::load(dots) + g * (load_first(xs[k] + at, m) - A::load(centre + k * L + v)));
      }
    }
  }
}
