// SPDX-License-Identifier: Apache-2.0
// Maximum and average over the same windows. The image is cut into slabs of rows that fit the second-level cache; each
// is packed (planes.h) and read once. The backward looks for the maxima again, which costs less than to keep them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "../pools.h"
#include "aligned.h"
#include "dispatch.h"
#include "made_statistics.h"
#include "mixed_batch_norm.h"
#include "planes.h"
#include "pools.h"
#include "tasks.h"

namespace fastnas {

namespace {

constexpr int64_t kSlabPixels = 1024;  // of an output: what is packed at once
constexpr int64_t kGrain = 4096;       // pixels of vectors: enough work for a thread

template <typename T>
class PoolPair {
 public:
  using acc_t = acc_type<T>;

  PoolPair(const Pools& p, bool columns)
      : p_(p), planes_(plane_kernels<T>()), pools_(pool_kernels<acc_t>()), L_(planes_.lanes) {
    source_ = {p.N * p.C, p.C, p.H, p.W, columns || p.H * p.W == 1};
    output_ = {p.N * p.C, p.C, p.oh, p.ow, columns || p.oh * p.ow == 1};
    slab_ = std::clamp<int64_t>(kSlabPixels / p.ow, 1, p.oh);
    slabs_ = (p.oh + slab_ - 1) / slab_;
  }

  // made: means and biased variances of both, [2][2][C], or null.
  void forward(const T* x, T* max, T* avg, double* made) const {
    const int64_t rows = source_rows(slab_);
    MadeStatistics<acc_t> statistics(made ? 2 : 0, units(), L_);
    parallel([&](Tasks::Worker& worker) {
      typename MadeStatistics<acc_t>::Block values(statistics);
      AlignedVector<acc_t> in(rows * p_.W * L_), best(rows * p_.ow * L_), sum(rows * p_.ow * L_);
      AlignedVector<acc_t> top(slab_ * p_.ow * L_), mean(slab_ * p_.ow * L_);
      AlignedVector<T> scratch(std::max(p_.W, slab_ * p_.ow) * L_);
      for (int64_t unit; worker.next(unit);) {
        const int64_t plane = unit / slabs_ * L_, first = unit % slabs_ * slab_;
        const PoolRows r = rows_of(first, std::min(first + slab_, p_.oh));
        load(x, source_, plane, r.top, r.bottom, in, scratch);
        pools_.pool(r, in.data(), best.data(), sum.data(), top.data(), mean.data());
        for (const auto& [from, to] : {std::pair{&top, max}, std::pair{&mean, avg}}) {
          planes_.unpack(output_, from->data(), plane, first, r.last - first, to, scratch.data());
          if (!made) continue;
          values.add(from->data(), (r.last - first) * p_.ow, L_, 0);
          statistics.take(values, to == avg, unit);
        }
      }
    });
    if (made) fold_statistics(statistics, made);
  }

  // g_max or g_avg may be null; x is not read without g_max.
  void backward(const T* x, const T* g_max, const T* g_avg, T* dx) const {
    differentiate(x, g_max, g_avg, dx, [&](int64_t plane, const PoolRows& r, Windows& w) {
      if (g_max) load(g_max, output_, plane, r.first, r.last, w.top, w.scratch);
      if (g_avg) load(g_avg, output_, plane, r.first, r.last, w.mean, w.scratch);
    });
  }

  // The gradient of an output as its readers carry it: sum_r a_r g_r + b (output - centre) + c, of every channel.
  struct Carried {
    std::map<int64_t, std::vector<double>> readers;  // by number: a (C)
    std::vector<double> slope, centre, shift;
    // Null where slope and shift are zeros: values that are not finite do not count then.
    const T* output = nullptr;
  };

  // grads: of all readers. An output that nobody reads has no readers.
  void backward(const T* x, const std::vector<const T*>& grads, const Carried& max,
                const Carried& avg, T* dx) const {
    const Tables numbers[] = {numbers_of(max), numbers_of(avg)};
    const bool has_max = !max.readers.empty(), has_avg = !avg.readers.empty();
    differentiate(x, has_max, has_avg, dx, [&](int64_t plane, const PoolRows& r, Windows& w) {
      w.reader.resize(w.top.empty() ? w.mean.size() : w.top.size());
      bool started[2] = {};
      for (size_t i = 0; i < grads.size(); ++i) {
        bool loaded = false;
        for (int k = 0; k < 2; ++k)
          add_reader(grads[i], i, k ? avg : max, numbers[k], plane, r, w, k ? w.mean : w.top,
                     started[k], loaded);
      }
    });
  }

 private:
  // Packed rows of one group of planes: of the gradients of both outputs, and of one reader's.
  struct Windows {
    AlignedVector<acc_t> top, mean, reader;
    AlignedVector<T> scratch;
  };

  // Vectors of every lane, for all groups of planes that differ: a and 1 of each reader, and a, b, centre and c of the
  // first one.
  struct Tables {
    AlignedVector<acc_t> scales, first;
  };

  // load(plane, rows, windows) brings the gradients of the outputs that have one.
  template <typename F>
  void differentiate(const T* x, bool max, bool avg, T* dx, F&& load_gradients) const {
    const int64_t windows = std::min(slab_ + 2, p_.oh), rows = source_rows(windows);
    const int64_t wide = (p_.ow + 2) * L_, given = windows * p_.ow * L_;
    parallel([&](Tasks::Worker& worker) {
      AlignedVector<acc_t> in(max ? rows * p_.W * L_ : 0), best(max ? rows * wide : 0);
      AlignedVector<acc_t> column(max ? rows * wide : 0, acc_t(-1)), choice(windows * wide);
      AlignedVector<acc_t> spread(2 * wide), out(p_.stride * slab_ * p_.W * L_);
      Windows w{AlignedVector<acc_t>(max ? given : 0),
                AlignedVector<acc_t>(avg ? given : 0),
                {},
                AlignedVector<T>(std::max(p_.W, p_.stride * slab_ * p_.W) * L_)};
      for (int64_t unit; worker.next(unit);) {
        const int64_t plane = unit / slabs_ * L_, slab = unit % slabs_ * slab_;
        const int64_t row0 = p_.stride * slab;
        const int64_t row1 = std::min(p_.stride * (slab + slab_), p_.H);
        const PoolRows r = rows_of(p_.stride == 1 ? std::max<int64_t>(slab - 1, 0) : slab,
                                   std::min(slab + slab_ + 1, p_.oh));
        if (max) load(x, source_, plane, r.top, r.bottom, in, w.scratch);
        load_gradients(plane, r, w);
        pools_.gradient(r, row0, row1, in.data(), max ? w.top.data() : nullptr,
                        avg ? w.mean.data() : nullptr, best.data(), column.data(), choice.data(),
                        spread.data(), out.data());
        planes_.unpack(source_, out.data(), plane, row0, row1 - row0, dx, w.scratch.data());
      }
    });
  }

  Tables numbers_of(const Carried& carried) const {
    Tables t;
    if (carried.readers.empty()) return t;
    const auto append = [&](AlignedVector<acc_t>& to, const std::vector<double>& values,
                            int64_t j) {
      for (int64_t l = 0; l < L_; ++l)
        to.push_back(static_cast<acc_t>(values[(j * L_ + l) % p_.C]));
    };
    for (int64_t j = 0; j < tables(); ++j) {
      for (const auto& [reader, a] : carried.readers) {
        append(t.scales, a, j);
        t.scales.insert(t.scales.end(), L_, acc_t(1));
      }
      append(t.first, carried.readers.begin()->second, j);
      append(t.first, carried.slope, j);
      append(t.first, carried.centre, j);
      append(t.first, carried.shift, j);
    }
    return t;
  }

  // What reader i adds to the gradient of one output. `started`: whether that has a reader's already; `loaded`: whether
  // w.reader has this one's.
  void add_reader(const T* grad, int64_t i, const Carried& carried, const Tables& numbers,
                  int64_t plane, const PoolRows& r, Windows& w, AlignedVector<acc_t>& to,
                  bool& started, bool& loaded) const {
    const auto at = carried.readers.find(i);
    if (at == carried.readers.end()) return;
    const int64_t table = plane / L_ % tables(), rows = r.last - r.first;
    const bool first = !std::exchange(started, true);
    if (first && carried.output)
      return planes_.pack_carried(output_, grad, carried.output, plane, r.first, rows, to.data(),
                                  numbers.first.data() + table * 4 * L_, w.reader.data(),
                                  w.scratch.data());
    if (!std::exchange(loaded, true))
      load(grad, output_, plane, r.first, r.last, w.reader, w.scratch);
    const int64_t row = table * carried.readers.size() + std::distance(carried.readers.begin(), at);
    const acc_t* operands[] = {w.reader.data(), to.data()};
    range_kernels<acc_t>().combine(operands, first ? 1 : 2, to.data(), rows * output_.W * L_,
                                   numbers.scales.data() + row * 2 * L_, nullptr, L_);
  }

  // How many groups of planes differ in their channels.
  int64_t tables() const { return std::lcm(p_.C, L_) / L_; }

  // The most rows of x that so many rows of windows have.
  int64_t source_rows(int64_t windows) const {
    return std::min(p_.stride * (windows - 1) + 3, p_.H);
  }

  PoolRows rows_of(int64_t first, int64_t last) const {
    PoolRows r{p_.H, p_.W, p_.oh, p_.ow, p_.stride, first, last, 0, 0};
    r.top = r.begin(first);
    r.bottom = r.end(last - 1);
    return r;
  }

  void load(const T* from, const Planes& planes, int64_t plane, int64_t begin, int64_t end,
            AlignedVector<acc_t>& to, AlignedVector<T>& scratch) const {
    planes_.pack(planes, from, plane, begin, end - begin, to.data(), planes.W, false,
                 scratch.data());
  }

  void fold_statistics(const MadeStatistics<acc_t>& statistics, double* made) const {
    const auto plane = [&](int64_t unit) { return unit / slabs_ * L_; };
    for (int64_t i = 0; i < 2; ++i)
      statistics.fold(
          i, p_.C, [&](int64_t unit) { return plane(unit) % p_.C; },
          [&](int64_t unit) { return std::min(L_, p_.N * p_.C - plane(unit)); },
          made + 2 * i * p_.C, made + (2 * i + 1) * p_.C);
  }

  int64_t units() const { return (p_.N * p_.C + L_ - 1) / L_ * slabs_; }

  template <typename F>
  void parallel(F&& f) const {
    parallel_tasks(units(), std::max<int64_t>(kGrain / (slab_ * p_.ow), 1), f);
  }

  Pools p_;
  const PlaneKernels<T>& planes_;
  const PoolKernels<acc_t>& pools_;
  int64_t L_;
  Planes source_, output_;
  int64_t slab_, slabs_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> pool_pair_cpu(const at::Tensor& x,
                                                                          int64_t stride,
                                                                          bool carry) {
  const char* op = "pool_pair";
  check_floating(op, "x", x);
  check_carries(op, carry, x);
  const Pools p = check_pools(op, x.sizes(), stride);
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, x.scalar_type(), format);
  at::Tensor max = at::empty({p.N, p.C, p.oh, p.ow}, x.options(), format);
  at::Tensor avg = at::empty({p.N, p.C, p.oh, p.ow}, x.options(), format);
  std::vector<double> made(carry ? 4 * p.C : 0);
  if (max.numel())
    dispatch(op, x.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      PoolPair<T>(p, format != at::MemoryFormat::Contiguous)
          .forward(const_pointer<T>(source), static_cast<T*>(max.mutable_data_ptr()),
                   static_cast<T*>(avg.mutable_data_ptr()), carry ? made.data() : nullptr);
    });
  const at::TensorOptions options = x.options().memory_format(at::MemoryFormat::Contiguous);
  return {max, avg, made_carriers(made, carry ? 2 : 0, p.C, options)};
}

at::Tensor pool_pair_backward_cpu(const std::optional<at::Tensor>& grad_max,
                                  const std::optional<at::Tensor>& grad_avg, const at::Tensor& x,
                                  at::IntArrayRef size, int64_t stride) {
  const char* op = "pool_pair_backward";
  const Pools p = check_pools_backward(op, grad_max ? &*grad_max : nullptr,
                                       grad_avg ? &*grad_avg : nullptr, x, size, stride);
  const at::Tensor& like = grad_max ? *grad_max : *grad_avg;
  const at::ScalarType dtype = like.scalar_type();
  const at::MemoryFormat format = memory_format(x.dim() == 4 ? x : like);
  at::Tensor source, top, mean;
  if (grad_max) source = as_operand(x, dtype, format);
  if (grad_max) top = as_operand(*grad_max, dtype, format);
  if (grad_avg) mean = as_operand(*grad_avg, dtype, format);
  at::Tensor dx = at::empty({p.N, p.C, p.H, p.W}, like.options(), format);
  if (dx.numel() == 0) return dx;
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto pointer = [](const at::Tensor& t) {
      return t.defined() ? const_pointer<T>(t) : nullptr;
    };
    PoolPair<T>(p, format != at::MemoryFormat::Contiguous)
        .backward(pointer(source), pointer(top), pointer(mean),
                  static_cast<T*>(dx.mutable_data_ptr()));
  });
  return dx;
}

namespace {

// What so many readers carry for one output, with each gradient's place in the list of those of all.
template <typename T>
typename PoolPair<T>::Carried carried_of(at::TensorList grads, at::TensorList numbers,
                                         const at::Tensor& output, int64_t C,
                                         std::vector<const T*>& all) {
  typename PoolPair<T>::Carried out;
  out.slope = out.centre = out.shift = std::vector<double>(C);
  std::vector<double> plain(4 * C);  // a gradient as it stands
  std::fill_n(plain.begin(), C, 1.0);
  bool centred = false;
  for (size_t i = 0; i < grads.size(); ++i) {
    const T* g = const_pointer<T>(grads[i]);
    const auto at = std::find(all.begin(), all.end(), g);
    std::vector<double>& a = out.readers[at - all.begin()];
    if (at == all.end()) all.push_back(g);
    const std::vector<double> rows = numbers[i].numel() ? to_doubles(numbers[i]) : plain;
    a.resize(C);
    for (int64_t c = 0; c < C; ++c) {
      const double slope = rows[C + c], centre = rows[2 * C + c];
      a[c] += rows[c];  // where two readers have the same gradient
      if (!centred) out.centre[c] = centre;
      out.slope[c] += slope;
      out.shift[c] += rows[3 * C + c] + slope * (out.centre[c] - centre);
    }
    centred = centred || numbers[i].numel();
  }
  if (centred) out.output = const_pointer<T>(output);
  return out;
}

}  // namespace

at::Tensor pool_pair_carried_backward_cpu(at::TensorList grads_max, at::TensorList numbers_max,
                                          at::TensorList grads_avg, at::TensorList numbers_avg,
                                          const at::Tensor& max, const at::Tensor& avg,
                                          const at::Tensor& x, int64_t stride) {
  const char* op = "pool_pair_carried_backward";
  check_floating(op, "x", x);
  const Pools p = check_pools(op, x.sizes(), stride);
  check_pool_readers(op, p, grads_max, numbers_max, max, x);
  check_pool_readers(op, p, grads_avg, numbers_avg, avg, x);
  const at::ScalarType dtype = x.scalar_type();
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, dtype, format), top = as_operand(max, dtype, format),
                   mean = as_operand(avg, dtype, format);
  const std::vector<at::Tensor> tops = as_operands(grads_max, dtype, format),
                                means = as_operands(grads_avg, dtype, format);
  at::Tensor dx = at::empty(x.sizes(), x.options(), format);
  if (dx.numel() == 0) return dx;
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<const T*> all;
    const auto of_max = carried_of<T>(tops, numbers_max, top, p.C, all);
    const auto of_avg = carried_of<T>(means, numbers_avg, mean, p.C, all);
    PoolPair<T>(p, format != at::MemoryFormat::Contiguous)
        .backward(const_pointer<T>(source), all, of_max, of_avg,
                  static_cast<T*>(dx.mutable_data_ptr()));
  });
  return dx;
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("pool_pair", &fastnas::pool_pair_cpu);
  m.impl("pool_pair_backward", &fastnas::pool_pair_backward_cpu);
  m.impl("pool_pair_carried_backward", &fastnas::pool_pair_carried_backward_cpu);
}
