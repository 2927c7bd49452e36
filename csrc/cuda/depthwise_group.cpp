// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions, on CUDA: one kernel for all outputs; backward one for the gradients of sources, one for the
// parts of all gradients of weights of a size, and a small one to fold those of each.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "depthwise_host.h"

namespace fastnas::cuda {

Depthwise make_depthwise(const DepthwiseGroup& group, const std::vector<at::Tensor>& sources,
                         const at::Tensor& like, at::MemoryFormat format, at::TensorList weights,
                         bool relu) {
  Depthwise d{group, sources, like, format, weights.vec(), {}, {}};
  Convolutions& c = d.c;
  c.dtype = dtype_of(like.scalar_type());
  c.columns = format != at::MemoryFormat::Contiguous;
  c.count = static_cast<int>(group.size());
  c.stride = static_cast<int>(group.stride);
  c.sources = static_cast<int>(sources.size());
  for (int i = 0; i < c.count; ++i) c.xs[i] = pointer(sources[c.sources == 1 ? 0 : i]);
  c.N = group.N;
  c.C = group.C;
  c.H = group.H;
  c.W = group.W;
  c.oh = group.oh;
  c.ow = group.ow;
  c.relu = relu;
  for (int i = 0; i < c.count; ++i) {
    c.side[i] = static_cast<int>(group.convolutions[i].k);
    c.dilation[i] = static_cast<int>(group.convolutions[i].dilation);
    c.first[i] = static_cast<int>(group.convolutions[i].tap);
    c.weight_dtype[i] = static_cast<signed char>(dtype_of(weights[i].scalar_type()));
  }
  c.first[c.count] = static_cast<int>(group.taps);
  return d;
}

void add_weights(Depthwise& d) {
  for (int i = 0; i < d.c.count; ++i) {
    d.kept.push_back(d.weights[i].contiguous());
    d.c.weights[i] = pointer(d.kept.back());
  }
  if (!needs_table(d.c)) return;
  const at::Tensor table = scratch(d.c.taps() * d.c.C, d.acc(), d.like);
  C10_CUDA_CHECK(launch_weight_table(d.c, mutable_pointer(table), d.stream()));
  d.c.table = pointer(table);
  d.kept.push_back(table);
}

std::vector<at::Tensor> convolve(const Depthwise& d) {
  std::vector<at::Tensor> ys;
  Outputs to{};
  for (int64_t i = 0; i < d.group.size(); ++i) {
    ys.push_back(
        at::empty({d.group.N, d.group.C, d.group.oh, d.group.ow}, d.like.options(), d.format));
    to.ys[i] = mutable_pointer(ys[i]);
  }
  C10_CUDA_CHECK(launch_convolutions(d.c, to, d.stream()));
  return ys;
}

OutputGradients output_gradients(const std::vector<at::Tensor>& gs, at::IntArrayRef present) {
  OutputGradients from{};
  for (size_t i = 0, j = 0; i < present.size(); ++i)
    if (present[i]) from.gs[i] = pointer(gs[j++]);
  return from;
}

std::vector<at::Tensor> input_gradients(const Depthwise& d, const OutputGradients& from,
                                        const InputSums& sums) {
  std::vector<at::Tensor> dxs;
  InputGradients to{};
  for (int s = 0; s < d.c.sources; ++s) {
    dxs.push_back(
        at::empty({d.group.N, d.group.C, d.group.H, d.group.W}, d.like.options(), d.format));
    to.dxs[s] = mutable_pointer(dxs[s]);
  }
  C10_CUDA_CHECK(launch_input_gradients(d.c, from, to, sums, d.stream()));
  return dxs;
}

std::vector<at::Tensor> weight_gradients(const Depthwise& d, const OutputGradients& from,
                                         at::IntArrayRef need) {
  const Convolutions& c = d.c;
  const cudaStream_t stream = d.stream();
  const WeightPlan plan = plan_weights(c);
  WeightGradients to{};
  bool any = false;
  for (int i = 0; i < c.count; ++i) any = (to.need[i] = need[i] && from.gs[i]) || any;
  const at::Tensor partial = scratch(any ? c.taps() * c.C * plan.parts : 0, d.acc(), d.like);
  to.partial = mutable_pointer(partial);
  if (any) C10_CUDA_CHECK(launch_weight_gradients(c, plan, from, to, stream));
  std::vector<at::Tensor> dws;
  FoldedGradients folded{};
  for (int i = 0; i < c.count; ++i) {
    if (!need[i]) continue;
    const at::Tensor& w = d.weights[i];
    dws.push_back(to.need[i] ? at::empty(w.sizes(), w.options())
                             : at::zeros(w.sizes(), w.options()));
    if (to.need[i]) folded.dws[i] = mutable_pointer(dws.back());
  }
  if (any) C10_CUDA_CHECK(launch_fold_weights(c, plan, to.partial, folded, stream));
  return dws;
}

std::vector<at::Tensor> depthwise_group(const at::Tensor& x, at::TensorList weights,
                                        at::IntArrayRef dilations, int64_t stride, bool relu) {
  const char* op = "depthwise_group";
  check_floating(op, "x", x);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  Depthwise d =
      make_depthwise(group, {as_operand(x, x.scalar_type(), format)}, x, format, weights, relu);
  add_weights(d);
  return convolve(d);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights) {
  const char* op = "depthwise_group_backward";
  const DepthwiseGroup group = check_depthwise_backward(
      op, grads, present, x, size, weights, dilations, stride, relu, need_x, need_weights);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  const at::Tensor& like = grads[0];
  const at::ScalarType dtype = like.scalar_type();
  const at::MemoryFormat format = memory_format(x.dim() == 4 ? x : like);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  Depthwise d = make_depthwise(group, {x.numel() ? as_operand(x, dtype, format) : x}, like, format,
                               weights, relu);
  const OutputGradients from = output_gradients(gs, present);
  at::Tensor dx = at::empty({0}, like.options());
  if (need_x) {
    add_weights(d);
    dx = input_gradients(d, from, {})[0];
  }
  return {dx, weight_gradients(d, from, need_weights)};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("depthwise_group", &fastnas::cuda::depthwise_group);
  m.impl("depthwise_group_backward", &fastnas::cuda::depthwise_group_backward);
}
