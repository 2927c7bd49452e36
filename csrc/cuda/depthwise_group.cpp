// SPDX-License-Identifier: Apache-2.0
// Depthwise convolutions of one source, on CUDA: one kernel for all outputs; backward one for dx, one for the parts of
// all gradients of weights, and a small one to fold those of each.
#include "depthwise_group.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../depthwise.h"
#include "host.h"

namespace fastnas::cuda {

namespace {

// Dense weights, and the table that the kernels read; they live as long as this does.
struct Weights {
  std::vector<at::Tensor> tensors;
  at::Tensor table;
};

Convolutions make_convolutions(const DepthwiseGroup& g, at::TensorList weights,
                               at::ScalarType dtype, at::MemoryFormat format, bool relu) {
  Convolutions c{};
  c.dtype = dtype_of(dtype);
  c.columns = format != at::MemoryFormat::Contiguous;
  c.count = static_cast<int>(g.size());
  c.stride = static_cast<int>(g.stride);
  c.N = g.N;
  c.C = g.C;
  c.H = g.H;
  c.W = g.W;
  c.oh = g.oh;
  c.ow = g.ow;
  c.relu = relu;
  for (int i = 0; i < c.count; ++i) {
    c.side[i] = static_cast<int>(g.convolutions[i].k);
    c.dilation[i] = static_cast<int>(g.convolutions[i].dilation);
    c.first[i] = static_cast<int>(g.convolutions[i].tap);
    c.weight_dtype[i] = static_cast<signed char>(dtype_of(weights[i].scalar_type()));
  }
  c.first[c.count] = static_cast<int>(g.taps);
  return c;
}

Weights add_weights(Convolutions& c, at::TensorList weights, const at::Tensor& like) {
  const at::ScalarType acc = accumulate_dtype(like.scalar_type());
  Weights w{{}, scratch(c.taps() * c.C, acc, like)};
  for (int i = 0; i < c.count; ++i) {
    w.tensors.push_back(weights[i].contiguous());
    c.weights[i] = pointer(w.tensors[i]);
  }
  C10_CUDA_CHECK(launch_weight_table(c, mutable_pointer(w.table), stream_of(like)));
  c.table = pointer(w.table);
  return w;
}

// dws of the convolutions that need one: zeros where there are no pixels.
std::vector<at::Tensor> weight_gradients(const Convolutions& c, const OutputGradients& from,
                                         const at::Tensor& x, at::TensorList weights,
                                         at::IntArrayRef need, const at::Tensor& like) {
  const at::ScalarType acc = accumulate_dtype(like.scalar_type());
  const WeightPlan plan = plan_weights(c);
  WeightGradients to{};
  bool any = false;
  for (int i = 0; i < c.count; ++i) any = (to.need[i] = need[i] && from.gs[i]) || any;
  const at::Tensor partial = scratch(any ? c.taps() * c.C * plan.parts : 0, acc, like);
  to.partial = mutable_pointer(partial);
  if (any) C10_CUDA_CHECK(launch_weight_gradients(c, plan, from, pointer(x), to, stream_of(like)));
  std::vector<at::Tensor> dws;
  FoldedGradients folded{};
  for (int i = 0; i < c.count; ++i) {
    if (!need[i]) continue;
    dws.push_back(to.need[i] ? at::empty(weights[i].sizes(), weights[i].options())
                             : at::zeros(weights[i].sizes(), weights[i].options()));
    if (to.need[i]) folded.dws[i] = mutable_pointer(dws.back());
  }
  if (any) C10_CUDA_CHECK(launch_fold_weights(c, plan, to.partial, folded, stream_of(like)));
  return dws;
}

}  // namespace

std::vector<at::Tensor> depthwise_group(const at::Tensor& x, at::TensorList weights,
                                        at::IntArrayRef dilations, int64_t stride, bool relu) {
  const char* op = "depthwise_group";
  check_floating(op, "x", x);
  const DepthwiseGroup group =
      check_depthwise(op, x.sizes(), x.device(), weights, dilations, stride);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = memory_format(x);
  const at::Tensor source = as_operand(x, x.scalar_type(), format);
  std::vector<at::Tensor> ys;
  Outputs to{};
  for (int64_t i = 0; i < group.size(); ++i) {
    ys.push_back(at::empty({group.N, group.C, group.oh, group.ow}, x.options(), format));
    to.ys[i] = mutable_pointer(ys[i]);
  }
  if (ys[0].numel() == 0) return ys;
  Convolutions c = make_convolutions(group, weights, x.scalar_type(), format, relu);
  const Weights w = add_weights(c, weights, x);
  C10_CUDA_CHECK(launch_convolutions(c, pointer(source), to, stream_of(x)));
  return ys;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> depthwise_group_backward(
    at::TensorList grads, at::IntArrayRef present, const at::Tensor& x, at::IntArrayRef size,
    at::TensorList weights, at::IntArrayRef dilations, int64_t stride, bool relu, bool need_x,
    at::IntArrayRef need_weights) {
  const char* op = "depthwise_group_backward";
  const DepthwiseGroup group = check_depthwise_backward(
      op, grads, present, x, size, weights, dilations, stride, relu, need_x, need_weights);
  const at::Tensor& like = grads[0];
  const c10::cuda::CUDAGuard guard(like.device());
  const at::ScalarType dtype = like.scalar_type();
  const at::MemoryFormat format = memory_format(x.dim() == 4 ? x : like);
  const std::vector<at::Tensor> gs = as_operands(grads, dtype, format);
  const at::Tensor source = x.numel() ? as_operand(x, dtype, format) : x;
  Convolutions c = make_convolutions(group, weights, dtype, format, relu);
  OutputGradients from{};
  for (int64_t i = 0, j = 0; i < group.size(); ++i)
    if (present[i]) from.gs[i] = pointer(gs[j++]);
  at::Tensor dx = at::empty({0}, like.options());
  if (need_x) {
    dx = at::empty({group.N, group.C, group.H, group.W}, like.options(), format);
    const Weights w = add_weights(c, weights, like);
    C10_CUDA_CHECK(
        launch_input_gradient(c, from, pointer(source), mutable_pointer(dx), stream_of(like)));
  }
  return {dx, weight_gradients(c, from, source, weights, need_weights, like)};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("depthwise_group", &fastnas::cuda::depthwise_group);
  m.impl("depthwise_group_backward", &fastnas::cuda::depthwise_group_backward);
}
