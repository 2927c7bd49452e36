// SPDX-License-Identifier: Apache-2.0
// What a training step leaves in BatchNorms: running statistics and counters of many of them in one call. Each is a few
// numbers, so that calls of their own would take most of the time.
#include "../running_statistics.h"

#include <torch/library.h>

#include "dispatch.h"

namespace fastnas {
namespace {

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

}  // namespace

void update_running_statistics_cpu(at::TensorList running_means, at::TensorList running_vars,
                                   at::TensorList counters, const at::Tensor& mean,
                                   const at::Tensor& var, at::IntArrayRef rows,
                                   at::ArrayRef<double> momenta, int64_t count) {
  check_running_statistics("update_running_statistics", running_means, running_vars, counters, mean,
                           var, rows, momenta, count);
  for (const at::Tensor& counter : counters) {
    ++*counter.mutable_data_ptr<int64_t>();
    written(counter);
  }
  if (count == 0) return;  // an empty batch is counted, and leaves no statistics
  const double scale = unbiased(count);
  const at::Tensor means = mean.contiguous(), vars = var.contiguous();
  const int64_t C = mean.size(1);
  const auto move_all = [&](auto tag) {
    using T = decltype(tag);
    for (size_t i = 0; i < rows.size(); ++i) {
      move(running_means[i], const_pointer<T>(means) + rows[i] * C, 1.0, momenta[i]);
      move(running_vars[i], const_pointer<T>(vars) + rows[i] * C, scale, momenta[i]);
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
