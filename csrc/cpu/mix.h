// SPDX-License-Identifier: Apache-2.0
// The passes of range.h over whole tensors: split into tasks, run in parallel, partial sums folded in a fixed order.
// A task's share depends on sizes alone, never on the number of threads, so results do not either.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "range.h"
#include "tasks.h"

namespace fastnas {

constexpr int64_t kTaskElements =
    16384;  // of each operand: enough work for a thread, few enough sums for float
constexpr int64_t kBlockElements =
    2048;  // of each operand: what passes through a buffer in the first-level cache

// Operands (N, C, ...) of S values a plane, either plane after plane or with the channels innermost.
struct Layout {
  int64_t N, C, S;
  bool columns;

  int64_t values() const { return N * S; }  // per channel
  int64_t elements() const { return N * C * S; }
};

inline Layout layout_of(at::IntArrayRef shape, bool channels_innermost) {
  int64_t space = 1;
  for (size_t d = 2; d < shape.size(); ++d) space *= shape[d];
  return {shape[0], shape[1], space, channels_innermost || space == 1};
}

// Where the mixed channels live in a larger tensor: channel c of it is channel c * step of `channels`.
template <typename T>
struct Slot {
  T* data;
  int64_t channels;
  int64_t step;
};

template <typename T>
class Mix {
 public:
  using acc_t = acc_type<T>;

  explicit Mix(Layout layout)
      : layout_(layout),
        kernels_(range_kernels<T>()),
        period_(layout.columns ? std::lcm(std::max<int64_t>(layout.C, 1), int64_t{kernels_.lanes})
                               : kernels_.lanes) {
    const int64_t C = std::max<int64_t>(layout.C, 1), S = std::max<int64_t>(layout.S, 1);
    block_ = std::max<int64_t>(kBlockElements / period_, 1) * period_;
    if (layout.columns) {
      width_ = C;
      share_ = (kTaskElements + period_ - 1) / period_ * period_;
      tasks_ = (layout.elements() + share_ - 1) / share_;
    } else {
      // Whole images, so that memory is read straight through; some channels of one where an image is large.
      width_ = C * S <= 2 * kTaskElements ? C : std::clamp<int64_t>(kTaskElements / S, 1, C);
      share_ = std::max<int64_t>(kTaskElements / (width_ * S), 1);
      groups_ = (C + width_ - 1) / width_;
      tasks_ = (layout.N + share_ - 1) / share_ * groups_;
    }
  }

  // values[K][C] repeated over one period: one table for columns, one a channel for planes.
  std::vector<acc_t> table(const std::vector<double>& values) const {
    const int64_t C = layout_.C, K = C ? values.size() / C : 0;
    std::vector<acc_t> out;
    out.reserve(K * period_ * (layout_.columns ? 1 : C));
    for (int64_t c = 0; c < (layout_.columns ? 1 : C); ++c)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t l = 0; l < period_; ++l)
          out.push_back(static_cast<acc_t>(values[k * C + (layout_.columns ? l % C : c)]));
    return out;
  }

  // Mean and biased variance of every channel of each x that is not null: [K][C]. A task takes the mean of a sample of
  // its values and then the deviations of all from it; tasks are folded in double.
  void statistics(const std::vector<const T*>& xs, std::vector<double>& mean,
                  std::vector<double>& var) const {
    const int64_t C = layout_.C, K = xs.size();
    std::vector<double> partial(K * tasks_ * width_ * 2);
    parallel(K * tasks_, 1, [&](int64_t unit) {
      if (const T* x = xs[unit / tasks_])
        task_statistics(x, unit % tasks_, partial.data() + unit * width_ * 2);
    });
    for (int64_t k = 0; k < K; ++k) {
      if (!xs[k]) continue;
      double *m = mean.data() + k * C, *m2 = var.data() + k * C;
      std::vector<double> total(C);
      for (int64_t c = 0; c < C; ++c) m[c] = m2[c] = 0;
      for (int64_t task = 0; task < tasks_; ++task) {
        const Range r = range(task);
        const double* p = partial.data() + (k * tasks_ + task) * width_ * 2;
        for (int64_t c = r.c0; c < r.c1; ++c, ++p) {
          merge_statistics(m + c, m2 + c, total[c], p[0], p[width_], r.values);
          total[c] += r.values;
        }
      }
      for (int64_t c = 0; c < C; ++c) m2[c] /= layout_.values();
    }
  }

  // y = bias + sum_k coef_k x_k, channel by channel. after(first, last) follows a block of pixels of a Slot with
  // a step in columns, while their cache lines are warm.
  template <typename F>
  void combine(const std::vector<const T*>& xs, Slot<T> y, const std::vector<double>& coef,
               const std::vector<double>& bias, F&& after) const {
    const std::vector<acc_t> a = table(coef), b = table(bias);
    const int64_t K = xs.size();
    parallel(tasks_, K, [&](int64_t task) {
      std::vector<const T*> at(K);
      std::vector<T> buffer(gathers(y) ? block_ : 0);
      pieces(task, gathers(y), [&](int64_t begin, int64_t n, int64_t c, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) at[k] = xs[k] + begin;
        T* out = gathers(y) ? buffer.data() : layout_.columns ? y.data + begin : plane(y, slice, c);
        kernels_.combine(at.data(), K, out, n, a.data() + c * K * period_, b.data() + c * period_,
                         period_);
        if (!gathers(y)) return;
        const int64_t C = layout_.C, first = begin / C, pixels = n / C;
        for (int64_t p = 0; p < pixels; ++p) {
          T* row = y.data + (first + p) * y.channels;
          for (int64_t j = 0; j < C; ++j) row[j * y.step] = out[p * C + j];
        }
        after(first, first + pixels);
      });
    });
  }

  // sums[C] = sum g and dots[K][C] = sum g (x_k - centre_k), those of null xs left alone.
  void reduce(Slot<const T> g, const std::vector<const T*>& xs, const std::vector<double>& centre,
              std::vector<double>& sums, std::vector<double>& dots) const {
    const int64_t C = layout_.C, K = xs.size();
    const std::vector<acc_t> m = table(centre);
    std::vector<double> partial(tasks_ * (K + 1) * width_);
    parallel(tasks_, K + 1, [&](int64_t task) {
      const int64_t tile = (K + 1) * period_, first = range(task).c0;
      std::vector<acc_t> acc(tile * tiles());
      std::vector<const T*> at(K);
      std::vector<T> buffer(gathers(g) ? block_ : 0);
      pieces(task, gathers(g), [&](int64_t begin, int64_t n, int64_t c, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) at[k] = xs[k] ? xs[k] + begin : nullptr;
        const T* gp = gradient_piece(g, begin, n, c, slice, buffer);
        acc_t* sum = acc.data() + (layout_.columns ? 0 : c - first) * tile;
        kernels_.reduce(gp, at.data(), K, n, m.data() + c * K * period_, sum, sum + period_,
                        period_);
      });
      double* out = partial.data() + task * (K + 1) * width_;
      for (int64_t k = 0; k <= K; ++k) fold(acc.data() + k * period_, tile, out + k * width_);
    });
    for (int64_t task = 0; task < tasks_; ++task) {
      const Range r = range(task);
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t c = r.c0; c < r.c1; ++c)
          (k == 0 ? sums[c] : dots[(k - 1) * C + c]) +=
              partial[(task * (K + 1) + k) * width_ + c - r.c0];
    }
  }

  // dx_k = a_k g + b_k (x_k - centre_k) + c_k where x_k is given, a_k g where it is null.
  void gradients(Slot<const T> g, const std::vector<const T*>& xs, const std::vector<T*>& dxs,
                 const std::vector<double>& a, const std::vector<double>& b,
                 const std::vector<double>& c, const std::vector<double>& centre) const {
    const int64_t K = xs.size();
    const std::vector<acc_t> ta = table(a), tb = table(b), tc = table(c), tm = table(centre);
    parallel(tasks_, 2 * K, [&](int64_t task) {
      std::vector<const T*> at(K);
      std::vector<T*> to(K);
      std::vector<T> buffer(gathers(g) ? block_ : 0);
      pieces(task, gathers(g), [&](int64_t begin, int64_t n, int64_t channel, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) {
          at[k] = xs[k] ? xs[k] + begin : nullptr;
          to[k] = dxs[k] ? dxs[k] + begin : nullptr;
        }
        const T* gp = gradient_piece(g, begin, n, channel, slice, buffer);
        const int64_t t = channel * K * period_;
        kernels_.gradients(gp, at.data(), to.data(), K, n, ta.data() + t, tb.data() + t,
                           tc.data() + t, tm.data() + t, period_);
      });
    });
  }

 protected:
  struct Range {
    int64_t n0, n1, c0, c1;  // images and channels of a task; columns: all channels, n in elements
    double values;           // per channel
  };

  Range range(int64_t task) const {
    const Layout& l = layout_;
    if (l.columns) {
      const int64_t n0 = task * share_, n1 = std::min(n0 + share_, l.elements());
      return {n0, n1, 0, l.C, static_cast<double>((n1 - n0) / l.C)};
    }
    const int64_t n0 = task / groups_ * share_, n1 = std::min(n0 + share_, l.N),
                  c0 = task % groups_ * width_;
    return {n0, n1, c0, std::min(c0 + width_, l.C), static_cast<double>((n1 - n0) * l.S)};
  }

  // How many tables of a period a task accumulates into: one a channel for planes.
  int64_t tiles() const { return layout_.columns ? 1 : width_; }

  template <typename F>
  void parallel(int64_t units, int64_t operands, F&& f) const {
    const int64_t each =
        share_ * (layout_.columns ? 1 : width_ * layout_.S) * std::max<int64_t>(operands, 1);
    const int64_t grain = std::max<int64_t>(2 * kTaskElements / std::max<int64_t>(each, 1), 1);
    parallel_tasks(units, grain, [&](Tasks::Worker& worker) {
      for (int64_t unit; worker.next(unit);) f(unit);
    });
  }

  // Calls f(begin, n, channel, image) for the consecutive pieces of a task: plane after plane, or all its pixels (in
  // blocks when they pass through a buffer) with channel 0.
  template <typename F>
  void pieces(int64_t task, bool in_blocks, F&& f) const {
    const Range r = range(task);
    if (layout_.columns) {
      const int64_t step = in_blocks ? block_ : share_;
      for (int64_t begin = r.n0; begin < r.n1; begin += step)
        f(begin, std::min(step, r.n1 - begin), int64_t{0}, int64_t{0});
      return;
    }
    for (int64_t n = r.n0; n < r.n1; ++n)
      for (int64_t c = r.c0; c < r.c1; ++c) f((n * layout_.C + c) * layout_.S, layout_.S, c, n);
  }

  // Adds accumulators, tile[l] for channel l % C or one tile a channel, to one number a channel.
  void fold(const acc_t* acc, int64_t tile, double* out) const {
    if (layout_.columns) {
      for (int64_t l = 0; l < period_; ++l) out[l % layout_.C] += acc[l];
      return;
    }
    for (int64_t c = 0; c < width_; ++c)
      for (int64_t l = 0; l < period_; ++l) out[c] += acc[c * tile + l];
  }

  // The first values of a task that stand for all of them: so many of so many images (columns: elements of one piece).
  // A sixteenth: whatever the others are, the mean of the sample lies within four standard deviations of theirs, so
  // that nothing cancels.
  struct Sample {
    int64_t images, values;
  };
  Sample sample_of(const Range& r) const {
    const int64_t n = r.n1 - r.n0;
    if (layout_.columns) return {1, std::min(n, (n + 16 * period_ - 1) / (16 * period_) * period_)};
    if (n > 16) return {(n + 15) / 16, layout_.S};
    return {1, std::min(layout_.S, (n * layout_.S + 15) / 16)};
  }

  // out[0 .. width): means of the task's channels; out[width ..): their sums of squared deviations.
  void task_statistics(const T* x, int64_t task, double* out) const {
    const Range r = range(task);
    const int64_t size = period_ * tiles();
    std::vector<acc_t> acc(size * 3);
    acc_t *centre = acc.data(), *first = centre + size, *second = first + size;
    const Sample sample = sample_of(r);
    pieces(task, false, [&](int64_t begin, int64_t n, int64_t c, int64_t slice) {
      if (!layout_.columns && slice >= r.n0 + sample.images) return;
      kernels_.sums(x + begin, std::min(n, sample.values),
                    first + (layout_.columns ? 0 : (c - r.c0) * period_), period_);
    });
    std::vector<double> total(width_), squares(width_);
    fold(first, period_, total.data());
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = layout_.columns ? i % layout_.C : i / period_;
      const double mean = total[c] * (layout_.columns ? layout_.C : 1) /
                          static_cast<double>(sample.images * sample.values);
      centre[i] = std::isfinite(mean) ? static_cast<acc_t>(mean) : acc_t{};
      first[i] = 0;
    }
    pieces(task, false, [&](int64_t begin, int64_t n, int64_t c, int64_t) {
      const int64_t t = layout_.columns ? 0 : (c - r.c0) * period_;
      kernels_.deviations(x + begin, n, centre + t, first + t, second + t, period_);
    });
    std::fill(total.begin(), total.end(), 0.0);
    fold(first, period_, total.data());
    fold(second, period_, squares.data());
    for (int64_t c = 0; c < r.c1 - r.c0; ++c)
      deviation_statistics(centre[layout_.columns ? c : c * period_], total[c], squares[c],
                           r.values, out + c, out + width_ + c);
  }

  template <typename U>
  bool gathers(const Slot<U>& slot) const {
    return layout_.columns && (slot.step != 1 || slot.channels != layout_.C);
  }

  template <typename U>
  U* plane(const Slot<U>& slot, int64_t slice, int64_t c) const {
    return slot.data + (slice * slot.channels + c * slot.step) * layout_.S;
  }

  const T* gradient_piece(const Slot<const T>& g, int64_t begin, int64_t n, int64_t c,
                          int64_t slice, std::vector<T>& buffer) const {
    if (!layout_.columns) return plane(g, slice, c);
    if (!gathers(g)) return g.data + begin;
    const int64_t C = layout_.C, first = begin / C;
    for (int64_t p = 0; p < n / C; ++p) {
      const T* row = g.data + (first + p) * g.channels;
      for (int64_t j = 0; j < C; ++j) buffer[p * C + j] = row[j * g.step];
    }
    return buffer.data();
  }

  Layout layout_;
  const RangeKernels<T>& kernels_;
  int64_t period_;
  int64_t width_ = 1;   // channels of a task
  int64_t share_ = 1;   // elements of a task (columns) or images
  int64_t groups_ = 1;  // tasks an image's channels make
  int64_t block_ = 0;   // elements of a block that passes through a buffer
  int64_t tasks_ = 0;
};

}  // namespace fastnas
