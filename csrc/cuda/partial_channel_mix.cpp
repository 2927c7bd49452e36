// SPDX-License-Identifier: Apache-2.0
// PC-DARTS' mixed op after its candidates, on CUDA: the sum with its BatchNorms goes to every k-th channel of the
// output, the bypassed channels, copied or pooled, to the others.
#include "partial_channel_mix.h"

#include <torch/library.h>

#include "mixed_batch_norm.h"

namespace fastnas::cuda {

namespace {

Bypass checked_bypass(const char* op, int64_t k, at::IntArrayRef rest_shape, int64_t N, int64_t c,
                      int64_t oh, int64_t ow) {
  check_bypass(op, k, rest_shape, N, c, oh, ow);
  return make_bypass(N, c, k, rest_shape[2], rest_shape[3], oh, ow);
}

Strides strides_of(const at::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> partial_channel_mix(
    const at::Tensor& rest, at::TensorList xs, const at::Tensor& weights, int64_t k,
    at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
    at::TensorList betas, at::TensorList running_means, at::TensorList running_vars) {
  const char* op = "partial_channel_mix";
  check_inputs(op, xs, weights);
  check_weights(op, weights, xs.size(), xs[0]);
  check_floating(op, "rest", rest);
  TORCH_CHECK_VALUE(xs[0].dim() == 4, op, ": expected inputs of shape (N, C, H, W), but got ",
                    xs[0].sizes());
  TORCH_CHECK_VALUE(rest.device() == xs[0].device(), op, ": expected rest on ", xs[0].device(),
                    " like the inputs, but got ", rest.device());
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const int64_t N = xs[0].size(0), c = xs[0].size(1), oh = xs[0].size(2), ow = xs[0].size(3);
  Bypass bypass = checked_bypass(op, k, rest.sizes(), N, c, oh, ow);
  const at::ScalarType dtype = c10::promoteTypes(result_dtype(xs), rest.scalar_type());
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  const at::Tensor r = rest.to(dtype);  // read through its strides
  bypass.rest = strides_of(r);
  at::Tensor y = at::empty({N, k * c, oh, ow}, xs[0].options().dtype(dtype), format);
  NormArguments norms = make_norms(op, c, weights, kinds, eps, affine, gammas, betas);
  add_running_statistics(op, c, norms, running_means, running_vars);
  std::vector<const void*> walked = pointers(operands);
  walked.push_back(mutable_pointer(y));
  const Plan plan = plan_channels(xs[0].sizes(), dtype, format, walked);
  const Coefficients f = mix_coefficients(plan, operands, norms);
  const Combine args = combine_arguments(plan, f, operands, mutable_pointer(y), k);
  if (plan.columns) {
    C10_CUDA_CHECK(launch_partial_columns(plan, args, bypass, pointer(r), stream_of(y)));
  } else {
    C10_CUDA_CHECK(launch_combine(plan, args, stream_of(y)));
    C10_CUDA_CHECK(launch_bypass(plan.dtype, bypass, pointer(r), args.y, stream_of(y)));
  }
  return {y, f.mean.to(weights.scalar_type()), f.var.to(weights.scalar_type())};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
partial_channel_mix_backward(const at::Tensor& grad, const at::Tensor& rest,
                             at::IntArrayRef rest_size, at::TensorList xs,
                             const at::Tensor& weights, int64_t k, const at::Tensor& mean,
                             const at::Tensor& var, at::IntArrayRef kinds, at::ArrayRef<double> eps,
                             at::IntArrayRef affine, at::TensorList gammas, at::TensorList betas,
                             bool need_rest, at::IntArrayRef need_xs, bool need_weights) {
  const char* op = "partial_channel_mix_backward";
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.dim() == 4 && k >= 2 && grad.size(1) % k == 0, op,
                    ": expected grad of shape (N, C, H, W) ", "with C divisible by k = ", k,
                    ", but got ", grad.sizes());
  TORCH_CHECK_VALUE(rest_size.size() == 2, op, ": expected rest_size of 2 entries, but got ",
                    rest_size.size());
  const int64_t N = grad.size(0), c = grad.size(1) / k, oh = grad.size(2), ow = grad.size(3);
  const std::vector<int64_t> shape{N, c, oh, ow},
      rest_shape{N, (k - 1) * c, rest_size[0], rest_size[1]};
  check_saved(op, xs, shape, grad);
  check_weights(op, weights, xs.size(), grad);
  TORCH_CHECK_VALUE(need_xs.size() == xs.size(), op, ": expected need_xs of one entry per input (",
                    xs.size(), "), but got ", need_xs.size());
  const c10::cuda::CUDAGuard guard(grad.device());
  Bypass bypass = checked_bypass(op, k, rest_shape, N, c, oh, ow);
  NormArguments norms = make_norms(op, c, weights, kinds, eps, affine, gammas, betas);
  check_statistics(op, c, norms, mean, var);
  at::Tensor like = grad;
  for (const at::Tensor& x : xs)
    if (x.dim() == 4) {
      like = x;
      break;
    }
  const at::ScalarType dtype = grad.scalar_type();
  const at::MemoryFormat format = memory_format(like);
  const at::Tensor g = as_operand(grad, dtype, format);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  at::Tensor r = rest, drest = at::empty({0}, grad.options());
  if (need_rest) {
    drest = at::empty(rest_shape, grad.options(), format);
    bypass.drest = strides_of(drest);
    if (bypass.pooled()) {
      TORCH_CHECK_VALUE(
          rest.sizes() == at::IntArrayRef(rest_shape) && rest.device() == grad.device(), op,
          ": expected rest of shape ", rest_shape, " on ", grad.device(),
          " to find its maxima, but got ", rest.sizes(), " on ", rest.device());
      r = rest.to(dtype);
      bypass.rest = strides_of(r);
    }
    if (grad.numel() == 0)
      drest.zero_();  // no pixel of the output reaches the odd row or column of rest
  }
  std::vector<at::Tensor> dxs;
  for (int64_t need : need_xs)
    if (need) dxs.push_back(at::empty(shape, grad.options(), format));
  const std::vector<void*> to = gradient_pointers(need_xs, dxs);
  std::vector<const void*> walked = pointers(operands);
  walked.push_back(pointer(g));
  walked.insert(walked.end(), to.begin(), to.end());
  const Plan plan = plan_channels(shape, dtype, format, walked);
  const MixGradients out =
      mix_backward(plan, pointer(g), k, operands, norms, weights, mean, var, need_xs, need_weights);
  const Gradients args = gradient_arguments(plan, out, pointer(g), k, operands, norms, to);
  void* const to_rest = need_rest ? mutable_pointer(drest) : nullptr;
  if (plan.columns && to_rest) {
    C10_CUDA_CHECK(
        launch_partial_columns_backward(plan, args, bypass, pointer(r), to_rest, stream_of(grad)));
  } else {
    C10_CUDA_CHECK(launch_gradients(plan, args, stream_of(grad)));
    if (to_rest)
      C10_CUDA_CHECK(launch_bypass_backward(plan.dtype, bypass, pointer(g), pointer(r), to_rest,
                                            stream_of(grad)));
  }
  return {drest, dxs, out.dw, out.dgamma, out.dbeta};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("partial_channel_mix", &fastnas::cuda::partial_channel_mix);
  m.impl("partial_channel_mix_backward", &fastnas::cuda::partial_channel_mix_backward);
}
