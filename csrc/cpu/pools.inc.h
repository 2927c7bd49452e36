// SPDX-License-Identifier: Apache-2.0
// Bodies of pools.h for one instruction set. Every operand is an aligned load of one pixel; a window costs two
// comparisons in its row and two among its rows, where nine pixels would cost eight.

// f(Int<count>) for 1, 2 or 3.
template <typename F>
inline void with_count(int64_t count, F&& f) {
  if (count == 3) return f(std::integral_constant<int, 3>{});
  if (count == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// Whether v takes the place of `best`, which came before it: a later NaN does, a later equal does not.
template <typename V>
inline auto takes_over(V v, V best) {
  return (v > best) | (v != v);
}

// The row of three pixels around pixel x, without the left or the right one at the border: best and sum.
template <typename A, bool kLeft, bool kRight>
inline void pool_three(const A* x, A* best, A* sum) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  constexpr int L = Ln::kLanes;
  const V centre = Ln::load(x);
  V top = centre, total = centre;
  if constexpr (kLeft) {
    const V left = Ln::load(x - L);
    top = takes_over(centre, left) ? centre : left;
    total = left + centre;
  }
  if constexpr (kRight) {
    const V right = Ln::load(x + L);
    top = takes_over(right, top) ? right : top;
    total += right;
  }
  Ln::store(best, top);
  Ln::store(sum, total);
}

// The same for best and for the column it is in: 0, 1 or 2.
template <typename A, bool kLeft, bool kRight>
inline void choose_of_three(const A* x, A* best, A* column) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  constexpr int L = Ln::kLanes;
  const V centre = Ln::load(x);
  V top = centre, at = broadcast<A>(1);
  if constexpr (kLeft) {
    const V left = Ln::load(x - L);
    const auto later = takes_over(centre, left);
    top = later ? centre : left;
    at = later ? broadcast<A>(1) : V{};
  }
  if constexpr (kRight) {
    const V right = Ln::load(x + L);
    const auto later = takes_over(right, top);
    top = later ? right : top;
    at = later ? broadcast<A>(2) : at;
  }
  Ln::store(best, top);
  Ln::store(column, at);
}

// f(j, has_left, has_right) for the ow rows of three in a row of W pixels.
template <typename F>
inline void along_row(const PoolRows& r, F&& f) {
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  const bool cut = r.stride * (r.ow - 1) + 1 >= r.W;  // the last row of three
  if (r.ow == 1) return cut ? f(0, no, no) : f(0, no, yes);
  f(0, no, yes);
  const int64_t last = r.ow - 1;
  for (int64_t j = 1; j < last; ++j) f(j, yes, yes);
  cut ? f(last, yes, no) : f(last, yes, yes);
}

// How many columns of window j are inside the image.
inline int64_t columns_of(const PoolRows& r, int64_t j) {
  return 1 + (j > 0) + (r.stride * j + 1 < r.W);
}

template <typename A, int R>
inline void pool_column(const PoolRows& r, const A* best, const A* sum, A* max, A* avg) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  const int64_t pitch = r.ow * Ln::kLanes;
  const auto window = [&](int64_t j, A scale) {
    const int64_t i = j * Ln::kLanes;
    V top = Ln::load(best + i), total = Ln::load(sum + i);
    for (int k = 1; k < R; ++k) {
      const V v = Ln::load(best + i + k * pitch);
      top = takes_over(v, top) ? v : top;
      total += Ln::load(sum + i + k * pitch);
    }
    Ln::store(max + i, top);
    Ln::store(avg + i, total * broadcast<A>(scale));
  };
  const int64_t last = r.ow - 1;
  window(0, A(1) / (R * columns_of(r, 0)));
  for (int64_t j = 1; j < last; ++j) window(j, A(1) / (R * 3));
  if (last > 0) window(last, A(1) / (R * columns_of(r, last)));
}

template <typename A>
void pool(const PoolRows& r, const A* x, A* best, A* sum, A* max, A* avg) {
  constexpr int L = Lane<A>::kLanes;
  const int64_t pitch = r.ow * L;
  for (int64_t i = 0; i < r.bottom - r.top; ++i)
    along_row(r, [&](int64_t j, auto left, auto right) {
      const int64_t to = i * pitch + j * L;
      pool_three<A, left.value, right.value>(x + (i * r.W + r.stride * j) * L, best + to, sum + to);
    });
  for (int64_t row = r.first; row < r.last; ++row) {
    const int64_t from = (r.begin(row) - r.top) * pitch, to = (row - r.first) * pitch;
    with_count(r.end(row) - r.begin(row), [&](auto count) {
      pool_column<A, count.value>(r, best + from, sum + from, max + to, avg + to);
    });
  }
}

// Which row of each window of a row of them has its maximum: 0, 1 or 2, from `first` on.
template <typename A, int R>
inline void choose_row(const PoolRows& r, const A* best, int first, A* choice) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  const int64_t pitch = (r.ow + 2) * Ln::kLanes;
  for (int64_t i = 0; i < r.ow * Ln::kLanes; i += Ln::kLanes) {
    V top = Ln::load(best + i), at = broadcast<A>(first);
    for (int k = 1; k < R; ++k) {
      const V v = Ln::load(best + i + k * pitch);
      const auto later = takes_over(v, top);
      top = later ? v : top;
      at = later ? broadcast<A>(first + k) : at;
    }
    Ln::store(choice + i, at);
  }
}

// A row of x gets from R rows of windows: `distance` is its place in the first of them, and `stride` less in each
// next. Where an average is meant, scales are those of the rows.
template <typename A, int R, bool kMax, bool kAvg>
inline void spread_rows(const PoolRows& r, const A* g_max, const A* g_avg, const A* choice,
                        int distance, const A (&scales)[3], A* h_max, A* h_avg) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  constexpr int L = Ln::kLanes;
  const int64_t pitch = r.ow * L, chosen = (r.ow + 2) * L;
  const int step = static_cast<int>(r.stride);
  const auto window = [&](int64_t j, A scale) {
    const int64_t i = j * L;
    V max{}, avg{};
    for (int k = 0; k < R; ++k) {
      if constexpr (kMax) {
        const V g = Ln::load(g_max + i + k * pitch);
        max += Ln::load(choice + i + k * chosen) == broadcast<A>(distance - k * step) ? g : V{};
      }
      if constexpr (kAvg) avg += Ln::load(g_avg + i + k * pitch) * broadcast<A>(scales[k] * scale);
    }
    if constexpr (kMax) Ln::store(h_max + i, max);
    if constexpr (kAvg) Ln::store(h_avg + i, avg);
  };
  const int64_t last = r.ow - 1;
  window(0, A(1) / columns_of(r, 0));
  for (int64_t j = 1; j < last; ++j) window(j, A(1) / 3);
  if (last > 0) window(last, A(1) / columns_of(r, last));
}

// dx of one row from what came down its columns.
template <typename A, bool kMax, bool kAvg>
inline void gather_row(const PoolRows& r, const A* h_max, const A* h_avg, const A* column, A* dx) {
  using Ln = Lane<A>;
  using V = typename Ln::V;
  constexpr int L = Ln::kLanes;
  // What window j gives the pixel at `place` of it.
  const auto part = [&](int64_t j, int place) {
    V sum{};
    if constexpr (kMax) {
      const V h = Ln::load(h_max + j * L);
      sum = Ln::load(column + j * L) == broadcast<A>(place) ? h : V{};
    }
    if constexpr (kAvg) sum += Ln::load(h_avg + j * L);
    return sum;
  };
  if (r.stride == 1) {
    for (int64_t j = 0; j < r.W; ++j)
      Ln::store(dx + j * L, part(j - 1, 2) + part(j, 1) + part(j + 1, 0));
    return;
  }
  for (int64_t j = 0; j < r.W / 2; ++j) {
    Ln::store(dx + 2 * j * L, part(j, 1));
    Ln::store(dx + (2 * j + 1) * L, part(j, 2) + part(j + 1, 0));
  }
  if (r.W % 2) Ln::store(dx + (r.W - 1) * L, part(r.W / 2, 1));
}

template <typename A, bool kMax, bool kAvg>
void pool_gradient(const PoolRows& r, int64_t row0, int64_t row1, const A* x, const A* g_max,
                   const A* g_avg, A* best, A* column, A* choice, A* spread, A* dx) {
  constexpr int L = Lane<A>::kLanes;
  const int64_t s = r.stride, pitch = (r.ow + 2) * L;
  A *h_max = spread + L, *h_avg = h_max + pitch;
  best += L;
  column += L;
  choice += L;
  if constexpr (kMax) {
    for (int64_t i = 0; i < r.bottom - r.top; ++i)
      along_row(r, [&](int64_t j, auto left, auto right) {
        const int64_t to = i * pitch + j * L;
        choose_of_three<A, left.value, right.value>(x + (i * r.W + s * j) * L, best + to,
                                                    column + to);
      });
    for (int64_t row = r.first; row < r.last; ++row)
      with_count(r.end(row) - r.begin(row), [&](auto count) {
        choose_row<A, count.value>(r, best + (r.begin(row) - r.top) * pitch, row == 0,
                                   choice + (row - r.first) * pitch);
      });
  }
  for (int64_t i = row0; i < row1; ++i, dx += r.W * L) {
    const int64_t low = i == 0 ? 0 : (i + s - 2) / s, high = (i + 1) / s;
    const int64_t count = (high < r.oh ? high + 1 : r.oh) - low, from = low - r.first;
    A scales[3] = {};
    for (int64_t k = 0; k < count; ++k) scales[k] = A(1) / (r.end(low + k) - r.begin(low + k));
    with_count(count, [&](auto rows) {
      spread_rows<A, rows.value, kMax, kAvg>(
          r, kMax ? g_max + from * r.ow * L : nullptr, kAvg ? g_avg + from * r.ow * L : nullptr,
          choice + from * pitch, static_cast<int>(i - (s * low - 1)), scales, h_max, h_avg);
    });
    gather_row<A, kMax, kAvg>(r, h_max, h_avg, column + (i - r.top) * pitch, dx);
  }
}

template <typename A>
void gradient(const PoolRows& r, int64_t row0, int64_t row1, const A* x, const A* g_max,
              const A* g_avg, A* best, A* column, A* choice, A* spread, A* dx) {
  const auto run = [&](auto kernel) {
    kernel(r, row0, row1, x, g_max, g_avg, best, column, choice, spread, dx);
  };
  if (g_max && g_avg) return run(pool_gradient<A, true, true>);
  if (g_max) return run(pool_gradient<A, true, false>);
  run(pool_gradient<A, false, true>);
}

template <typename A>
constexpr PoolKernels<A> kPoolKernels = {pool<A>, gradient<A>};
