// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions of one source, each with the pointwise convolution behind it: what lies between the two is
// made where it is used, forward and backward, and never leaves the cache.
//
// A unit here is what a pointwise convolution has to see at once: a slab of rows of all groups of planes of an image,
// or, where a vector has room for the channels of several images, of those in one group. Where channels neither fill
// vectors nor share one, they are filled up with channels whose weights are zero.
#pragma once
#include <utility>

#include "depthwise_group.h"
#include "made_statistics.h"

namespace fastnas {

template <typename T>
class Separable : Depthwise<T> {
  using Base = Depthwise<T>;
  using Base::g_, Base::x_;
  using Base::group_, Base::inputs_, Base::kernels_, Base::L_, Base::outputs_;
  using Base::output_, Base::slab_, Base::slabs_, Base::tables_, Base::taps_, Base::units_;
  using typename Base::Rows;

 public:
  using acc_t = acc_type<T>;
  using Weights = std::vector<const acc_t*>;
  using Sums = std::vector<std::vector<double>>;

  // How many channels the weights of a group are to have, if its tensors have `channels`.
  static int64_t filled(int64_t channels) {
    const int64_t lanes = plane_kernels<T>().lanes;
    return lanes % channels == 0 ? channels : (channels + lanes - 1) / lanes * lanes;
  }

  // The group has filled(channels).
  Separable(const DepthwiseGroup& group, bool columns, const Source& source, int64_t channels)
      : Base(group, columns, source, channels), groups_(tables_), blocks_(units_ / tables_) {}

  // depthwise[i]: (C, k, k); pointwise[i]: (C, C); ys[i]: (N, channels, oh, ow). made: means and biased variances of
  // every output, [outputs][2][channels], or null.
  void forward(const T* x, const Weights& depthwise, const Weights& pointwise,
               const std::vector<T*>& ys, double* made) const {
    const AlignedVector<acc_t> taps = this->weight_table(outputs_, depthwise);
    const AlignedVector<acc_t> matrices = matrix_table(pointwise, false);
    MadeStatistics<acc_t> statistics(made ? ys.size() : 0, blocks_, groups_ * L_);
    parallel(blocks_, 1, [&](Tasks::Worker& worker) {
      Buffers b(*this, false);
      typename MadeStatistics<acc_t>::Block values(statistics);
      for (int64_t block; worker.next(block);) {
        load_source(x, block, b);
        for (const Phase& p : outputs_) {
          write_output(p, b, taps.data(), matrices.data() + p.convolution * matrix_size(), block,
                       ys[p.convolution], made ? &values : nullptr);
          if (made) statistics.take(values, p.convolution, block);
        }
      }
    });
    if (made) fold_statistics(statistics, ys.size(), made);
  }

  // An output and the numbers that make its gradient of what is given as such (check.h), (4, channels); null
  // where a gradient is given.
  struct Carried {
    const T* output = nullptr;
    std::vector<double> values;
  };

  // grads[i] is null where the output has no gradient, dx where it is not needed; the gradients of weights are empty
  // where they are not.
  void backward(const std::vector<const T*>& grads, const std::vector<Carried>& carried, const T* x,
                const Weights& depthwise, const Weights& pointwise, T* dx, Sums& ddepthwise,
                Sums& dpointwise) const {
    const Tables tables{this->weight_table(outputs_, depthwise),
                        this->weight_table(inputs_, depthwise), matrix_table(pointwise, true),
                        carried_tables(carried)};
    const int64_t row = groups_ * taps_ * L_ + group_.size() * matrix_size();
    const int64_t each = blocks_per_task(row), tasks = (blocks_ + each - 1) / each;
    TaskSums partial(tasks, row);
    parallel(tasks, each, [&](Tasks::Worker& worker) {
      Buffers b(*this, true);
      AlignedVector<acc_t> running(row);
      for (int64_t task; worker.next(task);) {
        const int64_t last = std::min((task + 1) * each, blocks_);
        int64_t pending = 0;
        bool added = false;
        for (int64_t block = task * each; block < last; ++block) {
          differentiate(grads, carried, x, tables, dx, ddepthwise, dpointwise, block, b,
                        running.data());
          pending += slab_ * group_.ow;
          if (pending < kSumPixels && block + 1 < last) continue;
          pending = 0;
          partial.take(task, running.data(), std::exchange(added, true));
        }
      }
    });
    const double* total = partial.fold();
    this->distribute(total, ddepthwise);
    distribute_matrices(total + groups_ * taps_ * L_, dpointwise);
  }

 private:
  using Vector = AlignedVector<acc_t>;

  struct Tables {
    Vector outputs, inputs, matrices;
    std::vector<Vector> carried;
  };

  // Of all groups of a block: frames of x and of the gradient between the convolutions, rows of an output's gradient
  // with those around it, strips of what is between the convolutions and of an output.
  struct Buffers {
    std::vector<Vector> x, dx;
    Vector h, g, y, strip, out;
    AlignedVector<T> scratch;

    Buffers(const Separable& s, bool backward)
        : x(s.groups_, Vector(s.x_.elements())),
          dx(backward ? s.groups_ : 0, Vector(s.x_.rows * s.group_.W * s.L_)),
          h(backward ? s.groups_ * s.g_.elements() : 0),
          g(backward ? s.groups_ * s.gradient_size() : 0),
          y(backward ? s.gradient_size() : 0),
          strip(s.groups_ * s.strip_size()),
          out(backward ? 0 : s.groups_ * s.strip_size()),
          scratch(std::max(kStagePixels, std::max(s.group_.W, s.group_.ow)) * s.L_) {}
  };

  int64_t strip_rows() const { return this->staged_rows(group_.ow); }
  int64_t strip_size() const { return strip_rows() * group_.ow * L_; }
  int64_t gradient_size() const { return (g_.rows + 2 * g_.border) * group_.ow * L_; }
  int64_t matrix_size() const { return groups_ * group_.C * L_; }

  // The unit that depthwise convolutions know.
  int64_t unit(int64_t block, int64_t q) const {
    return (block / slabs_ * groups_ + q) * slabs_ + block % slabs_;
  }

  // f(row, c, i) for the entries of one matrix, where i is the place of (row, c) in what PlaneKernels::multiply takes:
  // lane l of group q is row q L + l or, where a vector has the channels of several images, row l mod C.
  template <typename F>
  void for_each_entry(F&& f) const {
    const int64_t C = group_.C, rows = std::min(C, L_);
    for (int64_t q = 0, i = 0; q < groups_; ++q)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < L_; l += rows)
          for (int64_t r = 0; r < rows; ++r, ++i) f(q * rows + r, c, i);
  }

  // Transposed for the gradients of what is multiplied.
  Vector matrix_table(const Weights& pointwise, bool transposed) const {
    const int64_t C = group_.C;
    Vector out(group_.size() * matrix_size());
    acc_t* to = out.data();
    for (const acc_t* w : pointwise) {
      for_each_entry([&](int64_t row, int64_t c, int64_t i) {
        to[i] = transposed ? w[c * C + row] : w[row * C + c];
      });
      to += matrix_size();
    }
    return out;
  }

  void load_source(const T* x, int64_t block, Buffers& b) const {
    for (int64_t q = 0; q < groups_; ++q) Base::load_source(x, unit(block, q), b.x[q], b.scratch);
  }

  // Rows of what is between the convolutions, into the strip.
  void convolve(const Phase& p, const acc_t* taps, int64_t row, int64_t rows, Buffers& b) const {
    const int64_t s = group_.stride, ow = group_.ow, x_row = x_.offset(s, 0);
    for (int64_t q = 0; q < groups_; ++q)
      kernels_.convolve[s - 1](b.x[q].data() + x_.inside() + row * x_row, x_row, p.offsets.data(),
                               taps + (q * taps_ + p.first) * L_, p.size(),
                               b.strip.data() + q * strip_size(), ow * L_, L_, rows, ow, false);
  }

  // values, if any, gets what is written.
  void write_output(const Phase& p, Buffers& b, const acc_t* taps, const acc_t* matrix,
                    int64_t block, T* y, typename MadeStatistics<acc_t>::Block* values) const {
    const int64_t ow = group_.ow, C = group_.C, rows = this->rows_of(block);
    const int64_t first = block % slabs_ * slab_, image = block / slabs_;
    const auto multiply = [&](int64_t n, acc_t* to, int64_t group, int64_t step) {
      kernels_.multiply(b.strip.data(), strip_size(), 0, matrix, C, C, to, group, 0, step, 1,
                        n * ow);
    };
    for (int64_t r = 0; r < rows; r += strip_rows()) {
      const int64_t n = std::min(strip_rows(), rows - r);
      convolve(p, taps, r, n, b);
      if constexpr (std::is_same_v<T, acc_t>)
        if (output_.columns && output_.C == C &&
            C % L_ == 0) {  // vectors of a pixel follow each other in memory
          T* to = y + (image * group_.oh + first + r) * ow * C;
          multiply(n, to, L_, C);
          if (values) values->add(to, n * ow, C, 0);
          continue;
        }
      multiply(n, b.out.data(), strip_size(), L_);
      if (values) values->add(b.out.data(), n * ow, L_, strip_size());
      for (int64_t q = 0; q < groups_; ++q)
        this->unpack(output_, b.out.data() + q * strip_size(), unit(block, q), first + r, n, y,
                     b.scratch);
    }
  }

  // A block has lanes of one image, or of one group of planes whose last one may be short.
  void fold_statistics(const MadeStatistics<acc_t>& statistics, int64_t outputs,
                       double* made) const {
    const int64_t C = output_.C, lanes = groups_ * L_;
    const auto present = [&](int64_t block) {
      return group_.C >= L_ ? C : std::min(lanes, output_.planes - unit(block, 0) / slabs_ * L_);
    };
    parallel_tasks(outputs, 1, [&](Tasks::Worker& worker) {
      for (int64_t i; worker.next(i);)
        statistics.fold(
            i, C, [](int64_t) { return 0; }, present, made + 2 * i * C, made + (2 * i + 1) * C);
    });
  }

  void differentiate(const std::vector<const T*>& grads, const std::vector<Carried>& carried,
                     const T* x, const Tables& tables, T* dx, const Sums& ddepthwise,
                     const Sums& dpointwise, int64_t block, Buffers& b, acc_t* sums) const {
    const int64_t s = group_.stride, rows = this->rows_of(block);
    const int64_t height = std::min(s * slab_, group_.H - block % slabs_ * slab_ * s);
    load_source(x, block, b);
    for (int64_t q = 0; dx && q < groups_; ++q)
      std::fill_n(b.dx[q].data(), height * group_.W * L_, acc_t{});
    for (const Phase& p : outputs_) {
      const int64_t i = p.convolution;
      const bool between = dx || !ddepthwise[i].empty(), matrix = !dpointwise[i].empty();
      if (!grads[i] || (!between && !matrix)) continue;
      const Rows loaded = load_gradient(grads[i], carried[i].output, tables.carried[i], block, b);
      if (matrix)
        add_matrix(p, tables.outputs.data(), block, loaded, b,
                   sums + groups_ * taps_ * L_ + i * matrix_size());
      if (!between) continue;
      multiply_transposed(tables.matrices.data() + i * matrix_size(), loaded, b);
      for (int64_t q = 0; q < groups_; ++q) {
        const acc_t* h = b.h.data() + q * g_.elements() + g_.inside();
        if (!ddepthwise[i].empty())
          kernels_.correlate[s - 1](h, g_.offset(1, 0), b.x[q].data() + x_.inside(),
                                    x_.offset(s, 0), p.offsets.data(), p.size(),
                                    sums + (q * taps_ + p.first) * L_, rows, group_.ow);
        if (dx) this->add_gradient(i, h, tables.inputs.data() + q * taps_ * L_, height, b.dx[q]);
      }
    }
    for (int64_t q = 0; dx && q < groups_; ++q)
      this->store_gradient(b.x[q], b.dx[q], unit(block, q), dx, b.scratch);
  }

  // The rows of a block and those around it that the border asks for, without gaps.
  Rows load_gradient(const T* g, const T* y, const Vector& carried, int64_t block,
                     Buffers& b) const {
    const Rows rows = this->rows_loaded(g_, output_, block, 1);
    const int64_t ow = group_.ow, count = rows.last - rows.first;
    for (int64_t q = 0; q < groups_; ++q) {
      acc_t* to = b.g.data() + q * gradient_size();
      if (!y) {
        this->pack(output_, g, unit(block, q), rows.first, count, to, ow, false, b.scratch);
        continue;
      }
      const auto [planes, plane, offset] = this->place(output_, unit(block, q));
      const auto run = [&](const acc_t* numbers) {
        kernels_.pack_carried(planes, g + offset, y + offset, plane, rows.first, count, to, numbers,
                              b.y.data(), b.scratch.data());
      };
      if (planes.planes - plane >= L_) {
        run(carried.data() + q * 4 * L_);
        continue;
      }
      Vector some(carried.begin() + q * 4 * L_, carried.begin() + (q + 1) * 4 * L_);
      for (int64_t j = 0; j < 4; ++j)  // lanes behind the last plane stay zero
        std::fill_n(some.data() + j * L_ + planes.planes - plane, L_ - planes.planes + plane, 0);
      run(some.data());
    }
    return rows;
  }

  // For every group four vectors; zeros for channels that fill up the tensors'.
  std::vector<Vector> carried_tables(const std::vector<Carried>& carried) const {
    std::vector<Vector> out;
    for (const Carried& each : carried) {
      Vector& table = out.emplace_back(each.output ? groups_ * 4 * L_ : 0);
      const int64_t C = each.values.size() / 4;
      for (int64_t q = 0; each.output && q < groups_; ++q)
        for (int64_t j = 0; j < 4; ++j)
          for (int64_t l = 0; l < L_; ++l) {
            const int64_t c = (q * L_ + l) % group_.C;
            if (c < C) table[(q * 4 + j) * L_ + l] = static_cast<acc_t>(each.values[j * C + c]);
          }
    }
    return out;
  }

  // The gradient of what is between the convolutions, inside its frames.
  void multiply_transposed(const acc_t* matrix, const Rows& rows, Buffers& b) const {
    const int64_t size = g_.elements(), ow = group_.ow;
    for (int64_t q = 0; q < groups_; ++q) this->clear_outside(g_, rows, b.h.data() + q * size);
    kernels_.multiply(b.g.data(), gradient_size(), ow * L_, matrix, group_.C, group_.C,
                      b.h.data() + g_.offset(rows.first - rows.top, g_.border), size,
                      g_.offset(1, 0), L_, rows.last - rows.first, ow);
  }

  // Adds the gradient of a pointwise convolution, whose input is convolved once more.
  void add_matrix(const Phase& p, const acc_t* taps, int64_t block, const Rows& loaded, Buffers& b,
                  acc_t* sums) const {
    const int64_t ow = group_.ow, rows = this->rows_of(block);
    const acc_t* g = b.g.data() + (block % slabs_ * slab_ - loaded.first) * ow * L_;
    for (int64_t r = 0; r < rows; r += strip_rows()) {
      const int64_t n = std::min(strip_rows(), rows - r);
      convolve(p, taps, r, n, b);
      kernels_.outer(g + r * ow * L_, gradient_size(), group_.C, b.strip.data(), strip_size(),
                     group_.C, sums, n * ow);
    }
  }

  // Neighbouring blocks, as many as leave the sums of all tasks a bounded size.
  int64_t blocks_per_task(int64_t row) const {
    const int64_t most = std::clamp<int64_t>(kSums / row, 16, kSumTasks);
    return std::max((blocks_ + most - 1) / most,
                    std::max<int64_t>(kSumPixels / (slab_ * group_.ow), 1));
  }

  void distribute_matrices(const double* from, Sums& dws) const {
    for (std::vector<double>& dw : dws) {
      if (!dw.empty())
        for_each_entry(
            [&](int64_t row, int64_t c, int64_t i) { dw[row * group_.C + c] += from[i]; });
      from += matrix_size();
    }
  }

  template <typename F>
  void parallel(int64_t tasks, int64_t blocks, F&& f) const {
    const int64_t work = groups_ * (taps_ + group_.size() * group_.C);
    const int64_t each = blocks * slab_ * group_.ow * std::max<int64_t>(work, 1);
    parallel_tasks(tasks, std::max<int64_t>(Base::kGrain / each, 1), f);
  }

  int64_t groups_, blocks_;
};

}  // namespace fastnas
