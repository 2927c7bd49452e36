// SPDX-License-Identifier: Apache-2.0
// Bodies of range.h for one instruction set. Memory-bound by design: every operand is read once, kRows vectors share
// a load of their coefficients.

constexpr int kRows = 4;
// Elements whose squared deviations are taken in a second look, while they are still in the first-level cache.
constexpr int64_t kStatisticsBlock = 2048;

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
void combine(const T* const* xs, int64_t K, T* y, int64_t n, const acc_type<T>* coef, const acc_type<T>* bias,
             int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  const int64_t rows = n / L;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) combine_rows<T, kRows>(xs, K, y, row * L, coef, bias, L);
  for (; row < rows; ++row) combine_rows<T, 1>(xs, K, y, row * L, coef, bias, L);
  for (int64_t at = rows * L, v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    typename Ln::V sum{};
    if (bias) sum = A::load(bias + v);
    for (int64_t k = 0; k < K; ++k) sum += A::load(coef + k * L + v) * load_first(xs[k] + at, m);
    store_first(y + at, sum, m);
  }
}

template <typename T, int R>
inline void reduce_rows(const T* g, const T* const* xs, int64_t K, int64_t at, const acc_type<T>* centre,
                        acc_type<T>* sums, acc_type<T>* dots, int64_t L) {
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
void reduce(const T* g, const T* const* xs, int64_t K, int64_t n, const acc_type<T>* centre, acc_type<T>* sums,
            acc_type<T>* dots, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  const int64_t rows = n / L;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) reduce_rows<T, kRows>(g, xs, K, row * L, centre, sums, dots, L);
  for (; row < rows; ++row) reduce_rows<T, 1>(g, xs, K, row * L, centre, sums, dots, L);
  for (int64_t at = rows * L, v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
    const int64_t m = n - at < Ln::kLanes ? n - at : Ln::kLanes;
    const V gv = load_first(g + at, m);  // zero past the end, so those lanes add nothing
    if (sums) A::store(sums + v, A::load(sums + v) + gv);
    for (int64_t k = 0; k < K; ++k) {
      if (!xs[k]) continue;
      const V mean = centre ? A::load(centre + k * L + v) : V{};
      A::store(dots + k * L + v, A::load(dots + k * L + v) + gv * (load_first(xs[k] + at, m) - mean));
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
        const V bk = A::load(b + k * L + v), ck = A::load(c + k * L + v), mk = A::load(centre + k * L + v);
        const T* x = xs[k] + at + v;
        for (int r = 0; r < R; ++r) Ln::store(dx + r * L, ak * gv[r] + (bk * (Ln::load(x + r * L) - mk) + ck));
      } else {
        for (int r = 0; r < R; ++r) Ln::store(dx + r * L, ak * gv[r]);
      }
    }
  }
}

template <typename T>
void gradients(const T* g, const T* const* xs, T* const* dxs, int64_t K, int64_t n, const acc_type<T>* a,
               const acc_type<T>* b, const acc_type<T>* c, const acc_type<T>* centre, int64_t L) {
  using Ln = Lane<T>;
  using A = Lane<acc_type<T>>;
  using V = typename Ln::V;
  const int64_t rows = n / L;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) gradient_rows<T, kRows>(g, xs, dxs, K, row * L, a, b, c, centre, L);
  for (; row < rows; ++row) gradient_rows<T, 1>(g, xs, dxs, K, row * L, a, b, c, centre, L);
  for (int64_t at = rows * L, v = 0; at < n; at += Ln::kLanes, v += Ln::kLanes) {
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
inline double horizontal_sum(typename Lane<T>::V v) {
  double sum = 0;
  for (int i = 0; i < Lane<T>::kLanes; ++i) sum += v[i];
  return sum;
}

template <typename T>
void plane_statistics(const T* x, int64_t n, double* mean, double* m2) {
  using Ln = Lane<T>;
  using V = typename Ln::V;
  constexpr int W = Ln::kLanes;
  *mean = *m2 = 0;
  for (int64_t begin = 0; begin < n; begin += kStatisticsBlock) {
    const int64_t count = n - begin < kStatisticsBlock ? n - begin : kStatisticsBlock;
    const T* p = x + begin;
    const int64_t whole = count / W * W, fours = count / (4 * W) * (4 * W);
    V s[4] = {};
    for (int64_t i = 0; i < fours; i += 4 * W)
      for (int u = 0; u < 4; ++u) s[u] += Ln::load(p + i + u * W);
    for (int64_t i = fours; i < whole; i += W) s[0] += Ln::load(p + i);
    if (whole < count) s[1] += load_first(p + whole, count - whole);
    const double block_mean = horizontal_sum<T>((s[0] + s[1]) + (s[2] + s[3])) / count;
    // Deviations from the rounded mean; what the rounding leaves is put right by the last line.
    const acc_type<T> rounded = static_cast<acc_type<T>>(block_mean);
    const V m = broadcast<T>(rounded);
    V q[4] = {};
    for (int64_t i = 0; i < fours; i += 4 * W)
      for (int u = 0; u < 4; ++u) {
        const V d = Ln::load(p + i + u * W) - m;
        q[u] += d * d;
      }
    for (int64_t i = fours; i < whole; i += W) {
      const V d = Ln::load(p + i) - m;
      q[0] += d * d;
    }
    double squares = horizontal_sum<T>((q[0] + q[1]) + (q[2] + q[3]));
    for (int64_t i = whole; i < count; ++i) {
      const double d = static_cast<double>(to_acc(p[i])) - rounded;
      squares += d * d;
    }
    const double off = block_mean - rounded;
    merge_statistics(mean, m2, begin, block_mean, squares - off * off * count, count);
  }
}

template <typename T>
void column_statistics(const T* x, int64_t n, int64_t L, double* mean, double* m2) {
  using Ln = Lane<T>;
  using V = typename Ln::V;
  constexpr int W = Ln::kLanes;
  const int64_t rows = n / L, tail = n % L;
  const int64_t block = kStatisticsBlock / L > 1 ? kStatisticsBlock / L : 1;
  for (int64_t l = 0; l < L; ++l) mean[l] = m2[l] = 0;
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = rows - begin < block ? rows - begin : block;
    for (int64_t v = 0; v < L; v += W) {
      const T* p = x + begin * L + v;
      V s{}, q{};
      for (int64_t r = 0; r < count; ++r) s += Ln::load(p + r * L);
      const V m = s / broadcast<T>(static_cast<acc_type<T>>(count));
      for (int64_t r = 0; r < count; ++r) {
        const V d = Ln::load(p + r * L) - m;
        q += d * d;
      }
      for (int i = 0; i < W; ++i) {
        const double exact = static_cast<double>(s[i]) / count, off = exact - m[i];
        merge_statistics(mean + v + i, m2 + v + i, begin, exact, q[i] - off * off * count, count);
      }
    }
  }
  for (int64_t l = 0; l < tail; ++l) merge_statistics(mean + l, m2 + l, rows, to_acc(x[rows * L + l]), 0, 1);
}

template <typename T>
constexpr RangeKernels<T> kRangeKernels = {
    Lane<T>::kLanes, combine<T>, reduce<T>, gradients<T>, plane_statistics<T>, column_statistics<T>,
};
