// SPDX-License-Identifier: Apache-2.0
// Mean and variance of outputs, taken of every piece while it is still in the cache: the BatchNorm behind them would
// have to read them from memory.
//
// A block is what one thread makes in one go, one image of one output or several channels of it, in lanes: values of
// one channel each. Blocks are folded one after the other in double, so that results are the same for every number of
// threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "aligned.h"
#include "range.h"

namespace fastnas {

template <typename A>
class MadeStatistics {
 public:
  MadeStatistics(int64_t outputs, int64_t blocks, int64_t lanes)
      : kernels_(range_kernels<A>()),
        blocks_(blocks),
        lanes_(lanes),
        partial_(new double[outputs * blocks * (2 * lanes + 1)]) {}  // not zeroed

  // Of one block of one output.
  class Block {
   public:
    explicit Block(const MadeStatistics& s)
        : kernels_(s.kernels_), lanes_(s.lanes_), running_(3 * lanes_), sums_(2 * lanes_) {}

    // `pixels` more values of every lane: tables of `width` lanes a pixel, the next lanes' `distance` behind.
    void add(const A* x, int64_t pixels, int64_t width, int64_t distance) {
      A *centre = running_.data(), *first = centre + lanes_, *second = first + lanes_;
      if (count_ == 0) centre_at_mean(x, pixels, width, distance);
      for (int64_t l = 0; l < lanes_; l += width, x += distance)
        kernels_.deviations(x, pixels * width, centre + l, first + l, second + l, width);
      count_ += pixels;
      pending_ += pixels;
      if (pending_ >= kPending) flush();
    }

   private:
    friend class MadeStatistics;

    // Close to the mean of all, so that nothing cancels: a piece is never less than a sixty-fourth of a block, and so
    // its mean within eight standard deviations.
    void centre_at_mean(const A* x, int64_t pixels, int64_t width, int64_t distance) {
      A* centre = running_.data();
      std::fill_n(centre, lanes_, A{});
      for (int64_t l = 0; l < lanes_; l += width, x += distance)
        kernels_.sums(x, pixels * width, centre + l, width);
      for (int64_t l = 0; l < lanes_; ++l) {
        const A mean = centre[l] / static_cast<A>(pixels);
        centre[l] = std::isfinite(mean) ? mean : A{};
      }
    }

    void flush() {
      A* from = running_.data() + lanes_;
      for (int64_t i = 0; i < 2 * lanes_; ++i) {
        sums_[i] += from[i];
        from[i] = A{};
      }
      pending_ = 0;
    }

    static constexpr int64_t kPending = 1024;  // values before they are added in double

    const RangeKernels<A>& kernels_;
    int64_t lanes_, count_ = 0, pending_ = 0;
    AlignedVector<A> running_;  // centres; sums of deviations from them and of their squares
    std::vector<double> sums_;
  };

  // Notes what a block has, and begins it anew.
  void take(Block& b, int64_t output, int64_t block) {
    b.flush();
    double* to = partial_.get() + (output * blocks_ + block) * (2 * lanes_ + 1);
    *to++ = static_cast<double>(b.count_);
    for (int64_t l = 0; l < lanes_; ++l)
      deviation_statistics(b.running_[l], b.sums_[l], b.sums_[lanes_ + l], b.count_, to + l,
                           to + lanes_ + l);
    std::fill(b.sums_.begin(), b.sums_.end(), 0.0);
    b.count_ = 0;
  }

  // Means and biased variances of an output's C channels. first(block): channel of a block's first lane, those of the
  // next ones follow, and begin again after the last; present(block): its lanes that are there.
  template <typename First, typename Present>
  void fold(int64_t output, int64_t C, First&& first, Present&& present, double* mean,
            double* var) const {
    std::vector<double> total(C);
    std::fill_n(mean, C, 0.0);
    std::fill_n(var, C, 0.0);
    const double* from = partial_.get() + output * blocks_ * (2 * lanes_ + 1);
    for (int64_t block = 0; block < blocks_; ++block, from += 2 * lanes_ + 1) {
      const double count = from[0];
      int64_t c = first(block);
      for (int64_t l = 0, n = present(block); l < n; c = 0)
        for (; l < n && c < C; ++l, ++c) {
          merge_statistics(mean + c, var + c, total[c], from[1 + l], from[1 + lanes_ + l], count);
          total[c] += count;
        }
    }
    for (int64_t c = 0; c < C; ++c) var[c] /= total[c];
  }

 private:
  const RangeKernels<A>& kernels_;
  int64_t blocks_, lanes_;
  // Of a block: how many values a lane has, means, squared deviations.
  std::unique_ptr<double[]> partial_;
};

}  // namespace fastnas
