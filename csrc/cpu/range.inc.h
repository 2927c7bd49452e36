// SPDX-License-Identifier: Apache-2.0
// Bodies of range.h for one instruction set. Memory-bound by design: every operand is read once, kRows vectors share
// a load of their coefficients.

constexpr int kRows = 4;

template <typename T, int R>
inline void combine_rows(const T* const* xs, int64_t K, T* y, int64_t at, const acc_type<T>* coef,
                         const acc_type<T>* bias, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    V sum[R];
    const V start = bias ? A::load(bias + v) : V{};
    for (int r = 0; r < R; ++r) sum[r] = start;
    for (int64_t k = 0; k < K; ++k) {
      const V a = A::load(coef + k * L + v);
      const T* x = xs[k] + at + v;
      for (int r = 0; r < R; ++r) sum[r] += a * Ln::load(x + r * L);
    }
    for (int r = 0; r < R; ++r) Ln::store(y + at + v + r * L, sum[r]);
  }
}

template <typename T>
void combine(const T* const* xs, int64_t K, T* y, int64_t n, const acc_type<T>* coef,
             const acc_type<T>* bias, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  int64_t at =
      0;  // no division: a plane may be as short as a vector, and there are thousands of them
  for (; n - at >= kRows * L; at += kRows * L) combine_rows<T, kRows>(xs, K, y, at, coef, bias, L);
  for (; n - at >= L; at += L) combine_rows<T, 1>(xs, K, y, at, coef, bias, L);
  for (int64_t v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    typename Ln::V sum{};
    if (bias) sum = A::load(bias + v);
    for (int64_t k = 0; k < K; ++k) sum += A::load(coef + k * L + v) * load_first(xs[k] + at, m);
    store_first(y + at, sum, m);
  }
}

template <typename T, int R>
inline void reduce_rows(const T* g, const T* const* xs, int64_t K, int64_t at,
                        const acc_type<T>* centre, acc_type<T>* sums, acc_type<T>* dots,
                        int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    V gv[R];
    for (int r = 0; r < R; ++r) gv[r] = Ln::load(g + at + v + r * L);
    if (sums) {
      V s = gv[0];
      for (int r = 1; r < R; ++r) s += gv[r];
      A::store(sums + v, A::load(sums + v) + s);
    }
    for (int64_t k = 0; k < K; ++k) {
      if (!xs[k]) continue;
      const V m = centre ? A::load(centre + k * L + v) : V{};
      const T* x = xs[k] + at + v;
      V d = gv[0] * (Ln::load(x) - m);
      for (int r = 1; r < R; ++r) d += gv[r] * (Ln::load(x + r * L) - m);
      A::store(dots + k * L + v, A::load(dots + k * L + v) + d);
    }
  }
}

template <typename T>
void reduce(const T* g, const T* const* xs, int64_t K, int64_t n, const acc_type<T>* centre,
            acc_type<T>* sums, acc_type<T>* dots, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  int64_t at = 0;
  for (; n - at >= kRows * L; at += kRows * L)
    reduce_rows<T, kRows>(g, xs, K, at, centre, sums, dots, L);
  for (; n - at >= L; at += L) reduce_rows<T, 1>(g, xs, K, at, centre, sums, dots, L);
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

template <typename T, int R>
inline void gradient_rows(const T* g, const T* const* xs, T* const* dxs, int64_t K, int64_t at,
                          const acc_type<T>* a, const acc_type<T>* b, const acc_type<T>* c,
                          const acc_type<T>* centre, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  for (int64_t v = 0; v < L; v += Ln::kLanes) {
    V gv[R];
    for (int r = 0; r < R; ++r) gv[r] = Ln::load(g + at + v + r * L);
    for (int64_t k = 0; k < K; ++k) {
      if (!dxs[k]) continue;
      const V ak = A::load(a + k * L + v);
      T* dx = dxs[k] + at + v;
      if (xs[k]) {
        const V bk = A::load(b + k * L + v), ck = A::load(c + k * L + v),
                mk = A::load(centre + k * L + v);
        const T* x = xs[k] + at + v;
        for (int r = 0; r < R; ++r)
          Ln::store(dx + r * L, ak * gv[r] + (bk * (Ln::load(x + r * L) - mk) + ck));
      } else {
        for (int r = 0; r < R; ++r) Ln::store(dx + r * L, ak * gv[r]);
      }
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
  for (; n - at >= kRows * L; at += kRows * L)
    gradient_rows<T, kRows>(g, xs, dxs, K, at, a, b, c, centre, L);
  for (; n - at >= L; at += L) gradient_rows<T, 1>(g, xs, dxs, K, at, a, b, c, centre, L);
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

template <typename T>
constexpr RangeKernels<T> kRangeKernels = {
    Lane<T>::kLanes, combine<T>, reduce<T>, gradients<T>, sums<T>, deviations<T>,
};
