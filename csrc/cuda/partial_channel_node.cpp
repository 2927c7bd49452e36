// SPDX-License-Identifier: Apache-2.0
// The tail of a PC-DARTS node whose states are kept in two parts, on CUDA: mixed_sum, concatenation and shuffle.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../parts.h"
#include "host.h"

namespace fastnas::cuda {

at::Tensor mixed_sum(at::TensorList xs, const at::Tensor& weights);
std::tuple<std::vector<at::Tensor>, at::Tensor> mixed_sum_backward(const at::Tensor& grad,
                                                                   at::TensorList xs,
                                                                   const at::Tensor& weights,
                                                                   at::IntArrayRef need_xs,
                                                                   bool need_weights);

namespace {

// Channels from `first` on as a tensor of their own, of the given memory format.
at::Tensor part(const at::Tensor& x, int64_t first, int64_t count, at::MemoryFormat format) {
  at::Tensor out = at::empty({x.size(0), count, x.size(2), x.size(3)}, x.options(), format);
  return out.copy_(x.narrow(1, first, count));
}

// Channel i m + j of the result is channel j n + i of x, which has n m of them.
at::Tensor transposed(const at::Tensor& x, int64_t n, int64_t m) {
  return x.contiguous()
      .view({x.size(0), m, n, x.size(2), x.size(3)})
      .transpose(1, 2)
      .reshape({x.size(0), n * m, x.size(2), x.size(3)});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> partial_channel_node(const at::Tensor& mixed,
                                                        at::TensorList rests,
                                                        const at::Tensor& weights, int64_t k) {
  const PartSizes s = check_parts("partial_channel_node", mixed, rests, weights, k);
  const c10::cuda::CUDAGuard guard(mixed.device());
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = c10::promoteTypes(result_dtype(rests), mixed.scalar_type());
  const at::MemoryFormat format = memory_format(mixed);
  const at::Tensor rest = mixed_sum(rests, weights).to(dtype);
  const at::Tensor z = transposed(at::cat({mixed.to(dtype), rest}, 1), s.c, k);
  return {part(z, 0, s.c, format), part(z, s.c, s.others(), format)};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> partial_channel_node_backward(
    const std::optional<at::Tensor>& grad_mixed, const std::optional<at::Tensor>& grad_rest,
    at::TensorList rests, const at::Tensor& weights, int64_t k, bool need_mixed,
    at::IntArrayRef need_rests, bool need_weights) {
  const PartSizes s = check_parts_backward("partial_channel_node_backward", grad_mixed, grad_rest,
                                           rests, weights, k, need_rests, need_weights);
  const at::Tensor& like = grad_mixed ? *grad_mixed : *grad_rest;
  const c10::cuda::CUDAGuard guard(like.device());
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::MemoryFormat format = memory_format(like);
  const at::Tensor first = grad_mixed ? *grad_mixed : at::zeros(s.mixed(), like.options());
  const at::Tensor second = grad_rest ? *grad_rest : at::zeros(s.rest(), like.options());
  const at::Tensor z = transposed(at::cat({first, second}, 1), k, s.c);
  at::Tensor dmixed = at::empty({0}, like.options());
  if (need_mixed) dmixed = part(z, 0, s.c, format);
  auto [drests, dw] = mixed_sum_backward(part(z, s.c, s.others(), format), rests, weights,
                                         need_rests, need_weights);
  return {dmixed, drests, dw};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("partial_channel_node", &fastnas::cuda::partial_channel_node);
  m.impl("partial_channel_node_backward", &fastnas::cuda::partial_channel_node_backward);
}
