// SPDX-License-Identifier: Apache-2.0
// y = sum_k w_k x_k on CUDA: the operands are one long plane, the weights its coefficients.
#include <torch/library.h>

#include <algorithm>

#include "host.h"

namespace fastnas::cuda {

at::Tensor mixed_sum(at::TensorList xs, const at::Tensor& weights) {
  check_inputs("mixed_sum", xs, weights);
  check_weights("mixed_sum", weights, xs.size(), xs[0]);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const at::ScalarType dtype = result_dtype(xs);
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  at::Tensor y = at::empty(xs[0].sizes(), xs[0].options().dtype(dtype), format);
  if (y.numel() == 0) return y;
  const at::Tensor w = as_operand(weights, accumulate_dtype(dtype), at::MemoryFormat::Contiguous);
  std::vector<const void*> walked = pointers(operands);
  Combine args{};
  std::copy(walked.begin(), walked.end(), args.xs);
  args.K = static_cast<int>(xs.size());
  args.coef = w.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.step = 1;
  walked.push_back(args.y);
  C10_CUDA_CHECK(launch_combine(plan_flat(y.numel(), dtype, walked), args, stream_of(y)));
  return y;
}

namespace {

// Parts of the sums of g x_k.
void launch_sums(const Plan& plan, const at::Tensor& g, const std::vector<const void*>& xs,
                 const at::Tensor& partial) {
  Dots dots{};
  std::copy(xs.begin(), xs.end(), dots.xs);
  dots.g = pointer(g);
  dots.step = 1;
  dots.K = static_cast<int>(xs.size());
  dots.partial = mutable_pointer(partial);
  C10_CUDA_CHECK(launch_dots(plan, dots, stream_of(g)));
}

// Those, and the gradients of the inputs.
void launch_both(const Plan& plan, const at::Tensor& g, const std::vector<const void*>& xs,
                 const std::vector<void*>& dxs, const at::Tensor& weights,
                 const at::Tensor& partial) {
  SumGradients both{};
  std::copy(xs.begin(), xs.end(), both.xs);
  std::copy(dxs.begin(), dxs.end(), both.dxs);
  both.g = pointer(g);
  both.K = static_cast<int>(xs.size());
  both.a = pointer(weights);
  both.partial = mutable_pointer(partial);
  C10_CUDA_CHECK(launch_sum_gradients(plan, both, stream_of(g)));
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor> mixed_sum_backward(const at::Tensor& grad,
                                                                   at::TensorList xs,
                                                                   const at::Tensor& weights,
                                                                   at::IntArrayRef need_xs,
                                                                   bool need_weights) {
  const char* op = "mixed_sum_backward";
  check_floating(op, "grad", grad);
  check_weights(op, weights, need_xs.size(), grad);
  check_saved(op, xs, grad.sizes(), grad);
  TORCH_CHECK_VALUE(need_xs.size() <= static_cast<size_t>(kMaxOperands), op, ": expected at most ",
                    kMaxOperands, " inputs, but got ", need_xs.size());
  TORCH_CHECK_VALUE(!need_weights || xs.size() == need_xs.size(), op, ": expected ", need_xs.size(),
                    " inputs, but got ", xs.size());
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::ScalarType dtype = grad.scalar_type(), acc = accumulate_dtype(dtype);
  const at::MemoryFormat format = memory_format(grad);
  const at::Tensor g = as_operand(grad, dtype, format);
  const std::vector<at::Tensor> operands =
      need_weights ? as_operands(xs, dtype, format) : std::vector<at::Tensor>{};
  const at::Tensor w = as_operand(weights, acc, at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(grad.sizes(), grad.options(), format));
  const int64_t K = need_xs.size();
  const std::vector<const void*> operands_at = pointers(operands);
  std::vector<const void*> walked = operands_at;
  const std::vector<void*> to = gradient_pointers(need_xs, dxs);

  walked.push_back(pointer(g));
  walked.insert(walked.end(), to.begin(), to.end());
  const Plan plan = plan_flat(grad.numel(), dtype, walked);
  const cudaStream_t stream = stream_of(grad);
  at::Tensor dw = at::empty({0}, weights.options());
  // A flat plan of one value is one of columns.
  const bool once = need_weights && K <= kDotSlice && !plan.columns;
  if (need_weights) {
    const at::Tensor partial = scratch((K + 1) * plan.partials(), acc, grad);
    if (once) {
      launch_both(plan, g, operands_at, to, w, partial);
    } else {
      launch_sums(plan, g, operands_at, partial);
    }
    dw = at::empty({K}, weights.options().dtype(acc));
    const char* first =
        static_cast<const char*>(pointer(partial)) + plan.partials() * accumulator_size(plan.dtype);
    const bool wide = acc == at::kDouble;
    C10_CUDA_CHECK(
        launch_fold(wide, wide, first, K, plan.partials(), dw.mutable_data_ptr(), stream));
    dw = dw.to(weights.scalar_type());
  }
  if (once) return {dxs, dw};
  Gradients gradients{};
  std::copy(to.begin(), to.end(), gradients.dxs);
  gradients.g = pointer(g);
  gradients.step = 1;
  gradients.K = static_cast<int>(K);
  gradients.a = pointer(w);
  C10_CUDA_CHECK(launch_gradients(plan, gradients, stream));
  return {dxs, dw};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("mixed_sum", &fastnas::cuda::mixed_sum);
  m.impl("mixed_sum_backward", &fastnas::cuda::mixed_sum_backward);
}
