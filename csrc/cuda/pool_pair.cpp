// SPDX-License-Identifier: Apache-2.0
// Maximum and average over the same windows, on CUDA: one kernel forward, one backward.
#include "pool_pair.h"

#include <torch/library.h>

#include <optional>

#include "../pools.h"
#include "host.h"

namespace fastnas::cuda {

namespace {

PoolSizes sizes_of(const Pools& p, at::ScalarType dtype, at::MemoryFormat format) {
  return {dtype_of(dtype),
          format != at::MemoryFormat::Contiguous,
          static_cast<int>(p.stride),
          p.N,
          p.C,
          p.H,
          p.W,
          p.oh,
          p.ow};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> pool_pair(const at::Tensor& x,
                                                                      int64_t stride, bool carry) {
  const char* op = "pool_pair";
  check_no_carriers(op, {}, carry);
  check_floating(op, "x", x);
  const Pools p = check_pools(op, x.sizes(), stride);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, x.scalar_type(), format);
  at::Tensor max = at::empty({p.N, p.C, p.oh, p.ow}, x.options(), format);
  at::Tensor avg = at::empty({p.N, p.C, p.oh, p.ow}, x.options(), format);
  C10_CUDA_CHECK(launch_pool_pair(sizes_of(p, x.scalar_type(), format), pointer(source),
                                  mutable_pointer(max), mutable_pointer(avg), stream_of(x)));
  return {max, avg, {}};
}

at::Tensor pool_pair_backward(const std::optional<at::Tensor>& grad_max,
                              const std::optional<at::Tensor>& grad_avg, const at::Tensor& x,
                              at::IntArrayRef size, int64_t stride) {
  const char* op = "pool_pair_backward";
  const Pools p = check_pools_backward(op, grad_max ? &*grad_max : nullptr,
                                       grad_avg ? &*grad_avg : nullptr, x, size, stride);
  const at::Tensor& like = grad_max ? *grad_max : *grad_avg;
  const c10::cuda::CUDAGuard guard(like.device());
  const at::ScalarType dtype = like.scalar_type();
  const at::MemoryFormat format = memory_format(x.dim() == 4 ? x : like);
  at::Tensor source, top, mean;
  if (grad_max) source = as_operand(x, dtype, format);
  if (grad_max) top = as_operand(*grad_max, dtype, format);
  if (grad_avg) mean = as_operand(*grad_avg, dtype, format);
  const at::Tensor dx = at::empty({p.N, p.C, p.H, p.W}, like.options(), format);
  const auto given = [](const at::Tensor& t) { return t.defined() ? pointer(t) : nullptr; };
  C10_CUDA_CHECK(launch_pool_pair_gradient(sizes_of(p, dtype, format), given(source), given(top),
                                           given(mean), mutable_pointer(dx), stream_of(like)));
  return dx;
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("pool_pair", &fastnas::cuda::pool_pair);
  m.impl("pool_pair_backward", &fastnas::cuda::pool_pair_backward);
}
