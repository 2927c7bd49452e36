// SPDX-License-Identifier: Apache-2.0
// Passes over memory with several sums of the same operands at once: a block of each operand is read from memory once.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "mix.h"

namespace fastnas {

constexpr int64_t kTargetBlockElements =
    512;  // of each operand: what stays in the first-level cache of dozens of them

// ys[t] = bias[t] + sum_k coef[t][k] xs[k] + own_coef[t] own[t] per channel: coef [ys][xs][C], own_coef and bias
// [ys][C]. own[t] is null where a sum has no operand of its own; an operand whose coefficients are all 0 is left out.
template <typename T>
struct Sums {
  std::vector<const T*> xs;
  std::vector<T*> ys;
  std::vector<const T*> own;
  std::vector<double> coef, own_coef, bias;

  // One more: a [xs][C] and c [C], without an operand of its own or with x and its b [C].
  void add(T* y, const std::vector<double>& a, const std::vector<double>& c, const T* x = nullptr,
           const std::vector<double>& b = {}) {
    ys.push_back(y);
    own.push_back(std::any_of(b.begin(), b.end(), [](double v) { return v != 0; }) ? x : nullptr);
    coef.insert(coef.end(), a.begin(), a.end());
    bias.insert(bias.end(), c.begin(), c.end());
    own_coef.insert(own_coef.end(), b.begin(), b.end());
    own_coef.resize(bias.size());
  }
};

template <typename T>
class MultiTargetMix : public Mix<T> {
 public:
  using typename Mix<T>::acc_t;

  explicit MultiTargetMix(Layout layout) : Mix<T>(layout) {
    this->block_ = std::max<int64_t>(kTargetBlockElements / this->period_, 1) * this->period_;
  }

  void combine(const Sums<T>& sums) const {
    const Prepared all(*this, sums);
    this->parallel(this->tasks_, all.operands(), [&](int64_t task) {
      blocks(task, [&](int64_t begin, int64_t n, int64_t c) {
        this->kernels_.combine_targets(all.at(c), begin, n, this->period_);
      });
    });
  }

  // For every g: sums[g][C] = sum g and dots[g][K][C] = sum g (x_k - centre_k), those of null xs left alone; and, in
  // the same pass, other sums that need nothing of it.
  void reduce(const std::vector<const T*>& gs, const std::vector<const T*>& xs,
              const std::vector<double>& centre, std::vector<std::vector<double>>& sums,
              std::vector<std::vector<double>>& dots, const Sums<T>& others) const {
    const int64_t K = xs.size(), G = gs.size(), period = this->period_, width = this->width_,
                  rows = G * (K + 1), tile = rows * period;
    const std::vector<acc_t> m = this->table(centre);
    const Prepared also(*this, others);
    std::vector<double> partial(this->tasks_ * rows * width);
    this->parallel(this->tasks_, G + K + also.operands(), [&](int64_t task) {
      const int64_t first = this->range(task).c0;
      std::vector<acc_t> acc(tile * this->tiles());
      blocks(task, [&](int64_t begin, int64_t n, int64_t c) {
        this->kernels_.reduce_targets(
            gs.data(), G, xs.data(), K, begin, n, m.data() + c * K * period,
            acc.data() + (this->layout_.columns ? 0 : c - first) * tile, period);
        this->kernels_.combine_targets(also.at(c), begin, n, period);
      });
      for (int64_t i = 0; i < rows; ++i)
        this->fold(acc.data() + i * period, tile, partial.data() + (task * rows + i) * width);
    });
    for (int64_t i = 0; i < this->tasks_ * rows; ++i) {
      const auto r = this->range(i / rows);
      const int64_t g = i % rows / (K + 1), k = i % (K + 1), C = this->layout_.C;
      for (int64_t c = r.c0; c < r.c1; ++c)
        (k == 0 ? sums[g][c] : dots[g][(k - 1) * C + c]) += partial[i * width + c - r.c0];
    }
  }

 private:
  // Sums with their tables.
  class Prepared {
   public:
    Prepared(const MultiTargetMix& mix, const Sums<T>& sums)
        : sums_(sums),
          period_(mix.period_),
          coef_(mix.table(sums.coef)),
          own_coef_(mix.table(sums.own_coef)),
          bias_(mix.table(sums.bias)) {
      const int64_t K = sums.xs.size(), targets = sums.ys.size(), C = mix.layout_.C;
      users_.resize((targets + kTargetGroup - 1) / kTargetGroup * K);
      for (int64_t t = 0; t < targets; ++t)
        for (int64_t k = 0; k < K; ++k)
          if (uses(sums.coef.data() + (t * K + k) * C, C))
            users_[t / kTargetGroup * K + k] |= 1 << t % kTargetGroup;
    }

    int64_t operands() const { return sums_.xs.size() + 2 * sums_.ys.size(); }

    // As the kernel has them for a channel.
    TargetSums<T> at(int64_t c) const {
      const int64_t K = sums_.xs.size(), targets = sums_.ys.size(), row = targets * period_;
      return {K,
              targets,
              sums_.xs.data(),
              sums_.ys.data(),
              sums_.own.data(),
              users_.data(),
              coef_.data() + c * K * row,
              own_coef_.data() + c * row,
              bias_.data() + c * row};
    }

   private:
    static bool uses(const double* coef, int64_t C) {
      return std::any_of(coef, coef + C, [](double a) { return a != 0; });
    }

    const Sums<T>& sums_;
    int64_t period_;
    std::vector<acc_t> coef_, own_coef_, bias_;
    std::vector<uint8_t> users_;
  };

  // Calls f(begin, n, channel) for the pieces of a task, none longer than a block.
  template <typename F>
  void blocks(int64_t task, F&& f) const {
    this->pieces(task, true, [&](int64_t begin, int64_t n, int64_t c, int64_t) {
      for (int64_t i = 0; i < n; i += this->block_) f(begin + i, std::min(this->block_, n - i), c);
    });
  }
};

}  // namespace fastnas
