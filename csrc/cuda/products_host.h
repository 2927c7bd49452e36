// SPDX-License-Identifier: Apache-2.0
// The hosts' side of pointwise convolutions: what separable_group and relu_pointwise share.
#pragma once
#include <vector>

#include "host.h"
#include "products.h"

namespace fastnas::cuda {

// Their kernels serve few channels (few_channels); the operands below are dense, in one dtype and in `format`, of one
// shape, with pixels, and at least one.

inline ProductSizes product_sizes(const std::vector<at::Tensor>& xs, int64_t outputs,
                                  at::MemoryFormat format, bool relu) {
  const at::Tensor& x = xs[0];
  return {dtype_of(x.scalar_type()),
          format != at::MemoryFormat::Contiguous,
          relu,
          static_cast<int>(xs.size()),
          static_cast<int>(x.size(1)),
          static_cast<int>(outputs),
          x.size(0),
          x.size(2) * x.size(3)};
}

// y_i = w_i x_i, or w_i^T x_i where turned. With a ReLU before, and a mask behind (of the shape of y_0), where given.
inline std::vector<at::Tensor> multiply(const std::vector<at::Tensor>& xs,
                                        const std::vector<at::Tensor>& weights,
                                        at::MemoryFormat format, bool turned, bool relu = false,
                                        const at::Tensor& mask = {}) {
  const at::Tensor& x = xs[0];
  Products p{product_sizes(xs, weights[0].size(turned ? 1 : 0), format, relu)};
  p.turned = turned;
  if (mask.defined()) p.mask = pointer(mask);
  std::vector<at::Tensor> ys, kept;
  for (int i = 0; i < p.count; ++i) {
    ys.push_back(at::empty({p.N, p.outputs, x.size(2), x.size(3)}, x.options(), format));
    kept.push_back(weights[i].contiguous());
    p.xs[i] = pointer(xs[i]);
    p.ys[i] = mutable_pointer(ys[i]);
    p.weights[i] = pointer(kept[i]);
    p.weight_dtype[i] = static_cast<signed char>(dtype_of(weights[i].scalar_type()));
  }
  C10_CUDA_CHECK(launch_products(p, stream_of(x)));
  return ys;
}

// The gradients of those weights: sums over pixels of g_i x_i^T, in the weights' dtypes. With a ReLU of the xs.
inline std::vector<at::Tensor> multiply_backward(const std::vector<at::Tensor>& gs,
                                                 const std::vector<at::Tensor>& xs,
                                                 const std::vector<at::Tensor>& weights,
                                                 at::MemoryFormat format, bool relu = false) {
  const at::Tensor& x = xs[0];
  ProductSums p{product_sizes(xs, gs[0].size(1), format, relu)};
  std::vector<at::Tensor> dws;
  for (int i = 0; i < p.count; ++i) {
    dws.push_back(at::empty(weights[i].sizes(), weights[i].options()));
    p.xs[i] = pointer(xs[i]);
    p.gs[i] = pointer(gs[i]);
    p.dws[i] = mutable_pointer(dws[i]);
    p.weight_dtype[i] = static_cast<signed char>(dtype_of(weights[i].scalar_type()));
  }
  plan_sums(p);
  const at::Tensor partial = scratch(p.partials(), accumulate_dtype(x.scalar_type()), x);
  C10_CUDA_CHECK(launch_product_sums(p, mutable_pointer(partial), stream_of(x)));
  return dws;
}

}  // namespace fastnas::cuda
