// SPDX-License-Identifier: Apache-2.0
// What update_running_statistics asks of its arguments, on every device.
#pragma once
#include "check.h"

namespace fastnas {

inline void check_running(const char* op, const char* name, at::TensorList running,
                          const at::Tensor& rows, size_t count) {
  TORCH_CHECK_VALUE(running.size() == count, op, ": expected one of ", name, " per row (", count,
                    "), but got ", running.size());
  for (const at::Tensor& r : running) {
    TORCH_CHECK_VALUE(r.dim() == 1 && r.size(0) == rows.size(1) && r.device() == rows.device(), op,
                      ": expected ", name, " of shape [", rows.size(1), "] on ", rows.device(),
                      ", but got ", r.sizes(), " on ", r.device());
    TORCH_CHECK_TYPE(r.scalar_type() == rows.scalar_type(), op, ": expected ", name,
                     " of the dtype of the statistics, ", rows.scalar_type(), ", but got ",
                     r.scalar_type());
    TORCH_CHECK(r.stride(0) != 0 || r.numel() < 2, op, ": expected ", name,
                " with a place in memory for each channel, but got an expanded tensor");
  }
}

inline void check_running_statistics(const char* op, at::TensorList running_means,
                                     at::TensorList running_vars, at::TensorList counters,
                                     const at::Tensor& mean, const at::Tensor& var,
                                     at::IntArrayRef rows, at::ArrayRef<double> momenta,
                                     int64_t count) {
  TORCH_CHECK_TYPE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble, op,
                   ": expected mean to be float32 or float64, but got ", mean.scalar_type());
  TORCH_CHECK_VALUE(mean.dim() == 2 && var.sizes() == mean.sizes() &&
                        var.scalar_type() == mean.scalar_type() && var.device() == mean.device(),
                    op, ": expected mean and var of one shape (K, C), dtype and device, but got ",
                    mean.sizes(), " and ", var.sizes());
  check_running(op, "running_means", running_means, mean, rows.size());
  check_running(op, "running_vars", running_vars, mean, rows.size());
  TORCH_CHECK_VALUE(momenta.size() == rows.size(), op, ": expected one of momenta per row (",
                    rows.size(), "), but got ", momenta.size());
  for (int64_t row : rows)
    TORCH_CHECK_VALUE(row >= 0 && row < mean.size(0), op, ": expected rows of 0 to ",
                      mean.size(0) - 1, ", but got ", row);
  for (const at::Tensor& c : counters)
    TORCH_CHECK_VALUE(c.scalar_type() == at::kLong && c.numel() == 1 && c.device() == mean.device(),
                      op, ": expected counters of one int64 on ", mean.device(), ", but got ",
                      c.sizes(), " of ", c.scalar_type(), " on ", c.device());
  TORCH_CHECK_VALUE(count == 0 || count >= 2, op, ": expected a count of 0 or at least 2, but got ",
                    count);
}

// What the variance that a running one takes is multiplied by.
inline double unbiased(int64_t count) {
  return static_cast<double>(count) / static_cast<double>(count - 1);
}

// Of an op that writes to its arguments PyTorch leaves it to the kernel to say so.
inline void written(const at::Tensor& x) { x.unsafeGetTensorImpl()->bump_version(); }

}  // namespace fastnas
