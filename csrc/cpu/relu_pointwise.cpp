// SPDX-License-Identifier: Apache-2.0
// ReLU and the pointwise convolution that reads it. Pixels are taken in blocks that fit the second-level cache: each is
// packed and rectified (planes.h), forward once and backward once, where it serves both gradients and the mask.
#include "../relu_pointwise.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>

#include "aligned.h"
#include "dispatch.h"
#include "planes.h"
#include "tasks.h"

namespace fastnas {

namespace {

constexpr int64_t kBlockValues = 1 << 15;  // of x: what is packed at once
constexpr int64_t kBlockPixels =
    1024;                            // at most, that sums run over before they are folded in double
constexpr int64_t kTasks = 64;       // at most, each with sums of its own
constexpr int64_t kSums = 1 << 20;   // of all tasks, unless that left too few of them
constexpr int64_t kGrain = 1 << 16;  // multiply-adds of vectors: enough work for a thread

template <typename T>
class ReluPointwise {
 public:
  using acc_t = acc_type<T>;
  using Vector = AlignedVector<acc_t>;

  // Images whose channels are innermost are one long image.
  ReluPointwise(const Product& p, bool columns)
      : p_(p), kernels_(plane_kernels<T>()), columns_(columns), L_(kernels_.lanes) {
    if (columns) p_.pixels *= std::exchange(p_.N, 1);
    C_ = filled(p_.C);
    outputs_ = filled(p_.outputs);
    block_ = std::min(
        std::clamp<int64_t>(kBlockValues / std::max(C_, outputs_) / 16 * 16, 16, kBlockPixels),
        p_.pixels);
    slabs_ = (p_.pixels + block_ - 1) / block_;
    blocks_ = p_.N * slabs_;
  }

  // weight: (outputs, C).
  void forward(const T* x, const acc_t* weight, T* y) const {
    const Vector table = this->table(weight, false);
    parallel_tasks(blocks_, grain(1), [&](Tasks::Worker& worker) {
      Vector h(block_ * C_), out(block_ * outputs_);
      AlignedVector<T> scratch(block_ * L_);
      for (int64_t i; worker.next(i);) {
        const Block b = block(i);
        load(x, p_.C, b, true, h.data(), scratch.data());
        if constexpr (std::is_same_v<T, acc_t>)
          if (columns_ && p_.outputs == outputs_) {  // vectors of a pixel follow each other there
            multiply(h.data(), table, C_, outputs_, y + b.first * outputs_, L_, outputs_, b.pixels);
            continue;
          }
        multiply(h.data(), table, C_, outputs_, out.data(), block_ * L_, L_, b.pixels);
        store(out.data(), p_.outputs, b, y, scratch.data());
      }
    });
  }

  // dx is null where it is not needed; dw: sums of (outputs, C), or empty.
  void backward(const T* grad, const T* x, const acc_t* weight, T* dx,
                std::vector<double>& dw) const {
    const Vector table = this->table(weight, true);
    const int64_t row = dw.empty() ? 0 : outputs_ * C_;
    const int64_t most = std::clamp<int64_t>(kSums / std::max<int64_t>(row, 1), 16, kTasks);
    const int64_t each = std::max<int64_t>((blocks_ + most - 1) / most, kBlockPixels / block_);
    const int64_t tasks = (blocks_ + each - 1) / each;
    TaskSums partial(tasks, row);
    parallel_tasks(tasks, grain(2 * each), [&](Tasks::Worker& worker) {
      Vector h(block_ * C_), g(block_ * outputs_), out(dx ? block_ * C_ : 0), running(row);
      AlignedVector<T> scratch(block_ * L_);
      for (int64_t task; worker.next(task);) {
        const int64_t last = std::min((task + 1) * each, blocks_);
        int64_t pending = 0;
        bool added = false;
        for (int64_t i = task * each; i < last; ++i) {
          const Block b = block(i);
          load(x, p_.C, b, true, h.data(), scratch.data());
          load(grad, p_.outputs, b, false, g.data(), scratch.data());
          if (dx) {
            multiply(g.data(), table, outputs_, C_, out.data(), block_ * L_, L_, b.pixels);
            kernels_.mask(out.data(), h.data(), block_ * L_, C_ / L_, block_);
            store(out.data(), p_.C, b, dx, scratch.data());
          }
          if (!row) continue;
          kernels_.outer(g.data(), block_ * L_, outputs_, h.data(), block_ * L_, C_, running.data(),
                         b.pixels);
          pending += b.pixels;
          if (pending + block_ <= kBlockPixels && i + 1 < last) continue;
          pending = 0;
          partial.take(task, running.data(), std::exchange(added, true));
        }
      }
    });
    if (row) distribute(partial.fold(), dw);
  }

 private:
  struct Block {
    int64_t image, first, pixels;
  };

  int64_t filled(int64_t channels) const { return (channels + L_ - 1) / L_ * L_; }

  int64_t grain(int64_t blocks) const {
    return std::max<int64_t>(kGrain / (blocks * block_ * outputs_ * (C_ / L_)), 1);
  }

  Block block(int64_t i) const {
    const int64_t first = i % slabs_ * block_;
    return {i / slabs_, first, std::min(block_, p_.pixels - first)};
  }

  // The pixels of a block as an image, or as rows of one.
  Planes planes(int64_t channels, const Block& b) const {
    if (columns_) return {channels, channels, 1, b.pixels, true};
    return {channels, channels, p_.pixels, 1, false};
  }
  int64_t offset(int64_t channels, const Block& b) const {
    return (b.image * p_.pixels + (columns_ ? b.first : 0)) * channels;
  }

  void load(const T* from, int64_t channels, const Block& b, bool relu, acc_t* to,
            T* scratch) const {
    const Planes shape = planes(channels, b);
    for (int64_t c = 0; c < channels; c += L_, to += block_ * L_)
      kernels_.pack(shape, from + offset(channels, b), c, columns_ ? 0 : b.first,
                    columns_ ? 1 : b.pixels, to, shape.W, relu, scratch);
  }

  void store(const acc_t* from, int64_t channels, const Block& b, T* to, T* scratch) const {
    const Planes shape = planes(channels, b);
    for (int64_t c = 0; c < channels; c += L_, from += block_ * L_)
      kernels_.unpack(shape, from, c, columns_ ? 0 : b.first, columns_ ? 1 : b.pixels,
                      to + offset(channels, b), scratch);
  }

  void multiply(const acc_t* x, const Vector& table, int64_t from, int64_t to, acc_t* out,
                int64_t group, int64_t step, int64_t pixels) const {
    kernels_.multiply(x, block_ * L_, 0, table.data(), from, to, out, group, 0, step, 1, pixels);
  }

  // As PlaneKernels::multiply takes it; transposed for the gradient of what is multiplied. Zeros fill it up.
  Vector table(const acc_t* weight, bool transposed) const {
    const int64_t from = transposed ? outputs_ : C_, to = transposed ? C_ : outputs_;
    const int64_t inputs = transposed ? p_.outputs : p_.C, rows = transposed ? p_.C : p_.outputs;
    Vector out(from * to);
    acc_t* at = out.data();
    for (int64_t row = 0; row < rows; row += L_, at += from * L_)
      for (int64_t in = 0; in < inputs; ++in)
        for (int64_t l = 0; l < std::min(L_, rows - row); ++l)
          at[in * L_ + l] =
              transposed ? weight[in * p_.C + row + l] : weight[(row + l) * p_.C + in];
    return out;
  }

  void distribute(const double* sums, std::vector<double>& dw) const {
    for (int64_t o = 0; o < p_.outputs; o += L_, sums += C_ * L_)
      for (int64_t c = 0; c < p_.C; ++c)
        for (int64_t l = 0; l < std::min(L_, p_.outputs - o); ++l)
          dw[(o + l) * p_.C + c] = sums[c * L_ + l];
  }

  Product p_;
  const PlaneKernels<T>& kernels_;
  bool columns_;
  int64_t L_, C_, outputs_;  // the last two in whole vectors
  int64_t block_, slabs_, blocks_;
};

}  // namespace

at::Tensor relu_pointwise_cpu(const at::Tensor& x, const at::Tensor& weight) {
  const char* op = "relu_pointwise";
  const at::NoGradGuard no_grad;
  const Product p = check_product(op, x, weight);
  const at::ScalarType dtype = x.scalar_type();
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, dtype, format);
  const at::Tensor w = as_operand(weight, accumulate_dtype(dtype), at::MemoryFormat::Contiguous);
  at::Tensor y = at::empty({p.N, p.outputs, x.size(2), x.size(3)}, x.options(), format);
  if (y.numel() == 0) return y;
  if (x.numel() == 0) return y.zero_();
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    ReluPointwise<T>(p, format != at::MemoryFormat::Contiguous)
        .forward(const_pointer<T>(source), const_pointer<acc_type<T>>(w),
                 static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> relu_pointwise_backward_cpu(const at::Tensor& grad,
                                                               const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               bool need_x, bool need_weight) {
  const char* op = "relu_pointwise_backward";
  const at::NoGradGuard no_grad;
  const Product p = check_product_backward(op, grad, x, weight);
  const at::ScalarType dtype = grad.scalar_type();
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor g = as_operand(grad, dtype, format), source = as_operand(x, dtype, format);
  const at::Tensor w = as_operand(weight, accumulate_dtype(dtype), at::MemoryFormat::Contiguous);
  at::Tensor dx = at::empty({0}, grad.options()), dw = at::empty({0}, weight.options());
  if (need_x) dx = at::empty(x.sizes(), grad.options(), format);
  std::vector<double> sums(need_weight ? weight.numel() : 0);
  if (grad.numel() == 0 || x.numel() == 0) {
    if (need_x) dx.zero_();
  } else if (need_x || need_weight) {
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      ReluPointwise<T>(p, format != at::MemoryFormat::Contiguous)
          .backward(const_pointer<T>(g), const_pointer<T>(source), const_pointer<acc_type<T>>(w),
                    need_x ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr, sums);
    });
  }
  if (need_weight) dw = from_doubles(sums, weight.sizes(), weight.options());
  return {dx, dw};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("relu_pointwise", &fastnas::relu_pointwise_cpu);
  m.impl("relu_pointwise_backward", &fastnas::relu_pointwise_backward_cpu);
}
