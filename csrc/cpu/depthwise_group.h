// SPDX-License-Identifier: Apache-2.0
// The kernels of planes.h over whole tensors: split into tasks, run in parallel, partial sums folded in a fixed order.
// A task's share depends on sizes alone, never on the number of threads, so results do not either.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../depthwise.h"
#include "aligned.h"
#include "planes.h"
#include "tasks.h"

namespace fastnas {

constexpr int64_t kSlabPixels = 4096;  // of an output: what is packed at once
constexpr int64_t kStagePixels = 128;  // on their way to memory
constexpr int64_t kSumPixels = 1024;   // that a sum runs over before it is folded in double
constexpr int64_t kSumTasks = 128;     // at most, each with sums of its own
constexpr int64_t kSums = 1 << 21;     // of all tasks, unless that left too few of them

// Packed rows of one group of planes inside a border of zeros.
struct Frame {
  int64_t border, rows, width, lanes;

  int64_t pitch() const { return width + 2 * border; }
  int64_t offset(int64_t y, int64_t x) const { return (y * pitch() + x) * lanes; }
  int64_t inside() const { return offset(border, border); }
  int64_t elements() const { return offset(rows + 2 * border, 0); }
};

// Taps of one convolution that meet the same pixels, and where they meet them. With stride 2, dx has four interleaved
// phases of pixels, each with taps of its own; an output has one phase.
struct Phase {
  int64_t convolution, py, px;
  int64_t first;  // of its rows in a table of weights or sums
  std::vector<int64_t> taps, offsets;

  int64_t size() const { return taps.size(); }
};

// What the convolutions read: x, max(x, 0), or max(scale x + shift, 0) with a scale and a shift a channel.
struct Source {
  bool relu;
  const std::vector<double>*scale = nullptr, *shift = nullptr;
};

template <typename T>
class Depthwise {
 public:
  using acc_t = acc_type<T>;

  // channels: of the tensors, where those of the group fill up whole vectors of every image.
  Depthwise(const DepthwiseGroup& group, bool columns, const Source& source, int64_t channels)
      : group_(group), kernels_(plane_kernels<T>()), relu_(source.relu), L_(kernels_.lanes) {
    const DepthwiseGroup& g = group;
    source_ = {g.N * channels, channels, g.H, g.W, columns || g.H * g.W == 1};
    output_ = {g.N * channels, channels, g.oh, g.ow, columns || g.oh * g.ow == 1};
    tables_ = std::lcm(g.C, L_) / L_;
    slab_ = std::clamp<int64_t>(kSlabPixels / g.ow, 1, g.oh);
    slabs_ = (g.oh + slab_ - 1) / slab_;
    units_ = (g.N * g.C + L_ - 1) / L_ * slabs_;
    make_phases();
    for (int64_t j = 0; source.scale && j < tables_; ++j)
      for (const std::vector<double>* values : {source.scale, source.shift})
        for (int64_t l = 0; l < L_; ++l)
          normal_.push_back(static_cast<acc_t>((*values)[(j * L_ + l) % g.C]));
  }

  Depthwise(const DepthwiseGroup& group, bool columns, const Source& source)
      : Depthwise(group, columns, source, group.C) {}

  // ys[i]: (N, C, oh, ow); weights[i]: (C, k, k).
  void forward(const T* x, const std::vector<const acc_t*>& weights,
               const std::vector<T*>& ys) const {
    const AlignedVector<acc_t> table = weight_table(outputs_, weights);
    parallel(units_, 1, [&](Tasks::Worker& worker) {
      Buffers b(*this, false);
      for (int64_t unit; worker.next(unit);) {
        load_source(x, unit, b.x, b.scratch);
        const acc_t* w = table.data() + unit / slabs_ % tables_ * taps_ * L_;
        for (const Phase& p : outputs_) write_output(p, b, w, unit, ys[p.convolution]);
      }
    });
  }

  // grads[i] is null where the output has no gradient, dx where it is not needed, x where nothing reads it; dws[i]
  // (C, k, k) is empty where it is not needed.
  void backward(const std::vector<const T*>& grads, const T* x,
                const std::vector<const acc_t*>& weights, T* dx,
                std::vector<std::vector<double>>& dws) const {
    const AlignedVector<acc_t> table = weight_table(inputs_, weights);
    const int64_t each = units_per_task(), tasks = (units_ + each - 1) / each;
    const int64_t slots = std::min(tables_, each), row = taps_ * L_;
    std::vector<double> partial(tasks * slots * row);
    parallel(tasks, each, [&](Tasks::Worker& worker) {
      Buffers b(*this, true);
      AlignedVector<acc_t> running(slots * row);
      std::vector<int64_t> pending(slots);
      for (int64_t task; worker.next(task);) {
        const int64_t first = task * each, last = std::min(first + each, units_);
        for (int64_t unit = first; unit < last; ++unit) {
          const int64_t slot = slot_of(unit, first);
          acc_t* sums = running.data() + slot * row;
          load_and_differentiate(grads, x, table.data(), dx, dws, unit, b, sums);
          pending[slot] += slab_ * group_.ow;
          if (pending[slot] < kSumPixels && last - unit > slots) continue;
          pending[slot] = 0;
          double* total = partial.data() + (task * slots + slot) * row;
          for (int64_t i = 0; i < row; ++i) total[i] += sums[i];
          std::fill_n(sums, row, acc_t{});
        }
      }
    });
    fold(partial, each, slots, dws);
  }

 protected:
  struct Buffers {
    AlignedVector<acc_t> x, g, dx, stage;
    AlignedVector<T> scratch;

    Buffers(const Depthwise& d, bool backward)
        : x(d.x_.elements()),
          g(backward ? d.g_.elements() : 0),
          dx(backward ? d.x_.rows * d.group_.W * d.L_ : 0),
          stage(backward ? 0 : d.staged_rows(d.group_.ow) * d.group_.ow * d.L_),
          scratch(std::max(kStagePixels, d.group_.W) * d.L_) {}
  };

  static int64_t distance(const Convolution& c, int64_t i) { return i * c.dilation - c.padding(); }

  // Whether a row or column of taps meets x from any output: with large dilations it may not.
  bool meets(int64_t distance, int64_t size, int64_t out) const {
    return distance < size && group_.stride * (out - 1) + distance >= 0;
  }

  void make_phases() {
    const int64_t s = group_.stride;
    int64_t border = 0;
    for (int64_t i = 0; i < group_.size(); ++i) {
      const Convolution& c = group_.convolutions[i];
      Phase phase{i, 0, 0, taps_, {}, {}};
      for (int64_t t = 0; t < c.taps(); ++t) {
        const int64_t y = distance(c, t / c.k), x = distance(c, t % c.k);
        if (!meets(y, group_.H, group_.oh) || !meets(x, group_.W, group_.ow)) continue;
        phase.taps.push_back(t);
        border = std::max({border, std::abs(y), std::abs(x)});
      }
      taps_ += phase.size();
      outputs_.push_back(phase);
    }
    x_ = {border, s * slab_, s * group_.ow, L_};
    g_ = {(border + s - 1) / s, slab_, group_.ow, L_};
    int64_t first = 0;
    for (Phase& p : outputs_) {
      const Convolution& c = group_.convolutions[p.convolution];
      for (int64_t t : p.taps)
        p.offsets.push_back(x_.offset(distance(c, t / c.k), distance(c, t % c.k)));
      for (int64_t py = 0; py < s; ++py)
        for (int64_t px = 0; px < s; ++px) {
          // Pixel s r + p of x meets g at r + (p - distance) / s, where that is whole.
          Phase phase{p.convolution, py, px, first, {}, {}};
          for (int64_t t : p.taps) {
            const int64_t y = py - distance(c, t / c.k), x = px - distance(c, t % c.k);
            if (y % s || x % s) continue;
            phase.taps.push_back(t);
            phase.offsets.push_back(g_.offset(y / s, x / s));
          }
          first += phase.size();
          if (phase.size()) inputs_.push_back(phase);
        }
    }
  }

  // The weight of every tap for every lane, for all groups of planes that have different channels.
  AlignedVector<acc_t> weight_table(const std::vector<Phase>& phases,
                                    const std::vector<const acc_t*>& weights) const {
    AlignedVector<acc_t> out;
    out.reserve(tables_ * taps_ * L_);
    for (int64_t j = 0; j < tables_; ++j)
      for (const Phase& p : phases) {
        const int64_t size = group_.convolutions[p.convolution].taps();
        for (int64_t t : p.taps)
          for (int64_t l = 0, c = j * L_ % group_.C; l < L_; ++l, c = c + 1 < group_.C ? c + 1 : 0)
            out.push_back(weights[p.convolution][c * size + t]);
      }
    return out;
  }

  int64_t rows_of(int64_t unit) const { return std::min(slab_, group_.oh - unit % slabs_ * slab_); }
  int64_t staged_rows(int64_t width) const { return std::max<int64_t>(kStagePixels / width, 1); }

  // In the tensor: where the buffer begins (perhaps above the image), and the first and last row that it gets.
  struct Rows {
    int64_t top, first, last;
  };
  Rows rows_loaded(const Frame& f, const Planes& planes, int64_t unit, int64_t stride) const {
    const int64_t top = unit % slabs_ * slab_ * stride - f.border;
    return {top, std::max<int64_t>(top, 0), std::min(top + f.rows + 2 * f.border, planes.H)};
  }

  // What the convolutions of a unit read. The border stays zero: it pads what was normalised.
  void load_source(const T* x, int64_t unit, AlignedVector<acc_t>& buffer,
                   AlignedVector<T>& scratch) const {
    load(x_, source_, x, unit, group_.stride, relu_ && normal_.empty(), buffer, scratch);
    if (normal_.empty()) return;
    const auto [top, r0, r1] = rows_loaded(x_, source_, unit, group_.stride);
    const acc_t* scale = normal_.data() + unit / slabs_ % tables_ * 2 * L_;
    kernels_.normalise(buffer.data() + x_.offset(r0 - top, x_.border), x_.offset(1, 0), r1 - r0,
                       group_.W, scale, scale + L_);
  }

  // Only where images are cut is there anything but zeros.
  void clear_outside(const Frame& f, const Rows& rows, acc_t* buffer) const {
    if (slabs_ == 1) return;
    std::fill_n(buffer, f.offset(rows.first - rows.top, 0), acc_t{});
    std::fill(buffer + f.offset(rows.last - rows.top, 0), buffer + f.elements(), acc_t{});
  }

  // Where the planes of a unit are: the L from `plane` on, of all or of those of one image.
  struct Place {
    Planes planes;
    int64_t plane, offset;
  };
  Place place(const Planes& planes, int64_t unit) const {
    const int64_t group = unit / slabs_, C = planes.C;
    if (C == group_.C) return {planes, group * L_, 0};
    const int64_t each = group_.C / L_, image = group / each;
    return {{C, C, planes.H, planes.W, planes.columns},
            group % each * L_,
            image * C * planes.H * planes.W};
  }

  void pack(const Planes& planes, const T* x, int64_t unit, int64_t row, int64_t rows, acc_t* to,
            int64_t pitch, bool relu, AlignedVector<T>& scratch) const {
    const Place p = place(planes, unit);
    kernels_.pack(p.planes, x + p.offset, p.plane, row, rows, to, pitch, relu, scratch.data());
  }

  void unpack(const Planes& planes, const acc_t* from, int64_t unit, int64_t row, int64_t rows,
              T* y, AlignedVector<T>& scratch) const {
    const Place p = place(planes, unit);
    kernels_.unpack(p.planes, from, p.plane, row, rows, y + p.offset, scratch.data());
  }

  // The rows of a unit and as many around them as the border has. Rows outside of the image are zeros.
  void load(const Frame& f, const Planes& planes, const T* from, int64_t unit, int64_t stride,
            bool relu, AlignedVector<acc_t>& buffer, AlignedVector<T>& scratch) const {
    const Rows rows = rows_loaded(f, planes, unit, stride);
    const auto [top, r0, r1] = rows;
    clear_outside(f, rows, buffer.data());
    pack(planes, from, unit, r0, r1 - r0, buffer.data() + f.offset(r0 - top, f.border), f.pitch(),
         relu, scratch);
  }

  void write_output(const Phase& p, Buffers& b, const acc_t* w, int64_t unit, T* y) const {
    const int64_t s = group_.stride, ow = group_.ow, C = group_.C, plane = unit / slabs_ * L_;
    const int64_t row = unit % slabs_ * slab_, rows = rows_of(unit), x_row = x_.offset(s, 0);
    const acc_t* x = b.x.data() + x_.inside();
    w += p.first * L_;
    const auto convolve = [&](int64_t r, int64_t n, acc_t* to, int64_t step) {
      kernels_.convolve[s - 1](x + r * x_row, x_row, p.offsets.data(), w, p.size(), to, ow * step,
                               step, n, ow, false);
    };
    if constexpr (std::is_same_v<T, acc_t>)
      if (output_.columns && C % L_ == 0)  // a pixel of the group is a vector in memory
        return convolve(0, rows, y + (plane / C * group_.oh + row) * ow * C + plane % C, C);
    const int64_t step = staged_rows(ow);
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t n = std::min(step, rows - r);
      convolve(r, n, b.stage.data(), L_);
      unpack(output_, b.stage.data(), unit, row + r, n, y, b.scratch);
    }
  }

  void load_and_differentiate(const std::vector<const T*>& grads, const T* x, const acc_t* table,
                              T* dx, const std::vector<std::vector<double>>& dws, int64_t unit,
                              Buffers& b, acc_t* sums) const {
    const int64_t s = group_.stride, W = group_.W, rows = rows_of(unit);
    const int64_t height = std::min(s * slab_, group_.H - unit % slabs_ * slab_ * s);
    const acc_t* w = table + unit / slabs_ % tables_ * taps_ * L_;
    const acc_t *xp = b.x.data() + x_.inside(), *gp = b.g.data() + g_.inside();
    if (x) load_source(x, unit, b.x, b.scratch);
    if (dx) std::fill_n(b.dx.data(), height * W * L_, acc_t{});
    for (const Phase& p : outputs_) {
      const T* g = grads[p.convolution];
      const bool need = !dws[p.convolution].empty();
      if (g && (dx || need)) load(g_, output_, g, unit, 1, false, b.g, b.scratch);
      if (g && need)
        kernels_.correlate[s - 1](gp, g_.offset(1, 0), xp, x_.offset(s, 0), p.offsets.data(),
                                  p.size(), sums + p.first * L_, rows, group_.ow);
      if (g && dx) add_gradient(p.convolution, gp, w, height, b.dx);
    }
    if (dx) store_gradient(b.x, b.dx, unit, dx, b.scratch);
  }

  // The transposed convolution of g.
  void add_gradient(int64_t convolution, const acc_t* g, const acc_t* w, int64_t height,
                    AlignedVector<acc_t>& dx) const {
    const int64_t s = group_.stride, W = group_.W;
    for (const Phase& p : inputs_)
      if (p.convolution == convolution)
        kernels_.convolve[0](g, g_.offset(1, 0), p.offsets.data(), w + p.first * L_, p.size(),
                             dx.data() + (p.py * W + p.px) * L_, s * W * L_, s * L_,
                             (height - p.py + s - 1) / s, (W - p.px + s - 1) / s, true);
  }

  // dx of a unit, from rows without a gap between them.
  void store_gradient(const AlignedVector<acc_t>& x, AlignedVector<acc_t>& values, int64_t unit,
                      T* dx, AlignedVector<T>& scratch) const {
    const int64_t s = group_.stride, W = group_.W, row = unit % slabs_ * slab_ * s;
    const int64_t height = std::min(s * slab_, group_.H - row), step = staged_rows(W);
    if (relu_) kernels_.mask(values.data(), x.data() + x_.inside(), x_.offset(1, 0), height, W);
    for (int64_t r = 0; r < height; r += step)
      unpack(source_, values.data() + r * W * L_, unit, row + r, std::min(step, height - r), dx,
             scratch);
  }

  // Neighbouring units, so that sums are not folded for every small image.
  int64_t units_per_task() const {
    const int64_t most = std::clamp<int64_t>(kSums / (tables_ * taps_ * L_), 16, kSumTasks);
    return std::max((units_ + most - 1) / most,
                    std::max<int64_t>(kSumPixels / (slab_ * group_.ow), 1));
  }

  // Which of the sums of a task a unit adds to: one for each table of weights that its units have.
  int64_t slot_of(int64_t unit, int64_t first) const {
    return (unit / slabs_ - first / slabs_) % tables_;
  }

  // Tasks first, then lanes: the order is the same for every number of threads.
  void fold(const std::vector<double>& partial, int64_t each, int64_t slots,
            std::vector<std::vector<double>>& dws) const {
    const int64_t row = taps_ * L_;
    std::vector<double> total(tables_ * row);
    const double* from = partial.data();
    for (int64_t first = 0; first < units_; first += each)
      for (int64_t slot = 0; slot < slots; ++slot, from += row) {
        double* to = total.data() + (first / slabs_ + slot) % tables_ * row;
        for (int64_t i = 0; i < row; ++i) to[i] += from[i];
      }
    distribute(total.data(), dws);
  }

  // Sums of every tap and lane, for all tables, to the weights they belong to.
  void distribute(const double* from, std::vector<std::vector<double>>& dws) const {
    for (int64_t j = 0; j < tables_; ++j)
      for (const Phase& p : outputs_) {
        std::vector<double>& dw = dws[p.convolution];
        const int64_t size = group_.convolutions[p.convolution].taps();
        for (int64_t t : p.taps)
          for (int64_t l = 0; l < L_; ++l, ++from)
            if (!dw.empty()) dw[(j * L_ + l) % group_.C * size + t] += *from;
      }
  }

  template <typename F>
  void parallel(int64_t tasks, int64_t units, F&& f) const {
    const int64_t each = units * slab_ * group_.ow * taps_;
    parallel_tasks(tasks, std::max<int64_t>(kGrain / each, 1), f);
  }

  static constexpr int64_t kGrain = 65536;  // multiply-adds of vectors: enough work for a thread

  DepthwiseGroup group_;
  const PlaneKernels<T>& kernels_;
  bool relu_;
  int64_t L_;
  Planes source_, output_;
  int64_t tables_, slab_, slabs_, units_;
  int64_t taps_ = 0;
  Frame x_, g_;
  std::vector<Phase> outputs_, inputs_;
  AlignedVector<acc_t>
      normal_;  // scale and shift of every lane, for all groups of planes that differ
};

}  // namespace fastnas
