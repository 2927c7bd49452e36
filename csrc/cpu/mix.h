// SPDX-License-Identifier: Apache-2.0
// The passes of range.h over whole tensors: split into tasks, run in parallel, partial sums folded in a fixed order.
// A task's share depends on sizes alone, never on the number of threads, so results do not either.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "range.h"

namespace fastnas {

constexpr int64_t kTaskElements = 16384;  // of each operand: enough work for a thread, few enough sums for float
constexpr int64_t kBlockElements = 2048;  // of each operand: what passes through a buffer in the first-level cache

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
        period_(layout.columns ? std::lcm(std::max<int64_t>(layout.C, 1), int64_t{kernels_.lanes}) : kernels_.lanes) {
    const Layout& l = layout_;
    if (l.columns) {
      share_ = (kTaskElements + period_ - 1) / period_ * period_;
      block_ = std::max<int64_t>(kBlockElements / period_, 1) * period_;
      tasks_ = (l.elements() + share_ - 1) / share_;
    } else {
      share_ = std::max<int64_t>(kTaskElements / std::max<int64_t>(l.S, 1), 1);
      chunks_ = (l.N + share_ - 1) / share_;
      tasks_ = l.C * chunks_;
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

  // Mean and biased variance of every channel of each x that is not null: [K][C].
  void statistics(const std::vector<const T*>& xs, std::vector<double>& mean, std::vector<double>& var) const {
    const int64_t C = layout_.C, per_task = layout_.columns ? C : 1;
    const int64_t K = xs.size();
    std::vector<double> partial(K * tasks_ * per_task * 2);
    parallel(K * tasks_, 1, [&](int64_t unit) {
      const int64_t k = unit / tasks_;
      double* out = partial.data() + unit * per_task * 2;
      if (!xs[k]) return;
      if (layout_.columns)
        column_task(xs[k], unit % tasks_, out, out + C);
      else
        plane_task(xs[k], unit % tasks_, out, out + 1);
    });
    for (int64_t k = 0; k < K; ++k) {
      if (!xs[k]) continue;
      for (int64_t c = 0; c < C; ++c) {
        double m = 0, m2 = 0, total = 0;
        const int64_t first = layout_.columns ? 0 : c * chunks_, last = layout_.columns ? tasks_ : first + chunks_;
        for (int64_t t = first; t < last; ++t) {
          const double* p = partial.data() + (k * tasks_ + t) * per_task * 2 + (layout_.columns ? c : 0);
          const double count = values_of(t, c);
          if (count) merge_statistics(&m, &m2, total, p[0], p[per_task], count);
          total += count;
        }
        mean[k * C + c] = m;
        var[k * C + c] = m2 / layout_.values();
      }
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
      pieces(task, [&](int64_t begin, int64_t n, int64_t c, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) at[k] = xs[k] + begin;
        const int64_t tile = layout_.columns ? 0 : c;
        T* out = gathers(y) ? buffer.data() : layout_.columns ? y.data + begin : plane(y, slice, c);
        kernels_.combine(at.data(), K, out, n, a.data() + tile * K * period_, b.data() + tile * period_, period_);
        if (!gathers(y)) return;
        const int64_t C = layout_.C, first = begin / C, pixels = n / C;
        for (int64_t p = 0; p < pixels; ++p) {
          T* row = y.data + (first + p) * y.channels;
          for (int64_t j = 0; j < C; ++j) row[j * y.step] = out[p * C + j];
        }
        after(first, first + pixels);
      }, gathers(y));
    });
  }

  // sums[C] = sum g and dots[K][C] = sum g (x_k - centre_k), those of null xs left alone.
  void reduce(Slot<const T> g, const std::vector<const T*>& xs, const std::vector<double>& centre,
              std::vector<double>& sums, std::vector<double>& dots) const {
    const int64_t C = layout_.C, K = xs.size(), width = layout_.columns ? C : 1;
    const std::vector<acc_t> m = table(centre);
    std::vector<double> partial(tasks_ * (K + 1) * width);
    parallel(tasks_, K + 1, [&](int64_t task) {
      std::vector<acc_t> acc((K + 1) * period_);
      std::vector<const T*> at(K);
      std::vector<T> buffer(gathers(g) ? block_ : 0);
      pieces(task, [&](int64_t begin, int64_t n, int64_t c, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) at[k] = xs[k] ? xs[k] + begin : nullptr;
        const T* gp = gradient_piece(g, begin, n, c, slice, buffer);
        const acc_t* tile = m.data() + (layout_.columns ? 0 : c) * K * period_;
        kernels_.reduce(gp, at.data(), K, n, tile, acc.data(), acc.data() + period_, period_);
      }, gathers(g));
      double* out = partial.data() + task * (K + 1) * width;
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t l = 0; l < period_; ++l) out[k * width + l % width] += acc[k * period_ + l];
    });
    for (int64_t task = 0; task < tasks_; ++task)
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t c = layout_.columns ? j : task / chunks_;
          (k == 0 ? sums[c] : dots[(k - 1) * C + c]) += partial[(task * (K + 1) + k) * width + j];
        }
  }

  // dx_k = a_k g + b_k (x_k - centre_k) + c_k where x_k is given, a_k g where it is null.
  void gradients(Slot<const T> g, const std::vector<const T*>& xs, const std::vector<T*>& dxs,
                 const std::vector<double>& a, const std::vector<double>& b, const std::vector<double>& c,
                 const std::vector<double>& centre) const {
    const int64_t K = xs.size();
    const std::vector<acc_t> ta = table(a), tb = table(b), tc = table(c), tm = table(centre);
    parallel(tasks_, K, [&](int64_t task) {
      std::vector<const T*> at(K);
      std::vector<T*> to(K);
      std::vector<T> buffer(gathers(g) ? block_ : 0);
      pieces(task, [&](int64_t begin, int64_t n, int64_t channel, int64_t slice) {
        for (int64_t k = 0; k < K; ++k) {
          at[k] = xs[k] ? xs[k] + begin : nullptr;
          to[k] = dxs[k] ? dxs[k] + begin : nullptr;
        }
        const T* gp = gradient_piece(g, begin, n, channel, slice, buffer);
        const int64_t t = (layout_.columns ? 0 : channel) * K * period_;
        kernels_.gradients(gp, at.data(), to.data(), K, n, ta.data() + t, tb.data() + t, tc.data() + t,
                           tm.data() + t, period_);
      }, gathers(g));
    });
  }

 private:
  template <typename F>
  void parallel(int64_t units, int64_t operands, F&& f) const {
    const int64_t each = (layout_.columns ? share_ : share_ * layout_.S) * std::max<int64_t>(operands, 1);
    const int64_t grain = std::max<int64_t>(2 * kTaskElements / std::max<int64_t>(each, 1), 1);
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) f(u);
    });
  }

  // Calls f(begin, n, channel, slice) for the consecutive pieces of a task: planes of one channel, or the pixels of
  // a task at once (in blocks when they pass through a buffer).
  template <typename F>
  void pieces(int64_t task, F&& f, bool in_blocks) const {
    if (layout_.columns) {
      const int64_t last = std::min((task + 1) * share_, layout_.elements());
      const int64_t step = in_blocks ? block_ : share_;
      for (int64_t begin = task * share_; begin < last; begin += step)
        f(begin, std::min(step, last - begin), int64_t{0}, int64_t{0});
      return;
    }
    const int64_t c = task / chunks_, first = task % chunks_ * share_, last = std::min(first + share_, layout_.N);
    for (int64_t n = first; n < last; ++n) f((n * layout_.C + c) * layout_.S, layout_.S, c, n);
  }

  template <typename U>
  bool gathers(const Slot<U>& slot) const {
    return layout_.columns && (slot.step != 1 || slot.channels != layout_.C);
  }

  template <typename U>
  U* plane(const Slot<U>& slot, int64_t slice, int64_t c) const {
    return slot.data + (slice * slot.channels + c * slot.step) * layout_.S;
  }

  const T* gradient_piece(const Slot<const T>& g, int64_t begin, int64_t n, int64_t c, int64_t slice,
                          std::vector<T>& buffer) const {
    if (!layout_.columns) return plane(g, slice, c);
    if (!gathers(g)) return g.data + begin;
    const int64_t C = layout_.C, first = begin / C;
    for (int64_t p = 0; p < n / C; ++p) {
      const T* row = g.data + (first + p) * g.channels;
      for (int64_t j = 0; j < C; ++j) buffer[p * C + j] = row[j * g.step];
    }
    return buffer.data();
  }

  // How many values of channel c a task has seen.
  double values_of(int64_t task, int64_t c) const {
    if (!layout_.columns) {
      const int64_t first = (task - c * chunks_) * share_;
      return static_cast<double>((std::min(first + share_, layout_.N) - first) * layout_.S);
    }
    return static_cast<double>((std::min((task + 1) * share_, layout_.elements()) - task * share_) / layout_.C);
  }

  void plane_task(const T* x, int64_t task, double* mean, double* m2) const {
    double total = 0;
    *mean = *m2 = 0;
    pieces(task, [&](int64_t begin, int64_t n, int64_t, int64_t) {
      double m, q;
      if (n == 0) return;
      kernels_.plane_statistics(x + begin, n, &m, &q);
      merge_statistics(mean, m2, total, m, q, n);
      total += n;
    }, false);
  }

  void column_task(const T* x, int64_t task, double* mean, double* m2) const {
    const int64_t begin = task * share_, n = std::min(begin + share_, layout_.elements()) - begin, C = layout_.C;
    std::vector<double> position(2 * period_);
    kernels_.column_statistics(x + begin, n, period_, position.data(), position.data() + period_);
    std::vector<double> total(C);
    for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
    for (int64_t l = 0; l < period_; ++l) {
      const double count = static_cast<double>(n / period_ + (l < n % period_ ? 1 : 0));
      if (count == 0) continue;
      merge_statistics(mean + l % C, m2 + l % C, total[l % C], position[l], position[period_ + l], count);
      total[l % C] += count;
    }
  }

  Layout layout_;
  const RangeKernels<T>& kernels_;
  int64_t period_;
  int64_t share_ = 1;   // columns: elements of a task; planes: slices of the batch
  int64_t block_ = 0;   // columns: elements of a block that passes through a buffer
  int64_t chunks_ = 1;  // planes: tasks of a channel
  int64_t tasks_ = 0;
};

}  // namespace fastnas
