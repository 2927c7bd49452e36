// SPDX-License-Identifier: Apache-2.0
// Passes over memory with several sums at once: they take turns at blocks that stay in the cache, so that an operand of
// all of them is read from memory once.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "mix.h"

namespace fastnas {

// y = bias + sum_i coef[i] xs[i] per channel: coef [xs][C], bias [C].
template <typename T>
struct Sum {
  T* y;
  std::vector<const T*> xs;
  std::vector<double> coef, bias;
};

template <typename T>
class MultiTargetMix : public Mix<T> {
 public:
  using typename Mix<T>::acc_t;

  explicit MultiTargetMix(Layout layout) : Mix<T>(layout), zeros_(this->block_) {}

  void combine(const std::vector<Sum<T>>& sums) const {
    const std::vector<Prepared> all = prepare(sums);
    this->parallel(this->tasks_, operands_of(sums), [&](int64_t task) {
      std::vector<const T*> at;
      blocks(task,
             [&](int64_t begin, int64_t n, int64_t c) { combine_block(all, begin, n, c, at); });
    });
  }

  // For every g: sums[g][C] = sum g and dots[g][K][C] = sum g (x_k - centre_k), those of null xs left alone; and, in
  // the same pass, other sums that need nothing of it.
  void reduce(const std::vector<const T*>& gs, const std::vector<const T*>& xs,
              const std::vector<double>& centre, std::vector<std::vector<double>>& sums,
              std::vector<std::vector<double>>& dots, const std::vector<Sum<T>>& others) const {
    const int64_t K = xs.size(), G = gs.size(), period = this->period_, width = this->width_,
                  row = (K + 1) * width, tile = (K + 1) * period, tiles = this->tiles();
    const std::vector<acc_t> m = this->table(centre);
    const std::vector<Prepared> also = prepare(others);
    std::vector<double> partial(this->tasks_ * G * row);
    this->parallel(this->tasks_, G + K + operands_of(others), [&](int64_t task) {
      const int64_t first = this->range(task).c0;
      std::vector<acc_t> acc(G * tile * tiles);
      std::vector<const T*> at(K), scratch;
      blocks(task, [&](int64_t begin, int64_t n, int64_t c) {
        for (int64_t k = 0; k < K; ++k) at[k] = xs[k] ? xs[k] + begin : nullptr;
        for (int64_t g = 0; g < G; ++g) {
          acc_t* sum = acc.data() + (g * tiles + (this->layout_.columns ? 0 : c - first)) * tile;
          this->kernels_.reduce(gs[g] + begin, at.data(), K, n, m.data() + c * K * period, sum,
                                sum + period, period);
        }
        combine_block(also, begin, n, c, scratch);
      });
      for (int64_t g = 0; g < G; ++g)
        for (int64_t k = 0; k <= K; ++k)
          this->fold(acc.data() + g * tiles * tile + k * period, tile,
                     partial.data() + (task * G + g) * row + k * width);
    });
    for (int64_t i = 0; i < this->tasks_ * G; ++i) {
      const auto r = this->range(i / G);
      const int64_t g = i % G, C = this->layout_.C;
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t c = r.c0; c < r.c1; ++c)
          (k == 0 ? sums[g][c] : dots[g][(k - 1) * C + c]) +=
              partial[i * row + k * width + c - r.c0];
    }
  }

 private:
  // A Sum with its tables. One of nothing is that of zeros.
  struct Prepared {
    T* y;
    std::vector<const T*> xs;
    std::vector<acc_t> coef, bias;
  };

  std::vector<Prepared> prepare(const std::vector<Sum<T>>& sums) const {
    std::vector<Prepared> out;
    const std::vector<double> none(this->layout_.C);
    for (const Sum<T>& s : sums)
      out.push_back({s.y, s.xs, this->table(s.xs.empty() ? none : s.coef), this->table(s.bias)});
    return out;
  }

  static int64_t operands_of(const std::vector<Sum<T>>& sums) {
    int64_t count = 0;
    for (const Sum<T>& s : sums) count += 1 + s.xs.size();
    return count;
  }

  void combine_block(const std::vector<Prepared>& sums, int64_t begin, int64_t n, int64_t c,
                     std::vector<const T*>& at) const {
    for (const Prepared& s : sums) {
      at.clear();
      for (const T* x : s.xs) at.push_back(x + begin);
      if (at.empty()) at.push_back(zeros_.data());
      const int64_t K = at.size();
      this->kernels_.combine(at.data(), K, s.y + begin, n, s.coef.data() + c * K * this->period_,
                             s.bias.data() + c * this->period_, this->period_);
    }
  }

  // Calls f(begin, n, channel) for the pieces of a task, none longer than a block.
  template <typename F>
  void blocks(int64_t task, F&& f) const {
    this->pieces(task, true, [&](int64_t begin, int64_t n, int64_t c, int64_t) {
      for (int64_t i = 0; i < n; i += this->block_) f(begin + i, std::min(this->block_, n - i), c);
    });
  }

  std::vector<T> zeros_;
};

}  // namespace fastnas
