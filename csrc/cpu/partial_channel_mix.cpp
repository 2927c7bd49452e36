// SPDX-License-Identifier: Apache-2.0
// PC-DARTS' mixed op after its candidates: the sum with its BatchNorms goes to every k-th channel of the output, the
// bypassed channels, copied or pooled, to the others. The passes are those of mixed_batch_norm on a Slot.
#include <torch/library.h>

#include "bypass.h"
#include "mixed_batch_norm.h"

namespace fastnas {

namespace {

Bypass make_bypass(const char* op, int64_t k, at::IntArrayRef rest_shape, int64_t N, int64_t c,
                   int64_t oh, int64_t ow) {
  check_bypass(op, k, rest_shape, N, c, oh, ow);
  return {N, c, k, rest_shape[2], rest_shape[3], oh, ow, 0, 0, 0, 0};
}

void set_strides(Bypass& b, const at::Tensor& rest) {
  b.sn = rest.stride(0);
  b.sc = rest.stride(1);
  b.sh = rest.stride(2);
  b.sw = rest.stride(3);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> partial_channel_mix_cpu(
    const at::Tensor& rest, at::TensorList xs, const at::Tensor& weights, int64_t k,
    at::IntArrayRef kinds, at::ArrayRef<double> eps, at::IntArrayRef affine, at::TensorList gammas,
    at::TensorList betas, at::TensorList running_means, at::TensorList running_vars) {
  const char* op = "partial_channel_mix";
  check_inputs(op, xs, weights);
  check_weights(op, weights, xs.size(), xs[0]);
  check_floating(op, "rest", rest);
  TORCH_CHECK_VALUE(xs[0].dim() == 4, op, ": expected inputs of shape (N, C, H, W), but got ",
                    xs[0].sizes());
  const int64_t N = xs[0].size(0), c = xs[0].size(1), oh = xs[0].size(2), ow = xs[0].size(3);
  Bypass bypass = make_bypass(op, k, rest.sizes(), N, c, oh, ow);
  const at::ScalarType dtype = c10::promoteTypes(result_dtype(xs), rest.scalar_type());
  const at::MemoryFormat format = memory_format(xs[0]);
  const std::vector<at::Tensor> operands = as_operands(xs, dtype, format);
  const at::Tensor r = rest.to(dtype);  // read through its strides
  set_strides(bypass, r);
  at::Tensor y = at::empty({N, k * c, oh, ow}, xs[0].options().dtype(dtype), format);
  NormTable table = make_norm_table(op, c, weights, kinds, eps, affine, gammas, betas);
  set_running_statistics(op, table, running_means, running_vars);
  if (y.numel()) {
    const Layout layout = layout_of(xs[0].sizes(), format != at::MemoryFormat::Contiguous);
    dispatch(op, dtype, [&](auto tag) {
      using T = decltype(tag);
      const Mix<T> mix(layout);
      const std::vector<const T*> x = const_pointers<T>(operands);
      const T* rp = const_pointer<T>(r);
      T* yp = static_cast<T*>(y.mutable_data_ptr());
      batch_statistics(mix, x, table);
      const ForwardCoefficients f = forward_coefficients(table);
      mix.combine(x, Slot<T>{yp, k * c, k}, f.coef, f.bias, [&](int64_t first, int64_t last) {
        bypass_columns(bypass, rp, yp, first, last);
      });
      if (!layout.columns) bypass_planes(bypass, rp, yp);
    });
  }
  return {y, from_doubles(table.mean, {table.K, c}, weights.options()),
          from_doubles(table.var, {table.K, c}, weights.options())};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
partial_channel_mix_backward_cpu(const at::Tensor& grad, const at::Tensor& rest,
                                 at::IntArrayRef rest_size, at::TensorList xs,
                                 const at::Tensor& weights, int64_t k, const at::Tensor& mean,
                                 const at::Tensor& var, at::IntArrayRef kinds,
                                 at::ArrayRef<double> eps, at::IntArrayRef affine,
                                 at::TensorList gammas, at::TensorList betas, bool need_rest,
                                 at::IntArrayRef need_xs, bool need_weights) {
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
  Bypass bypass = make_bypass(op, k, rest_shape, N, c, oh, ow);
  NormTable table = make_norm_table(op, c, weights, kinds, eps, affine, gammas, betas);
  set_statistics(op, table, mean, var);
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
    TORCH_CHECK_VALUE(!bypass.pooled() || rest.sizes() == at::IntArrayRef(rest_shape), op,
                      ": expected rest of shape ", rest_shape, " to find its maxima, but got ",
                      rest.sizes());
    if (bypass.pooled()) set_strides(bypass, r = rest.to(dtype));
  }
  MixGradients out;
  out.dw = at::empty({0}, weights.options());
  for (int64_t need : need_xs)
    if (need) out.dxs.push_back(at::empty(shape, grad.options(), format));
  const Layout layout = layout_of(shape, format != at::MemoryFormat::Contiguous);
  dispatch(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<T*> dx(table.K, nullptr);
    for (int64_t j = 0, i = 0; j < table.K; ++j)
      if (need_xs[j]) dx[j] = static_cast<T*>(out.dxs[i++].mutable_data_ptr());
    const T* gp = const_pointer<T>(g);
    mix_backward(Mix<T>(layout), layout, Slot<const T>{gp, k * c, k}, const_pointers<T>(operands),
                 table, dx, out, weights, need_weights);
    if (!need_rest || drest.numel() == 0) return;
    T* dp = static_cast<T*>(drest.mutable_data_ptr());
    // By the format of drest, not by layout.columns: one output pixel may come from a window of four.
    if (format != at::MemoryFormat::Contiguous)
      bypass_columns_backward(bypass, gp, const_pointer<T>(r), dp);
    else
      bypass_planes_backward(bypass, gp, const_pointer<T>(r), dp);
  });
  return {drest, out.dxs, out.dw, out.dgamma, out.dbeta};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("partial_channel_mix", &fastnas::partial_channel_mix_cpu);
  m.impl("partial_channel_mix_backward", &fastnas::partial_channel_mix_backward_cpu);
}
