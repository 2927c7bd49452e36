// SPDX-License-Identifier: Apache-2.0
// What a training step leaves in BatchNorms: running statistics and counters of many of them in one call. Each is a few
// numbers, so that calls of their own would take most of the time.
#include <torch/library.h>

#include "../check.h"
#include "dispatch.h"

namespace fastnas {
namespace {

constexpr const char* kOp = "update_running_statistics";

void check_running(const char* name, at::TensorList running, const at::Tensor& rows, size_t count) {
  TORCH_CHECK_VALUE(running.size() == count, kOp, ": expected one of ", name, " per row (", count,
                    "), but got ", running.size());
  for (const at::Tensor& r : running) {
    TORCH_CHECK_VALUE(r.dim() == 1 && r.size(0) == rows.size(1) && r.device() == rows.device(), kOp,
                      ": expected ", name, " of shape [", rows.size(1), "] on ", rows.device(),
                      ", but got ", r.sizes(), " on ", r.device());
    TORCH_CHECK_TYPE(r.scalar_type() == rows.scalar_type(), kOp, ": expected ", name,
                     " of the dtype of the statistics, ", rows.scalar_type(), ", but got ",
                     r.scalar_type());
    TORCH_CHECK(r.stride(0) != 0 || r.numel() < 2, kOp, ": expected ", name,
                " with a place in memory for each channel, but got an expanded tensor");
  }
}

// As PyTorch's BatchNorm on a CPU, in double precision: by a difference, an infinity would become NaN in the next step.
template <typename T>
void move(const at::Tensor& running, const T* row, double scale, double momentum) {
  T* to = static_cast<T*>(running.mutable_data_ptr());
  const int64_t C = running.numel(), step = C ? running.stride(0) : 1;
  for (int64_t c = 0; c < C; ++c) {
    const double old = to[c * step], value = row[c] * scale;
    to[c * step] = static_cast<T>(momentum * value + (1 - momentum) * old);
  }
}

// Of an op that writes to its arguments PyTorch leaves it to the kernel to say so.
void written(const at::Tensor& x) { x.unsafeGetTensorImpl()->bump_version(); }

}  // namespace

void update_running_statistics_cpu(at::TensorList running_means, at::TensorList running_vars,
                                   at::TensorList counters, const at::Tensor& mean,
                                   const at::Tensor& var, at::IntArrayRef rows,
                                   at::ArrayRef<double> momenta, int64_t count) {
  TORCH_CHECK_TYPE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble, kOp,
                   ": expected mean to be float32 or float64, but got ", mean.scalar_type());
  TORCH_CHECK_VALUE(mean.dim() == 2 && var.sizes() == mean.sizes() &&
                        var.scalar_type() == mean.scalar_type() && var.device() == mean.device(),
                    kOp, ": expected mean and var of one shape (K, C), dtype and device, but got ",
                    mean.sizes(), " and ", var.sizes());
  check_running("running_means", running_means, mean, rows.size());
  check_running("running_vars", running_vars, mean, rows.size());
  TORCH_CHECK_VALUE(momenta.size() == rows.size(), kOp, ": expected one of momenta per row (",
                    rows.size(), "), but got ", momenta.size());
  for (int64_t row : rows)
    TORCH_CHECK_VALUE(row >= 0 && row < mean.size(0), kOp, ": expected rows of 0 to ",
                      mean.size(0) - 1, ", but got ", row);
  for (const at::Tensor& c : counters)
    TORCH_CHECK_VALUE(c.scalar_type() == at::kLong && c.numel() == 1 && c.device() == mean.device(),
                      kOp, ": expected counters of one int64 on ", mean.device(), ", but got ",
                      c.sizes(), " of ", c.scalar_type(), " on ", c.device());
  TORCH_CHECK_VALUE(count == 0 || count >= 2, kOp,
                    ": expected a count of 0 or at least 2, but got ", count);
  for (const at::Tensor& counter : counters) {
    ++*counter.mutable_data_ptr<int64_t>();
    written(counter);
  }
  if (count == 0) return;  // an empty batch is counted, and leaves no statistics
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  const at::Tensor means = mean.contiguous(), vars = var.contiguous();
  const int64_t C = mean.size(1);
  const auto move_all = [&](auto tag) {
    using T = decltype(tag);
    for (size_t i = 0; i < rows.size(); ++i) {
      move(running_means[i], const_pointer<T>(means) + rows[i] * C, 1.0, momenta[i]);
      move(running_vars[i], const_pointer<T>(vars) + rows[i] * C, unbiased, momenta[i]);
      written(running_means[i]);
      written(running_vars[i]);
    }
  };
  mean.scalar_type() == at::kDouble ? move_all(double{}) : move_all(float{});
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("update_running_statistics", &fastnas::update_running_statistics_cpu);
}
