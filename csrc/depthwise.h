// SPDX-License-Identifier: Apache-2.0
// What depthwise_group asks of its arguments, on every device, and the sizes that follow from them.
#pragma once
#include <algorithm>

#include "check.h"

namespace fastnas {

constexpr int64_t kMaxKernel = 7;

struct Convolution {
  int64_t k, dilation;
  int64_t tap;  // of its first tap among those of the group

  int64_t padding() const { return dilation * (k / 2); }
  int64_t taps() const { return k * k; }
};

// All convolutions of one source (N, C, H, W); outputs are (N, C, oh, ow).
struct DepthwiseGroup {
  int64_t N, C, H, W, stride, oh, ow;
  std::vector<Convolution> convolutions;
  int64_t taps = 0;

  int64_t size() const { return convolutions.size(); }
};

inline DepthwiseGroup check_depthwise(const char* op, at::IntArrayRef shape,
                                      const c10::Device& device, at::TensorList weights,
                                      at::IntArrayRef dilations, int64_t stride) {
  TORCH_CHECK_VALUE(shape.size() == 4, op, ": expected x of shape (N, C, H, W), but got ", shape);
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": expected stride 1 or 2, but got ", stride);
  TORCH_CHECK_VALUE(!weights.empty() && static_cast<int64_t>(weights.size()) <= kMaxCandidates, op,
                    ": expected 1 to ", kMaxCandidates, " tensors in weights, but got ",
                    weights.size());
  TORCH_CHECK_VALUE(weights.size() == dilations.size(), op,
                    ": expected one dilation per weight, but got ", weights.size(), " weights and ",
                    dilations.size(), " dilations");
  DepthwiseGroup g{shape[0],
                   shape[1],
                   shape[2],
                   shape[3],
                   stride,
                   (shape[2] + stride - 1) / stride,
                   (shape[3] + stride - 1) / stride,
                   {}};
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& w = weights[i];
    check_floating(op, "weights", w);
    TORCH_CHECK_VALUE(w.dim() == 4 && w.size(0) == g.C && w.size(1) == 1 &&
                          w.size(2) == w.size(3) && w.size(2) % 2 == 1 && w.size(2) <= kMaxKernel,
                      op, ": expected weights[", i, "] of shape (", g.C,
                      ", 1, k, k) with k of 1, 3, 5 or 7, but got ", w.sizes());
    TORCH_CHECK_VALUE(w.device() == device, op, ": expected weights[", i, "] on ", device,
                      " like x, but got ", w.device());
    // The bound keeps distances in a buffer within 64 bits.
    TORCH_CHECK_VALUE(dilations[i] >= 1 && dilations[i] <= (int64_t{1} << 20), op,
                      ": expected dilations of 1 to 2^20, but dilations[", i, "] is ",
                      dilations[i]);
    g.convolutions.push_back({w.size(2), dilations[i], g.taps});
    g.taps += w.size(2) * w.size(2);
  }
  return g;
}

inline DepthwiseGroup check_depthwise_backward(const char* op, at::TensorList grads,
                                               at::IntArrayRef present, const at::Tensor& x,
                                               at::IntArrayRef size, at::TensorList weights,
                                               at::IntArrayRef dilations, int64_t stride, bool relu,
                                               bool need_x, at::IntArrayRef need_weights) {
  const int64_t given =
      std::count_if(present.begin(), present.end(), [](int64_t p) { return p != 0; });
  TORCH_CHECK_VALUE(given > 0 && given == static_cast<int64_t>(grads.size()) &&
                        present.size() == weights.size() && need_weights.size() == weights.size(),
                    op, ": expected present and need_weights of one entry per weight (",
                    weights.size(), ") and as many grads as present says, at least one, but got ",
                    present.size(), ", ", need_weights.size(), " and ", grads.size(), " grads");
  TORCH_CHECK_VALUE(size.size() == 2, op, ": expected size of 2 entries, but got ", size.size());
  TORCH_CHECK_VALUE(grads[0].dim() == 4, op, ": expected grads of shape (N, C, H, W), but got ",
                    grads[0].sizes());
  const std::vector<int64_t> shape{grads[0].size(0), grads[0].size(1), size[0], size[1]};
  const DepthwiseGroup g =
      check_depthwise(op, shape, grads[0].device(), weights, dilations, stride);
  const std::vector<int64_t> sizes{g.N, g.C, g.oh, g.ow};
  const at::IntArrayRef out(sizes), input(shape);
  for (size_t i = 0; i < grads.size(); ++i) {
    check_floating(op, "grads", grads[i]);
    TORCH_CHECK_VALUE(grads[i].sizes() == out && grads[i].scalar_type() == grads[0].scalar_type() &&
                          grads[i].device() == grads[0].device(),
                      op, ": expected grads of shape ", out,
                      " and one dtype and device, but grads[", i, "] is ", grads[i].sizes(), ", ",
                      grads[i].scalar_type(), " on ", grads[i].device());
  }
  const bool need =
      std::any_of(need_weights.begin(), need_weights.end(), [](int64_t n) { return n != 0; });
  const bool reads = need || (need_x && relu);
  check_floating(op, "x", x);
  TORCH_CHECK_VALUE(
      (x.numel() == 0 && !reads) || (x.sizes() == input && x.device() == grads[0].device()), op,
      ": expected x of shape ", input, " on ", grads[0].device(), reads ? "" : " or empty",
      ", but got ", x.sizes(), " on ", x.device());
  return g;
}

}  // namespace fastnas
