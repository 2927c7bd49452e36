// SPDX-License-Identifier: Apache-2.0
// What pool_pair asks of its arguments, on every device, and the sizes that follow from them.
#pragma once
#include <algorithm>

#include "check.h"

namespace fastnas {

// Windows of 3x3 pixels over (N, C, H, W); outputs are (N, C, oh, ow).
struct Pools {
  int64_t N, C, H, W, oh, ow, stride;
};

inline Pools check_pools(const char* op, at::IntArrayRef shape, int64_t stride) {
  TORCH_CHECK_VALUE(shape.size() == 4, op, ": expected x of shape (N, C, H, W), but got ", shape);
  // Positions in an image fit 32 bits.
  TORCH_CHECK_VALUE(shape[2] <= (int64_t{1} << 30) && shape[3] <= (int64_t{1} << 30), op,
                    ": expected x of at most 2^30 rows and columns, but got ", shape);
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": expected stride 1 or 2, but got ", stride);
  return {shape[0],
          shape[1],
          shape[2],
          shape[3],
          (shape[2] + stride - 1) / stride,
          (shape[3] + stride - 1) / stride,
          stride};
}

// Gradients of both outputs, or of the one that has one; x has the values that the maximum was taken of.
inline Pools check_pools_backward(const char* op, const at::Tensor* g_max, const at::Tensor* g_avg,
                                  const at::Tensor& x, at::IntArrayRef size, int64_t stride) {
  TORCH_CHECK_VALUE(g_max || g_avg, op, ": expected a gradient of max or of avg, but got neither");
  const at::Tensor& first = g_max ? *g_max : *g_avg;
  TORCH_CHECK_VALUE(size.size() == 2, op, ": expected size of 2 entries, but got ", size.size());
  TORCH_CHECK_VALUE(first.dim() == 4, op, ": expected gradients of shape (N, C, H, W), but got ",
                    first.sizes());
  const std::vector<int64_t> shape{first.size(0), first.size(1), size[0], size[1]};
  const Pools p = check_pools(op, shape, stride);
  const std::vector<int64_t> out{p.N, p.C, p.oh, p.ow};
  for (const at::Tensor* g : {g_max, g_avg}) {
    if (!g) continue;
    check_floating(op, "gradients", *g);
    TORCH_CHECK_VALUE(g->sizes() == at::IntArrayRef(out) &&
                          g->scalar_type() == first.scalar_type() && g->device() == first.device(),
                      op, ": expected gradients of shape ", at::IntArrayRef(out),
                      " and one dtype and device, but got ", g->sizes(), ", ", g->scalar_type(),
                      " on ", g->device());
  }
  check_floating(op, "x", x);
  TORCH_CHECK_VALUE((x.numel() == 0 && !g_max) ||
                        (x.sizes() == at::IntArrayRef(shape) && x.device() == first.device()),
                    op, ": expected x of shape ", at::IntArrayRef(shape), " on ", first.device(),
                    g_max ? "" : " or empty", ", but got ", x.sizes(), " on ", x.device());
  return p;
}

// Gradients of one output by all of its readers, and the numbers that each sent along or nothing.
inline void check_pool_readers(const char* op, const Pools& p, at::TensorList grads,
                               at::TensorList numbers, const at::Tensor& output,
                               const at::Tensor& x) {
  const std::vector<int64_t> shape{p.N, p.C, p.oh, p.ow};
  const auto fits = [&](const at::Tensor& t) {
    return t.sizes() == at::IntArrayRef(shape) && t.scalar_type() == x.scalar_type() &&
           t.device() == x.device();
  };
  TORCH_CHECK_VALUE(grads.size() == numbers.size(), op,
                    ": expected numbers, perhaps empty, for every gradient (", grads.size(),
                    "), but got ", numbers.size());
  TORCH_CHECK_VALUE(fits(output) && std::all_of(grads.begin(), grads.end(), fits), op,
                    ": expected outputs and gradients of shape ", at::IntArrayRef(shape),
                    " and of x's dtype and device");
  for (const at::Tensor& n : numbers)
    TORCH_CHECK_VALUE(
        n.numel() == 0 || (n.sizes() == at::IntArrayRef({4, p.C}) && n.device() == x.device()), op,
        ": expected numbers of shape [4, ", p.C, "] on ", x.device(), " or empty, but got ",
        n.sizes(), " on ", n.device());
}

}  // namespace fastnas
