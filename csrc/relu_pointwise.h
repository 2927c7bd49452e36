// SPDX-License-Identifier: Apache-2.0
// What relu_pointwise asks of its arguments, on every device.
#pragma once
#include "check.h"

namespace fastnas {

// From (N, C, H, W) to (N, outputs, H, W).
struct Product {
  int64_t N, C, outputs, pixels;  // pixels: H * W
};

inline Product check_product(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  check_floating(op, "x", x);
  check_floating(op, "weight", weight);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected x of shape (N, C, H, W), but got ", x.sizes());
  const std::vector<int64_t> shape{weight.dim() ? weight.size(0) : 0, x.size(1), 1, 1};
  TORCH_CHECK_VALUE(
      weight.sizes() == at::IntArrayRef(shape) && shape[0] > 0 && weight.device() == x.device(), op,
      ": expected weight of shape (C', ", x.size(1), ", 1, 1), C' at least 1, on ", x.device(),
      ", but got ", weight.sizes(), " on ", weight.device());
  return {x.size(0), x.size(1), weight.size(0), x.size(2) * x.size(3)};
}

inline Product check_product_backward(const char* op, const at::Tensor& grad, const at::Tensor& x,
                                      const at::Tensor& weight) {
  const Product p = check_product(op, x, weight);
  const std::vector<int64_t> shape{p.N, p.outputs, x.size(2), x.size(3)};
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape) && grad.device() == x.device(), op,
                    ": expected grad of shape ", at::IntArrayRef(shape), " on ", x.device(),
                    ", but got ", grad.sizes(), " on ", grad.device());
  return p;
}

}  // namespace fastnas
